"""The packing loops for which NumPy has no function, in machine code: numba, whose import takes a second.

`first_fit` and `best_fit` search in a tree that is an array: node i has the children 2 i and 2 i + 1 and holds the
greater of their values, and the last half are the leaves. The first leaf with some value or more is found in O(depth).
"""

from collections.abc import Callable
from typing import Any

import numba
import numpy as np


def _compiled(loop: Callable[..., Any]) -> Callable[..., Any]:
    try:
        return numba.njit(cache=True)(loop)
    except RuntimeError:  # no folder in which numba could keep the result: compile in every process
        return numba.njit(loop)


@_compiled
def _empty_tree(leaves: int, value: int) -> np.ndarray:
    return np.full(2 << int(np.ceil(np.log2(leaves))), value, np.int32)


@_compiled
def _first_leaf(tree: np.ndarray, least: int) -> int:
    node = 1
    while node < len(tree) // 2:
        node *= 2
        if tree[node] < least:
            node += 1
    return node - len(tree) // 2


@_compiled
def _set_leaf(tree: np.ndarray, leaf: int, value: int) -> None:
    node = len(tree) // 2 + leaf
    tree[node] = value
    while node > 1:
        node //= 2
        greater = max(tree[2 * node], tree[2 * node + 1])
        if tree[node] == greater:
            break
        tree[node] = greater


@_compiled
def first_fit(length: np.ndarray, max_length: int) -> np.ndarray:
    """int32 [pieces]: the first row with room for each piece, in order of `length`, int32 [pieces]."""
    # All rows but one are more than half full, or a later one would have gone into an earlier.
    most_rows = min(len(length), 2 * length.sum() // max_length + 1)
    room = _empty_tree(most_rows, max_length)
    row = np.empty(len(length), np.int32)
    for piece in range(len(length)):
        row[piece] = _first_leaf(room, length[piece])
        _set_leaf(room, row[piece], room[len(room) // 2 + row[piece]] - length[piece])
    return row


@_compiled
def best_fit(length: np.ndarray, max_length: int) -> np.ndarray:
    """int32 [pieces]: the fullest row with room for each piece of `length`, int32 [pieces], the longest first.

    Of equally full rows it is the one that was last added to: `newest[r]` is that of the rows with room r, and
    `older[row]` the one before it. Leaf r of the tree is r if there is a row with that room, else -1.
    """
    longest_first, begins = counting_sort(max_length - length)
    tree = _empty_tree(max_length + 1, -1)
    newest = np.full(max_length + 1, -1, np.int32)
    older = np.full(len(length), -1, np.int32)
    row = np.empty(len(length), np.int32)
    rows = spare = 0
    for place, piece in enumerate(longest_first):
        while place == begins[spare + 1]:
            spare += 1
        size = max_length - spare  # reading `length[piece]` would be a random access to memory
        if tree[1] < size:
            room, chosen = max_length, rows
            rows += 1
        else:
            room = _first_leaf(tree, size)
            chosen = newest[room]
            newest[room] = older[chosen]
            if newest[room] < 0:
                _set_leaf(tree, room, -1)
        row[piece] = chosen
        room -= size
        older[chosen] = newest[room]
        newest[room] = chosen
        if older[chosen] < 0:
            _set_leaf(tree, room, room)
    return row


@_compiled
def counting_sort(key: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """int64 [keys]: the stable order of `key`, int from 0 up; int64 [max + 2]: where each value begins in it."""
    begins = np.append(0, np.cumsum(np.bincount(key)))
    free = begins.copy()
    order = np.empty(len(key), np.int64)
    for i in range(len(key)):
        order[free[key[i]]] = i
        free[key[i]] += 1
    return order, begins

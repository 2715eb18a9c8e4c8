#!/usr/bin/env bash
# NumPy's unique of whole numbers that hardly repeat takes ten times as long and more if it isn't asked for counts as well.
#
# numpy 2.4.6, Python 3.11. One would take np.unique(x) for the cheapest form, as return_counts gives the same numbers and one
# array more, and for a sort in essence. From 2.3 on the bare form puts whole numbers into a hash table and sorts what comes
# out (_unique1d in numpy/lib/_arraysetops_impl.py; the comment there calls sorting the slower way), and the other forms sort
# the numbers themselves. The table is meant for a few values that come many times. For a million different numbers, as the
# ids of rows or hashes of texts are, it takes some forty times as long as the sort, also if they are in order already, and
# sorted=False leaves out the small part of that. np.union1d of such numbers goes the same way. Numbers in float64 are sorted
# as before. What helps: return_counts=True, or np.sort and a comparison of neighbours.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3.11 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q numpy==2.4.6
cat >"$folder/unique.py" <<'PYTHON'
import sys
import time
from collections.abc import Callable

import numpy as np


def seconds(call: Callable[[], object]) -> float:
    """The best of three."""
    found = []
    for _ in range(3):
        start = time.perf_counter()
        call()
        found.append(time.perf_counter() - start)
    return min(found)


def neighbours(numbers: np.ndarray) -> np.ndarray:
    ordered = np.sort(numbers)
    return ordered[np.append(True, ordered[1:] != ordered[:-1])]


rng = np.random.default_rng(0)
ids = {"drawn": rng.integers(0, 2**60, 1_000_000), "in order": np.arange(1_000_000), "as float64": rng.random(1_000_000)}
times = {}
for name, numbers in ids.items():
    assert np.array_equal(np.unique(numbers), np.unique(numbers, return_counts=True)[0])
    assert np.array_equal(np.unique(numbers), neighbours(numbers))
    bare, unsorted = seconds(lambda: np.unique(numbers)), seconds(lambda: np.unique(numbers, sorted=False))
    counted, compared = seconds(lambda: np.unique(numbers, return_counts=True)), seconds(lambda: neighbours(numbers))
    union = seconds(lambda: np.union1d(numbers[:500_000], numbers[500_000:]))
    times[name] = bare, unsorted, union, counted, compared
    print(f"{name}: unique {bare:.3f} s, sorted=False {unsorted:.3f} s, union1d {union:.3f} s,", end=" ")
    print(f"return_counts {counted:.3f} s, sort and compare {compared:.3f} s")
slow = all(min(times[name][:3]) > 3 * max(times[name][3:]) for name in ("drawn", "in order"))
sys.exit(not (slow and times["as float64"][0] < 3 * times["as float64"][3]))
PYTHON
"$folder/venv/bin/python" "$folder/unique.py" || {
  echo "this has changed"
  exit 1
}

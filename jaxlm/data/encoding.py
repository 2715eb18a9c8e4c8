"""Documents to token ids, many at a time, with what of them is learned and whether they fit a row."""

from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from typing import NamedTuple

import numpy as np

from jaxlm.config import DataConfig
from jaxlm.data.documents import Document, LeftOut
from jaxlm.data.tokenizer import Tokenizer, in_batches
from jaxlm.errors import UserError

# Text in one call of the tokenizers library, and calls at a time: together little enough for memory, and enough for its
# threads to have work while the ids of some calls become arrays, which Python's lock lets one thread do at a time.
BATCH_CHARACTERS, CALLS = 2**18, 8
NOTHING, CUT_AWAY = "with nothing to learn", "with nothing to learn in the first {} tokens (data.max_length)"


class Encoded(NamedTuple):
    """A document's ids, uint16 or uint32 [tokens]; and bool [tokens], which of them are learned (None: all)."""

    ids: np.ndarray
    learned: np.ndarray | None = None
    ends: np.ndarray | None = None  # int64 [tokens], where in the text each ends; None where no part is learned


def encoded(tokenizer: Tokenizer, documents: Iterable[Document]) -> Iterator[tuple[Document, Encoded | UserError]]:
    """Each document, in order, tokenized CALLS batches ahead of where the reader is; or why it can't be."""
    with ThreadPoolExecutor(CALLS) as pool:
        batches = in_batches(documents, lambda document: len(document.text), BATCH_CHARACTERS)
        calls = ((batch, pool.submit(_encode, tokenizer, batch)) for batch in batches)
        begun = deque(islice(calls, CALLS))
        while begun:
            batch, found = begun.popleft()
            begun.extend(islice(calls, 1))
            yield from zip(batch, found.result(), strict=True)


def _encode(tokenizer: Tokenizer, batch: list[Document]) -> list[Encoded | UserError]:
    """The documents of a batch, all of which have parts to learn, or none; or all of which are tokens already."""
    if batch[0].ids is not None:
        return [Encoded(np.ascontiguousarray(document.ids, tokenizer.dtype)) for document in batch]
    try:
        if batch[0].learned is None and not batch[0].complete:
            return [Encoded(ids) for ids in tokenizer.encode_documents([document.text for document in batch])]
        found = tokenizer.encode_with_places([document.text for document in batch])
        return [_with_learned(tokenizer, *both) for both in zip(batch, found, strict=True)]
    except UserError as error:  # of some document in the batch: find out which
        return [error] if len(batch) == 1 else [_encode(tokenizer, [document])[0] for document in batch]


def _with_learned(tokenizer: Tokenizer, document: Document, found: tuple[np.ndarray, np.ndarray]) -> Encoded:
    """Which tokens have a character of an answer in them; a document that ends with <eos> learns to, after an answer.

    Of a text that the tokenizer trims or changes, what is between two tokens belongs to the second.
    """
    ids, places = found
    starts, ends = places[:, 0], np.maximum.accumulate(places[:, 1]) if len(places) else places[:, 1]
    starts = np.minimum(starts, np.concatenate([[0], ends])[: len(ends)])
    learned = None
    if document.learned is not None:
        learned = np.zeros(len(ids), bool)
        for start, end in document.learned:
            learned |= (ends > start) & (starts < end)
    if not document.complete:
        ids = _between(tokenizer.bos_id, ids, tokenizer.eos_id)
        ends = _between(0, ends, len(document.text))
        learned = None if learned is None else _between(False, learned, bool(document.learned))
    return Encoded(ids, learned, ends)


def _between(first: int, x: np.ndarray, last: int) -> np.ndarray:
    """[n] -> [n + 2], in the same dtype."""
    return np.concatenate([[first], x, [last]], dtype=x.dtype, casting="unsafe")


def fitted(document: Document, found: Encoded, data: DataConfig, left_out: LeftOut) -> Encoded | None:
    """A document as data.too_long has it; None, counted in `left_out`, where nothing of it is to be learned.

    A text that is too long stays whole if it is to be cut, for the packing plan to cut into pieces; a conversation ends
    where the row does.

    Raises:
      UserError: it is too long, and data.too_long is error.
    """
    room = data.max_length + 1
    conversation = document.complete or found.learned is not None
    nothing = NOTHING
    if len(found.ids) > room and (conversation or data.too_long != "cut"):
        if data.too_long == "error":
            size = f"has {len(found.ids):,} tokens, and a row sees {room:,} (data.max_length + 1)"
            raise UserError(f"{document.place} {size}; raise data.max_length, or set data.too_long cut or drop")
        if data.too_long == "drop":
            left_out.pass_over(document, f"of more than {room:,} tokens (data.too_long drop)")
            return None
        learned, ends = (None if part is None else part[:room] for part in (found.learned, found.ends))
        found = Encoded(found.ids[:room], learned, ends)
        nothing = CUT_AWAY.format(f"{room:,}")
    if found.learned is not None and not found.learned[1:].any():  # the first token is no target
        left_out.pass_over(document, nothing)
        return None
    return found


def learned_bytes(tokenizer: Tokenizer, document: Document, found: Encoded) -> int:
    """UTF-8 bytes of the text that is learned, special tokens left out."""
    if found.ends is None:
        return len(document.text) if document.text.isascii() else len(document.text.encode())
    limit = int(found.ends[-1])
    parts = [(0, limit)] if document.learned is None else document.learned
    texts = [document.text[start : min(end, limit)] for start, end in parts if start < limit]
    return sum(len(tokenizer.without_special(text).encode()) for text in texts)

"""Text to token arrays on disk, made once: a second run with the same text and settings finds them.

    <cache>/tokenizers/<key>/tokenizer.json    BPE trained on this text
    <cache>/tokens/<key>/<split>.tokens        all documents end to end, each <bos> text <eos>; uint16 or uint32
    <cache>/tokens/<key>/<split>.offsets.npy   int64 [documents + 1], where in it each document begins
    <cache>/tokens/<key>/<split>.bytes.npy     int64 [documents], the length of each document's text in UTF-8
    <cache>/tokens/<key>/<split>.plan-*.npz    packing plans (packing.py)
    <cache>/tokens/<key>/notes.json            {"lines": of the report about the documents, "choices": see `Prepared`}

Of several processes that need the same folder or plan, one makes it and the others wait (atomic.py).
"""

import hashlib
import json
import os
import tempfile
import time
from array import array
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from itertools import groupby, islice
from pathlib import Path
from typing import Any

import numpy as np

from jaxlm.config import DataConfig
from jaxlm.data.atomic import atomic_path
from jaxlm.data.documents import SHOWN, Document, LeftOut
from jaxlm.data.sources import Source, open_source
from jaxlm.data.tokenizer import Tokenizer
from jaxlm.errors import UserError

FORMAT = 3  # raise it when what is stored, or how text becomes tokens, changes
BATCH_CHARACTERS = 2**20  # text tokenized in one call: enough for every thread, little enough for memory
CACHED = "cached"
CALLS = 2  # of the tokenizers library at a time, so that its threads have work while the ids of one call are written

Report = Callable[[str], None]  # takes a line of the report


@dataclass(frozen=True)
class TokenDocuments:
    """The tokenized documents of one split, on disk: <folder>/<split>.*"""

    folder: Path
    split: str
    dtype: np.dtype

    @cached_property
    def tokens(self) -> np.memmap:
        """uint16 or uint32 [tokens]: every document as <bos> text <eos>, end to end."""
        return np.memmap(self.folder / f"{self.split}.tokens", self.dtype, "r")

    @cached_property
    def offsets(self) -> np.ndarray:
        """int64 [documents + 1]: document i is tokens[offsets[i]:offsets[i + 1]]."""
        return np.load(self.folder / f"{self.split}.offsets.npy")

    @cached_property
    def document_bytes(self) -> np.ndarray:
        """int64 [documents]: UTF-8 bytes of each document's text."""
        return np.load(self.folder / f"{self.split}.bytes.npy")

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def kept_bytes(self, min_length: int) -> int:
        """UTF-8 bytes of the text of the documents that have at least `min_length` tokens."""
        return int(self.document_bytes[np.diff(self.offsets) >= min_length].sum())


@dataclass(frozen=True)
class Prepared:
    """The result of `prepare`; None where there is no such part.

    `source_fingerprint` is the source's, and "+" with a word for what else decides the rows: whether short documents
    were passed over for the held-out ones, and whether a text held special tokens.
    """

    tokenizer: Tokenizer
    train: TokenDocuments | None
    validation: TokenDocuments | None
    source_name: str
    source_fingerprint: str


def cache_root(data: DataConfig) -> Path:
    """The folder for everything that can be made again; UserError if it cannot be made, or not be written to."""
    home = os.environ.get("XDG_CACHE_HOME") or "~/.cache"  # set but empty means not set
    root = Path(data.cache_dir if data.cache_dir is not None else f"{home}/jaxlm").expanduser()
    with _writing_to(root):
        root.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=root):
            pass
    return root


def prepare(
    data: DataConfig, vocab_size: int, tokenizer: Tokenizer | None, report: Report, evaluating: bool = False
) -> Prepared:
    """Text to tokenizer and token arrays; uses the cache where it can, and says so.

    Sets the environment variables that bound the threads of the tokenizers library, which reads them at its first use.

    Args:
      data: which text, and how it is split.
      vocab_size: of the BPE to train, if there is no tokenizer yet.
      tokenizer: that of the run to go on with; None: `data.tokenizer_path`, or one trained on the training text.
      report: takes each line about what was done.
      evaluating: only `validation` is wanted, see `open_source`; needs a tokenizer.

    Raises:
      UserError: the text, the tokenizer or the cache folder is not usable.
    """
    os.environ["RAYON_NUM_THREADS"] = str(min(data.preprocessing_num_workers, os.cpu_count() or 1))
    os.environ["TOKENIZERS_PARALLELISM"] = "true"  # else it warns in processes that fork later; ours do not
    root = cache_root(data)
    source = open_source(data, evaluating)
    report(f"text: {source.name}")
    fraction, least = (None, None) if source.split is None else (data.validation_fraction, data.min_length)
    settings = [data.text_column, data.on_bad_document, data.document_separator, fraction]
    if tokenizer is None and data.tokenizer_path is not None:
        tokenizer = Tokenizer.load(data.tokenizer_path, data=data)
    elif tokenizer is None:
        folder = root / "tokenizers" / _key(source.fingerprint, settings, vocab_size)
        tokenizer = _trained_tokenizer(folder, source, vocab_size, report)
    report(f"documents: {tokenizer.token(tokenizer.bos_id)} text {tokenizer.token(tokenizer.eos_id)}")
    folder = root / "tokens" / _key(source.fingerprint, settings, least, [*source.parts], tokenizer.fingerprint)
    took = made_once(folder, lambda part: _tokenize(part, source, tokenizer, data))
    report(f"tokenized text: {took} ({folder})")
    parts, notes = _open_parts(folder, source.parts, tokenizer.dtype)
    for line in notes["lines"]:
        report(line)
    fingerprint = "+".join([source.fingerprint, *notes["choices"]])
    return Prepared(tokenizer, parts.get("train"), parts.get("validation"), source.name, fingerprint)


def made_once(path: Path, fill: Callable[[Path], None]) -> str:
    """Lets `fill` make the file or folder `path` of the cache if it is not there; how long it took, or "cached".

    Raises:
      UserError: it cannot be written.
    """
    start = time.perf_counter()
    if path.exists():
        return CACHED
    with _writing_to(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_path(path) as part:
            if path.exists():  # another process has made it meanwhile
                return CACHED
            fill(part)
    return f"{time.perf_counter() - start:.1f} s"


@contextmanager
def _writing_to(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        reason = error.strerror or error
        raise UserError(f"data.cache_dir ({path}) cannot be written to: {reason}; name another") from error


def _key(*parts: object) -> str:
    return hashlib.sha256(json.dumps([FORMAT, *parts]).encode()).hexdigest()[:32]


def _trained_tokenizer(folder: Path, source: Source, vocab_size: int, report: Report) -> Tokenizer:
    """The BPE trained on the training text, from the cache if it is there."""

    def train(part: Path) -> None:
        texts = (document.text for document in _with_progress(source.parts["train"](), "training BPE"))
        Tokenizer.train(texts, vocab_size).save(part)

    took = made_once(folder, train)
    tokenizer = Tokenizer.load(folder, "cached tokenizer")
    fewer = f" (asked for {vocab_size}; there is too little text)" if tokenizer.vocab_size < vocab_size else ""
    trained = f"trained {tokenizer.vocab_size} tokens{fewer} in {took}"
    report("tokenizer: " + (f"cached ({folder})" if took == CACHED else trained))
    return tokenizer


def _tokenize(folder: Path, source: Source, tokenizer: Tokenizer, data: DataConfig) -> None:
    """Writes the tokens of all parts into `folder`, which it makes."""
    folder.mkdir()
    left_out, markers, choices = dict(source.left_out), Counter[str](), []

    def lengths(documents: Iterator[Document]) -> Iterator[int]:
        return (0 if isinstance(ids, UserError) else len(ids) for _, ids in _encoded(tokenizer, documents))

    if source.split is not None and source.split.pass_over_short(data.min_length, lengths):
        choices.append("long")
    for name, read in source.parts.items():
        untokenizable = left_out[f"tokenizing {name}"] = LeftOut(data)
        offsets, document_bytes = array("q", [0]), array("q")
        with (folder / f"{name}.tokens").open("wb") as file:
            for document, ids in _encoded(tokenizer, _with_progress(read(), f"tokenizing {name}")):
                if isinstance(ids, UserError):
                    untokenizable.add(UserError(f"{document.place} {ids}"))
                    continue
                ids.tofile(file)
                offsets.append(offsets[-1] + len(ids))
                document_bytes.append(len(document.text.encode()))
                markers.update(tokenizer.markers.findall(document.text))
        if not document_bytes:
            raise UserError(f"no document of the {name} text can be tokenized: {untokenizable.first[0]}")
        np.save(folder / f"{name}.offsets.npy", np.array(offsets, np.int64))
        np.save(folder / f"{name}.bytes.npy", np.array(document_bytes, np.int64))
    lines = [line for part, counts in left_out.items() for line in counts.lines(part)]
    tokens = Counter({marker: count for marker, count in markers.items() if marker in tokenizer.special_in_text})
    for found, what in ((tokens, "each read as that token"), (markers - tokens, "read as characters, not as tokens")):
        if found:
            most = ", ".join(f"{marker} ({count:,})" for marker, count in found.most_common(SHOWN))
            cure = "data.document_separator splits documents at one"
            lines.append(f"{found.total():,} markers stand in the text: {most}; {what} ({cure})")
    choices += ["special"] * bool(tokens)
    (folder / "notes.json").write_text(json.dumps({"lines": lines, "choices": choices}))


Ids = np.ndarray | UserError  # of a document, or the reason why it has none


def _encoded(tokenizer: Tokenizer, documents: Iterable[Document]) -> Iterator[tuple[Document, Ids]]:
    """Each document, in order, with its ids; tokenized CALLS batches ahead of where the reader is."""
    with ThreadPoolExecutor(CALLS) as pool:
        calls = ((batch, pool.submit(_encode, tokenizer, batch)) for batch in _batches(documents))
        begun = deque(islice(calls, CALLS))
        while begun:
            batch, ids = begun.popleft()
            begun.extend(islice(calls, 1))
            yield from zip(batch, ids.result(), strict=True)


def _encode(tokenizer: Tokenizer, batch: list[Document]) -> list[Ids]:
    try:
        return [*tokenizer.encode_documents([document.text for document in batch])]
    except UserError as error:  # of some document in the batch: find out which
        return [error] if len(batch) == 1 else [_encode(tokenizer, [document])[0] for document in batch]


def _batches(documents: Iterable[Document]) -> Iterator[list[Document]]:
    characters = 0

    def number(document: Document) -> int:
        nonlocal characters
        characters += len(document.text) + 16  # so that a batch of tiny texts ends too
        return characters // BATCH_CHARACTERS

    return (list(batch) for _, batch in groupby(documents, number))


def _with_progress(documents: Iterable[Document], description: str) -> Iterable[Document]:
    """`documents`, with a bar on stderr if that is a terminal."""
    from tqdm import tqdm

    return tqdm(documents, description, unit=" documents", unit_scale=True, disable=None, leave=False)


def _open_parts(folder: Path, names: Iterable[str], dtype: np.dtype) -> tuple[dict[str, TokenDocuments], Any]:
    """The documents of each part, and what notes.json holds."""
    parts = {name: TokenDocuments(folder, name, dtype) for name in names}
    try:
        notes = json.loads((folder / "notes.json").read_text())
        if not all(len(d.tokens) == d.offsets[-1] and len(d.document_bytes) == len(d) for d in parts.values()):
            raise ValueError("files of different lengths")
    except (OSError, EOFError, ValueError) as error:
        raise UserError(f"cached tokens ({folder}) are damaged ({error}); delete that folder") from error
    return parts, notes

"""Text to token arrays on disk, made once: a second run with the same text and settings finds them.

    <cache>/tokenizers/<key>/tokenizer.json    BPE trained on this text
    <cache>/tokens/<key>/<split>.tokens        all documents end to end, each <bos> text <eos>; uint16 or uint32
    <cache>/tokens/<key>/<split>.offsets.npy   int64 [documents + 1], where in it each document begins
    <cache>/tokens/<key>/<split>.bytes.npy     int64 [documents], the length of each document's text in UTF-8
    <cache>/tokens/<key>/<split>.plan-*.npz    packing plans (packing.py)
    <cache>/tokens/<key>/left_out.json         what was left out of the text, in words

A folder is made under another name and renamed when it is complete, so what is found is always whole.
"""

import hashlib
import json
import os
import shutil
import tempfile
import time
from array import array
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

from jaxlm.config import DataConfig
from jaxlm.data.documents import Document, LeftOut
from jaxlm.data.sources import Source, open_source
from jaxlm.data.tokenizer import Tokenizer
from jaxlm.errors import UserError

FORMAT = 2  # raise it when what is stored, or how text becomes tokens, changes
SPLITS = ("train", "validation")
BATCH_CHARACTERS = 2**20  # text tokenized in one call: enough for every thread, little enough for memory
CALLS = 2  # of the tokenizers library at a time, so that its threads have work while the ids of one call are written


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

    @property
    def utf8_bytes(self) -> int:
        """UTF-8 bytes of the text of all documents."""
        return int(self.document_bytes.sum())

    def kept_bytes(self, min_length: int) -> int:
        """UTF-8 bytes of the text of the documents that have at least `min_length` tokens."""
        return int(self.document_bytes[np.diff(self.offsets) >= min_length].sum())


@dataclass(frozen=True)
class Prepared:
    """What `prepare` returns."""

    tokenizer: Tokenizer
    train: TokenDocuments
    validation: TokenDocuments
    source_name: str
    source_fingerprint: str


def cache_root(data: DataConfig) -> Path:
    """The folder for everything that can be made again; it exists and can be written to.

    Raises:
      UserError: it cannot be made, or not be written to.
    """
    home = os.environ.get("XDG_CACHE_HOME") or "~/.cache"  # set but empty means not set
    root = Path(data.cache_dir if data.cache_dir is not None else f"{home}/jaxlm").expanduser()
    with _writing_to(root):
        root.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=root):
            pass
    return root


@contextmanager
def prepared_once(data: DataConfig) -> Iterator[None]:
    """While entered, other processes that prepare text in the same cache wait; what they need is there then."""
    from filelock import FileLock

    with FileLock(cache_root(data) / "preparing.lock"):
        yield


def prepare(data: DataConfig, vocab_size: int, tokenizer: Tokenizer | None, report: Callable[[str], None]) -> Prepared:
    """Text to tokenizer and token arrays; uses the cache where it can, and says so.

    Args:
      data: which text, and how it is split.
      vocab_size: of the BPE to train, if there is no tokenizer yet.
      tokenizer: that of the run to go on with; none: `data.tokenizer_path`, or one trained on the training text.
      report: takes each line about what was done.

    Raises:
      UserError: the text, the tokenizer or the cache folder is not usable.
    """
    # Read by the tokenizers library when it first starts threads; nothing of ours forks after that.
    os.environ["RAYON_NUM_THREADS"] = str(min(data.preprocessing_num_workers, os.cpu_count() or 1))
    os.environ["TOKENIZERS_PARALLELISM"] = "true"
    root = cache_root(data)
    source = open_source(data)
    report(f"text: {source.name}")
    split = _split_settings(data)
    if tokenizer is None:
        if data.tokenizer_path is not None:
            tokenizer = Tokenizer.load(data.tokenizer_path)
        else:
            folder = root / "tokenizers" / _key(source.fingerprint, split, vocab_size)
            tokenizer = _trained(folder, source, vocab_size, report)
    folder = root / "tokens" / _key(source.fingerprint, split, tokenizer.fingerprint)
    if folder.is_dir():
        report(f"tokenized text: cached ({folder})")
    else:
        start = time.perf_counter()
        _tokenize(folder, source, tokenizer, data)
        report(f"tokenized text: {time.perf_counter() - start:.1f} s ({folder})")
    for line in _left_out(folder):
        report(line)
    train, validation = (_open(folder, name, tokenizer.dtype) for name in SPLITS)
    return Prepared(tokenizer, train, validation, source.name, source.fingerprint)


def _split_settings(data: DataConfig) -> list[str | float | None]:
    """What decides, beside the content of the source, which text is in which split."""
    own = data.train_files or data.dataset_name == "python-stdlib"
    held_out = not data.validation_files if own else data.validation_split is None
    return [data.text_column, data.on_bad_document, data.validation_fraction if held_out else None]


def _key(*parts: object) -> str:
    return hashlib.sha256(json.dumps([FORMAT, *parts]).encode()).hexdigest()[:32]


def _trained(folder: Path, source: Source, vocab_size: int, report: Callable[[str], None]) -> Tokenizer:
    """The BPE trained on the training text, from the cache if it is there."""
    if folder.is_dir():
        report(f"tokenizer: cached ({folder})")
        return Tokenizer.load(folder, "cached tokenizer")
    start = time.perf_counter()
    texts = (document.text for document in _with_progress(source.train(), "training BPE"))
    tokenizer = Tokenizer.train(texts, vocab_size)
    with _writing_to(folder), _complete_or_absent(folder) as part:
        tokenizer.save(part)
    fewer = f" (asked for {vocab_size}; there is too little text)" if tokenizer.vocab_size < vocab_size else ""
    report(f"tokenizer: trained {tokenizer.vocab_size} tokens{fewer} in {time.perf_counter() - start:.1f} s")
    return tokenizer


def _tokenize(folder: Path, source: Source, tokenizer: Tokenizer, data: DataConfig) -> None:
    parts = dict(source.left_out)
    with _writing_to(folder), _complete_or_absent(folder) as part:
        for name, documents in zip(SPLITS, (source.train(), source.validation()), strict=True):
            untokenizable = parts[f"tokenizing {name}"] = LeftOut(data)
            offsets, document_bytes = array("q", [0]), array("q")
            with (part / f"{name}.tokens").open("wb") as file:
                batches = _batches(_with_progress(documents, f"tokenizing {name}"))
                for document, ids in _encoded(tokenizer, batches, untokenizable):
                    ids.tofile(file)
                    offsets.append(offsets[-1] + len(ids))
                    document_bytes.append(len(document.text.encode()))
            if not document_bytes:
                raise UserError(f"no document of the {name} text can be tokenized: {untokenizable.first[0]}")
            np.save(part / f"{name}.offsets.npy", np.array(offsets, np.int64))
            np.save(part / f"{name}.bytes.npy", np.array(document_bytes, np.int64))
        lines = [line for name, left_out in parts.items() for line in left_out.lines(name)]
        (part / "left_out.json").write_text(json.dumps(lines))


Encoded = tuple[Document, np.ndarray]  # a document with its ids


def _encoded(tokenizer: Tokenizer, batches: Iterable[list[Document]], untokenizable: LeftOut) -> Iterator[Encoded]:
    """The documents of all batches in order, several batches ahead of where the reader is."""
    with ThreadPoolExecutor(CALLS) as pool:
        begun: deque[tuple[list[Document], Future[list[np.ndarray]]]] = deque()
        for batch in batches:
            begun.append((batch, pool.submit(_ids, tokenizer, batch)))
            if len(begun) > CALLS:
                yield from _taken(tokenizer, *begun.popleft(), untokenizable)
        while begun:
            yield from _taken(tokenizer, *begun.popleft(), untokenizable)


def _ids(tokenizer: Tokenizer, batch: list[Document]) -> list[np.ndarray]:
    return tokenizer.encode_documents([document.text for document in batch])


def _taken(
    tokenizer: Tokenizer, batch: list[Document], begun: Future[list[np.ndarray]], untokenizable: LeftOut
) -> Iterator[Encoded]:
    """What was begun; where that failed, documents that cannot be tokenized are found one by one, and left out."""
    try:
        all_ids = begun.result()
    except UserError:
        for document in batch:
            try:
                (ids,) = _ids(tokenizer, [document])
            except UserError as error:
                untokenizable.add(f"{document.place} {error}")
            else:
                yield document, ids
    else:
        yield from zip(batch, all_ids, strict=True)


def _left_out(folder: Path) -> list[str]:
    try:
        return json.loads((folder / "left_out.json").read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"cached tokens ({folder}) cannot be read ({error}); delete that folder") from error


def _open(folder: Path, split: str, dtype: np.dtype) -> TokenDocuments:
    documents = TokenDocuments(folder, split, dtype)
    try:
        complete = len(documents.tokens) == documents.offsets[-1] and len(documents.document_bytes) == len(documents)
    except (OSError, ValueError) as error:
        raise UserError(f"cached tokens ({folder}) cannot be read ({error}); delete that folder") from error
    if not complete:
        raise UserError(f"cached tokens ({folder}) are damaged; delete that folder")
    return documents


def _batches(documents: Iterable[Document]) -> Iterator[list[Document]]:
    batch: list[Document] = []
    characters = 0
    for document in documents:
        batch.append(document)
        characters += len(document.text) + 16  # so that a batch of tiny texts ends too
        if characters >= BATCH_CHARACTERS:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch


def _with_progress(documents: Iterable[Document], what: str) -> Iterator[Document]:
    """`documents`, with a bar on stderr if that is a terminal."""
    from tqdm import tqdm

    with tqdm(desc=what, unit="char", unit_scale=True, disable=None, leave=False) as bar:
        for document in documents:
            yield document
            bar.update(len(document.text))


@contextmanager
def _complete_or_absent(folder: Path) -> Iterator[Path]:
    """A new folder to fill, which becomes `folder` when all went well, unless another process was faster."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    part = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    try:
        yield part
        for path in [*part.iterdir(), part]:
            descriptor = os.open(path, os.O_RDONLY)
            os.fsync(descriptor)
            os.close(descriptor)
        part.chmod(0o755)  # mkdtemp's folders are private; a cache may be shared
        try:
            part.rename(folder)
        except OSError:
            if not folder.is_dir():
                raise
    finally:
        shutil.rmtree(part, ignore_errors=True)


@contextmanager
def _writing_to(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise UserError(
            f"data.cache_dir ({folder}) cannot be written to: {error.strerror or error}; name another"
        ) from error

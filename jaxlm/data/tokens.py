"""Text to token arrays on disk, made once: a second run with the same text and settings finds them, and
one that follows a killed one goes on (shards.py).

    <cache>/tokenizers/<key>/tokenizer.json    BPE trained on this text
    <cache>/tokens/<key>/<split>.tokens        all documents end to end, each <bos> text <eos>; uint16 or uint32
    <cache>/tokens/<key>/<split>.offsets.npy   int64 [documents + 1], where in it each document begins
    <cache>/tokens/<key>/<split>.bytes.npy     int64 [documents], the length in UTF-8 of what is learned of each
    <cache>/tokens/<key>/<split>.learned       bool, one for each token: whether it is; where not all are
    <cache>/tokens/<key>/<split>.plan-*.npz    packing plans (packing.py)
    <cache>/tokens/<key>/notes.json            {"lines": of the report about the documents, "choices": see `Prepared`}
    <cache>/tokens/<key>.shards/train-*        with data.streaming: shards.py; and at the end notes.json, "shards" in it

Of several processes that need the same folder or plan, one makes it and the others wait (atomic.py).
"""

import hashlib
import json
import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from itertools import chain, combinations
from pathlib import Path
from typing import Any

import numpy as np

from jaxlm.config import DataConfig
from jaxlm.data import shards
from jaxlm.data.atomic import atomic_path, check_writable, shared_part
from jaxlm.data.chat_tokens import why_it_will_not_stop, with_template
from jaxlm.data.handed_over import HandedOver
from jaxlm.data.sources import Source, open_source
from jaxlm.data.tokenizer import Tokenizer
from jaxlm.data.tokenizing import NOTES, Report, join, make_shards, notes, with_progress
from jaxlm.errors import UserError

FORMAT = 3  # raise it when what is stored, or how text becomes tokens, changes
CACHED = "cached"


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
        """int64 [documents]: UTF-8 bytes of what is learned of each document's text."""
        return np.load(self.folder / f"{self.split}.bytes.npy")

    @cached_property
    def learned(self) -> np.memmap | None:
        """bool [tokens]: which are learned; None: all."""
        path = self.folder / f"{self.split}.learned"
        return np.memmap(path, bool, "r") if path.exists() else None

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def kept_bytes(self, min_length: int) -> int:
        """UTF-8 bytes of the text of the documents that have at least `min_length` tokens."""
        return int(self.document_bytes[np.diff(self.offsets) >= min_length].sum())


@dataclass(frozen=True)
class Streamed:
    """A training text with data.streaming, whose tokens `streaming` makes.

    `fingerprint` is that of its source.
    """

    folder: Path
    tokenizer: Tokenizer
    fingerprint: str


@dataclass(frozen=True)
class Prepared:
    """A text as `prepare` makes it; None where there is no such part.

    `source_fingerprint` is the source's, and "+" with a word for what else decides the rows: whether short documents
    were passed over for the held-out ones, whether a text held special tokens, and which chat template was used.
    """

    tokenizer: Tokenizer
    train: TokenDocuments | Streamed | None
    validation: TokenDocuments | None
    source_name: str
    source_fingerprint: str
    question: list[dict[str, Any]] | None = None  # the messages before the first answer, in conversations
    files: Mapping[bytes, Path] = field(default_factory=dict)  # as the source has them


def cache_root(data: DataConfig) -> Path:
    """The folder for everything that can be made again; UserError if it cannot be made, or not be written to."""
    home = os.environ.get("XDG_CACHE_HOME") or "~/.cache"  # set but empty means not set
    root = Path(data.cache_dir if data.cache_dir is not None else f"{home}/jaxlm").expanduser()
    with _writing_to(root):
        root.mkdir(parents=True, exist_ok=True)
        check_writable(root)
    return root


def prepare(
    data: DataConfig,
    vocab_size: int,
    tokenizer: Tokenizer | None,
    report: Report,
    evaluating: bool = False,
    given: HandedOver | None = None,
) -> Prepared:
    """`prepare_all` of one text."""
    return prepare_all({"": data}, vocab_size, tokenizer, report, evaluating, given)[""]


def prepare_all(
    texts: Mapping[str, DataConfig],
    vocab_size: int,
    tokenizer: Tokenizer | None,
    report: Report,
    evaluating: bool = False,
    given: HandedOver | None = None,
) -> dict[str, Prepared]:
    """Texts to one tokenizer and to token arrays for each; uses the cache where it can, and says so.

    Sets the environment variables that bound the threads of the tokenizers library, which reads them at its first use.

    Args:
      texts: by name ("" where there is one), what each is and how it is split; otherwise their options are the same.
      vocab_size: of the BPE to train, if there is no tokenizer yet.
      tokenizer: that of the run to go on with; None: `data.tokenizer_path`, or one trained on all training text.
      report: takes each line about what was done.
      evaluating: only `validation` is wanted, see `open_source`; needs a tokenizer.

    Raises:
      UserError: a text, the tokenizer or the cache folder is not usable.
    """
    data = next(iter(texts.values()))
    os.environ["RAYON_NUM_THREADS"] = str(min(data.preprocessing_num_workers, os.cpu_count() or 1))
    os.environ["TOKENIZERS_PARALLELISM"] = "true"  # else it warns in processes that fork later; ours do not
    root = cache_root(data)
    if tokenizer is None and data.tokenizer_path is not None:
        tokenizer = Tokenizer.load(data.tokenizer_path, data=data)
    sources = {name: open_source(each, evaluating, tokenizer, given) for name, each in texts.items()}
    if data.sources and not evaluating:
        _check_mixture(sources, data)
    for name, source in sources.items():
        reporter(report, name)(f"text: {source.name}")
    if tokenizer is None:
        about = [part for source in sources.values() for part in (source.fingerprint, _settings(source, data))]
        folder = root / "tokenizers" / _key(*about, vocab_size)
        tokenizer = _trained_tokenizer(folder, sources.values(), vocab_size, report)
    template = next((each.format.template for each in sources.values() if each.format.template is not None), None)
    if template is not None:
        tokenizer = with_template(tokenizer, template)
        if doubt := why_it_will_not_stop(template, tokenizer):
            report(f"warning: {doubt}")
    prepared = partial(_prepared, tokenizer=tokenizer, root=root)
    return {name: prepared(each, texts[name], report=reporter(report, name)) for name, each in sources.items()}


def _check_mixture(sources: Mapping[str, Source], data: DataConfig) -> None:
    """Raises UserError if sources have a file in common, or options that fit none of them, or not all."""
    for (name, one), (other, two) in combinations(sources.items(), 2):
        if both := one.files.keys() & two.files.keys():
            file = one.files[min(both)]
            raise UserError(f"data.sources ({name}, {other}): both have {file}, or a copy of it; leave it out of one")
    kinds = {each.format.kind for each in sources.values()}
    if data.chat_template is not None and not any(each.format.template for each in sources.values()):
        raise UserError(f"data.chat_template ({data.chat_template}): no source holds conversations; leave it out")
    if data.validation_files and len(kinds) > 1:
        named = f"data.validation_files ({', '.join(data.validation_files)})"
        raise UserError(f"{named} can't be of {' and '.join(sorted(kinds))}, as data.sources are; leave it out")


def reporter(report: Report, name: str) -> Report:
    """`report` for the lines about the source `name`, which is put before them; "": the only one."""
    return (lambda line: report(f"{name}: {line}")) if name else report


def _settings(source: Source, data: DataConfig) -> list[Any]:
    """What beside the content of the text decides its documents."""
    fraction = None if source.split is None else data.validation_fraction
    settings = [data.text_column, data.on_bad_document, data.document_separator, fraction]
    if source.format.kind == "text":
        return settings
    template = source.format.template
    return [*settings, source.format.fingerprint, None if template is None else template.fingerprint]


def _prepared(source: Source, data: DataConfig, tokenizer: Tokenizer, root: Path, report: Report) -> Prepared:
    least, template = None if source.split is None else data.min_length, source.format.template
    fit = [data.too_long, data.max_length] if source.format.kind != "text" or data.too_long != "cut" else []
    settings = _settings(source, data) + fit
    report(_shape_of_documents(tokenizer, source))
    choices = [] if template is None else [template.fingerprint[:16]]
    streamed, parts = None, dict[str, TokenDocuments]()
    if data.streaming and "train" in source.parts:
        key = _key(source.fingerprint, settings, least, tokenizer.fingerprint, shards.SHARD_CHARACTERS)
        streamed = Streamed(root / "tokens" / f"{key}.shards", tokenizer, source.fingerprint)
        choices.append(f"shards of {shards.SHARD_CHARACTERS}")
        with _writing_to(streamed.folder):
            streamed.folder.mkdir(parents=True, exist_ok=True)
    if now := {name: part for name, part in source.parts.items() if streamed is None or name != "train"}:
        folder = root / "tokens" / _key(source.fingerprint, settings, least, [*now], tokenizer.fingerprint)
        took = _tokenized(folder, replace(source, parts=now), tokenizer, data, report)
        report(f"tokenized text: {took} ({folder})")
        parts, told = _open_parts(folder, now, tokenizer.dtype)
        for line in told["lines"]:
            report(line)
        choices = told["choices"] + choices
    fingerprint = "+".join([source.fingerprint, *choices])
    train = streamed or parts.get("train")
    texts = train, parts.get("validation")
    return Prepared(tokenizer, *texts, source.name, fingerprint, source.question, source.files)


def _tokenized(folder: Path, source: Source, tokenizer: Tokenizer, data: DataConfig, report: Report) -> str:
    """Makes the folder of tokens, beside other processes that may be at the same; how long it took, or "cached"."""
    start, joined = time.perf_counter(), lambda part: None
    if folder.exists():
        return CACHED
    with _writing_to(folder):
        folder.parent.mkdir(parents=True, exist_ok=True)
        try:
            with shared_part(folder) as part:
                if folder.exists():  # another process has made it meanwhile
                    part.rmdir()
                elif not (
                    part / NOTES
                ).exists():  # else a start was killed when all was there, but for the folder's name
                    made = make_shards(part, source, tokenizer, data, report)
                    joined = partial(join, made=made, text=notes(made, source, tokenizer, data))
        except FileNotFoundError as error:
            if not folder.exists():
                gone = f"the tokens in {part} were removed by another process, which found a fault in the text"
                raise UserError(f"{gone}; see what it says, or start again") from error
    made_once(folder, joined, goes_on=True)
    shards.clear(folder)
    return f"{time.perf_counter() - start:.1f} s"


def _shape_of_documents(tokenizer: Tokenizer, source: Source) -> str:
    """A line about what stands around the text of a document."""
    if source.format.kind == "tokens":
        return "documents: token ids, as they stand"
    ends = f"{tokenizer.token(tokenizer.bos_id)} text {tokenizer.token(tokenizer.eos_id)}"
    template = source.format.template
    return f"documents: {ends}" if template is None else f"documents: conversations by {template.where}"


def made_once(path: Path, fill: Callable[[Path], None], goes_on: bool = False) -> str:
    """Lets `fill` make the file or folder `path` of the cache if it is not there; how long it took, or "cached".

    With `goes_on` it is given what a call that did not get to its end has left.

    Raises:
      UserError: it cannot be written.
    """
    start = time.perf_counter()
    if path.exists():
        return CACHED
    with _writing_to(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_path(path, goes_on) as part:
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


def _trained_tokenizer(folder: Path, sources: Iterable[Source], vocab_size: int, report: Report) -> Tokenizer:
    """The BPE trained on the training text, from the cache if it is there."""

    def train(part: Path) -> None:
        documents = chain.from_iterable(
            with_progress(source.parts["train"](), "training BPE", report, source.characters("train"), shards.Counts())
            for source in sources
        )
        without = Tokenizer.outside_markers
        texts = (without(document.text) if document.complete else document.text for document in documents)
        Tokenizer.train(texts, vocab_size).save(part)

    took = made_once(folder, train)
    tokenizer = Tokenizer.load(folder, "cached tokenizer")
    fewer = f" (asked for {vocab_size}; there is too little text)" if tokenizer.vocab_size < vocab_size else ""
    trained = f"trained {tokenizer.vocab_size} tokens{fewer} in {took}"
    report("tokenizer: " + (f"cached ({folder})" if took == CACHED else trained))
    return tokenizer


def _open_parts(folder: Path, names: Iterable[str], dtype: np.dtype) -> tuple[dict[str, TokenDocuments], Any]:
    """The documents of each part, and what notes.json holds."""
    parts = {name: TokenDocuments(folder, name, dtype) for name in names}
    try:
        notes = json.loads((folder / NOTES).read_text())
        for part in parts.values():
            sizes = {part.offsets[-1], len(part.tokens), *(() if part.learned is None else [len(part.learned)])}
            if len(sizes) > 1 or len(part.document_bytes) != len(part):
                raise ValueError("files of different lengths")
    except (OSError, EOFError, ValueError) as error:
        raise UserError(f"cached tokens ({folder}) are damaged ({error}); delete that folder") from error
    return parts, notes

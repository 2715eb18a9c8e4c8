"""Where the text comes from: a program, the standard library, own files, or the Hugging Face Hub.

Nothing here keeps a text in memory, but that of the standard library: a source is read again, from the start, each
time that its text is asked for.
"""

import hashlib
import platform
import sysconfig
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

from jaxlm.config import DataConfig
from jaxlm.config.schema import PYTHON, STDLIB
from jaxlm.data import files, hub
from jaxlm.data.documents import Document, Documents, Found, LeftOut, RowFormat
from jaxlm.data.formats import choose_format, columns_that_tell, first_question
from jaxlm.data.handed_over import HandedOver, PythonRows
from jaxlm.data.held_out import HeldOut
from jaxlm.data.tokenizer import Tokenizer
from jaxlm.errors import UserError

PARTS = "train", "validation"
_NOT_STDLIB = {"site-packages", "dist-packages", "test", "tests", "idlelib", "__pycache__"}


@dataclass(frozen=True)
class Source:
    """Text in documents.

    Attributes:
      name: a description, for people.
      fingerprint: changes with the content (not with the names or dates of files).
      parts: of "train" and "validation" those that there are; each call starts a new pass over the part.
      split: what held the one out of the other; None: they are texts of their own.
      left_out: {part of the text: the counts of what the latest pass over it left out}.
      format: what its rows are.
      question: the messages before the first answer; None: there are none.
      sizes: about how many characters each part has before any of it is held out; None: not known.
      files: that are trained on, or evaluated, by their SHA-256; none where the text is no files of the user's.
    """

    name: str
    fingerprint: str
    parts: dict[str, Documents]
    split: HeldOut | None
    left_out: dict[str, LeftOut]
    format: RowFormat
    question: list[dict[str, Any]] | None
    sizes: dict[str, int | None]
    files: dict[bytes, Path] = field(default_factory=dict)

    def documents(self) -> Iterator[Document]:
        """A new pass over all `parts`: over the text once, where one is held out of the other."""
        if self.split is not None:
            return (document for document in self.split.both() if document.part in self.parts)
        return chain.from_iterable(documents() for documents in self.parts.values())

    def characters(self, part: str) -> int | None:
        """About how many characters a part has; None: that is not known. Reads the text where some is held out."""
        return self.sizes[part] if self.split is None else self.split.characters(part)


def open_source(
    data: DataConfig,
    evaluating: bool = False,
    tokenizer: Tokenizer | None = None,
    given: HandedOver | None = None,
) -> Source:
    """The text that `data` names. Local files are looked up and hashed here; their content is checked while it is read.

    Args:
      evaluating: only "validation" is wanted: where nothing is held out, all of the text; where a data set has no split
        of the default name, the one to train on.
      tokenizer: whose chat template conversations have; None: one will be trained.
      given: the text itself, where data.dataset_name says that a program hands it over.

    Raises:
      UserError: the text cannot be had, or (while it is read, too) is not what it should be.
    """
    if given is not None:
        return _from_python(data, tokenizer, given)
    if data.train_files:  # of a run, or of one of its sources
        return _own_files(data, tokenizer, evaluating)
    if data.dataset_name == STDLIB:
        return _standard_library(data, tokenizer, evaluating)
    if data.dataset_name == PYTHON:
        how = "evaluate on files (--files)" if evaluating else "go on where Trainer(config, train_dataset=...) gets it"
        raise UserError(f"data.dataset_name ({PYTHON}): the text was handed over by a program and is not here; {how}")
    return _hub(data, tokenizer, evaluating)


class _Part(NamedTuple):
    """A part of a source."""

    where: str  # begins messages
    fingerprint: str  # changes with the content
    first: Callable[[], Mapping[str, Any] | None]  # the first row; None: it is plain text
    read: Callable[[RowFormat], Found]
    size: int | None = None  # about how many characters; None: not known


def _source(
    data: DataConfig,
    tokenizer: Tokenizer | None,
    name: str,
    train: _Part | None,
    validation: _Part | None,
    evaluating: bool,
) -> Source:
    """`train` and `validation` without what is left out; without `validation`, a part of `train` is held out."""
    splits = train is not None and validation is None and data.validation_fraction > 0
    if evaluating and validation is None and not splits:
        train, validation = None, train
    given = {"train": train, "validation": validation}
    parts = {part: found for part, found in given.items() if found is not None}
    main = next(iter(parts.values()))
    first = None if data.format == "text" else main.first()
    format_ = choose_format(data, first, main.where, tokenizer, evaluating)
    if data.sources and format_.kind != "text":
        data = replace(data, document_separator=None)  # which is for the sources of text
    labels = {"train": "text" if splits else "training text", "validation": "held-out text"}
    left_out = {labels[part]: LeftOut(data) for part in parts}
    documents = {
        part: partial(left_out[labels[part]].good, partial(found.read, format_), found.where, part)
        for part, found in parts.items()
    }
    sizes = {part: None if data.max_documents else found.size for part, found in parts.items()}
    about = left_out, format_, first_question(format_, first), sizes
    fingerprint = "-".join(found.fingerprint for found in parts.values())
    if data.max_documents is not None:
        name, fingerprint = f"{name}, {data.max_documents:,} documents at most", f"{fingerprint}+{data.max_documents}"
    if not splits:
        return Source(name, fingerprint, {**documents}, None, *about)
    split = HeldOut(documents["train"], data.validation_fraction, parts["train"].where, format_.kind == "text")
    name += f", {data.validation_fraction:g} of it held out"
    return Source(name, fingerprint, {part: partial(split.of, part) for part in PARTS}, split, *about)


def _from_python(data: DataConfig, tokenizer: Tokenizer | None, given: HandedOver) -> Source:
    def part(rows: PythonRows) -> tuple[str, _Part]:
        count, fingerprint = rows.measured(data)
        return f"{count:,} rows of {rows.name}", _Part(rows.name, fingerprint, rows.first, rows.read)

    rows = PythonRows(given.train, "train_dataset", data)
    if given.validation is None:
        return _source(data, tokenizer, *part(rows), None, evaluating=False)
    (held_out, validation), (name, train) = part(PythonRows(given.validation, "eval_dataset", data)), part(rows)
    return _source(data, tokenizer, f"{name}, held out: {held_out}", train, validation, evaluating=False)


def _own_files(data: DataConfig, tokenizer: Tokenizer | None, evaluating: bool) -> Source:
    def part(patterns: tuple[str, ...], field: str) -> tuple[str, dict[bytes, Path], _Part]:
        paths, name = files.find_files(patterns, field)
        fingerprint, digests = files.hash_files(paths, field)
        first = partial(files.first_row, paths, columns_that_tell(data), field)
        read = partial(files.read_files, paths, field=field)
        return name, digests, _Part(f"{field} ({name})", fingerprint, first, read, files.text_size(paths))

    own = "data.sources" if data.sources else "data.train_files"
    if not data.validation_files:
        name, digests, train = part(data.train_files, own)
        return replace(_source(data, tokenizer, name, train, None, evaluating), files=digests)
    held_out, validated, validation = part(data.validation_files, "data.validation_files")
    if evaluating:
        return replace(_source(data, tokenizer, held_out, None, validation, evaluating), files=validated)
    name, trained, train = part(data.train_files, own)
    if both := validated.keys() & trained.keys():
        file, same = validated[min(both)], trained[min(both)]
        also = "" if file == same else f", as {same}"
        raise UserError(f"data.validation_files ({file}): is in {own}, too{also}; leave it out of one")
    source = _source(data, tokenizer, f"{name}, held out: {held_out}", train, validation, evaluating)
    return replace(source, files=trained)


def _hub(data: DataConfig, tokenizer: Tokenizer | None, evaluating: bool) -> Source:
    where = f"data.dataset_name ({data.dataset_name})"

    def part(split: str, field: str) -> _Part:
        rows = hub.load_split(builder, split, field)
        told = [name for name in columns_that_tell(data) if name in rows.column_names]
        first, read = partial(hub.first_row, rows, told), partial(hub.read_split, rows, split, where=f"{where} {split}")
        return _Part(f"{where} {split}", rows._fingerprint, first, read, rows.data.nbytes)

    name, builder = hub.prepare(data.dataset_name, data.dataset_config, where)
    held_out = data.validation_split
    if evaluating and held_out == DataConfig.validation_split and held_out not in (builder.info.splits or ()):
        held_out, data = None, replace(data, validation_fraction=0)
    validation = None if held_out is None else part(held_out, "data.validation_split")
    train = None if evaluating and validation else part(data.dataset_split, "data.dataset_split")
    if evaluating:
        name += f" {held_out or data.dataset_split}"
    return _source(data, tokenizer, name, train, validation, evaluating)


def _standard_library(data: DataConfig, tokenizer: Tokenizer | None, evaluating: bool) -> Source:
    where, root = f"data.dataset_name ({STDLIB})", Path(sysconfig.get_path("stdlib"))
    paths, digest = [path for path in files.below(root, _NOT_STDLIB) if path.suffix == ".py"], hashlib.sha256()
    if not paths:
        raise UserError(f"{where}: no Python source files in {root}; use data.train_files")
    rows, size = [], 0  # kept, as they are few: opening hundreds of small files takes longer than reading them
    for path in paths:
        with files.reading(f"{where}: {path}"):
            content = path.read_bytes()
        digest.update(len(content).to_bytes(8, "big") + content)
        size += len(content)
        rows.append(Document(files.text_of(content), f"{where}: {path}"))

    def read(format_: RowFormat) -> Found:
        return iter(rows)

    name = f"{STDLIB} {platform.python_version()} ({len(paths)} files)"
    train = _Part(where, digest.hexdigest(), lambda: None, read, size)
    return _source(data, tokenizer, name, train, None, evaluating)

"""Where the text comes from: the standard library, own files, or the Hugging Face Hub.

Nothing here keeps the text in memory: a source is read again, from the start, each time that its text is asked for.
"""

import hashlib
import os
import platform
import sysconfig
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NamedTuple

from jaxlm.config import DataConfig
from jaxlm.data import files, hub
from jaxlm.data.documents import Document, Documents, LeftOut
from jaxlm.data.held_out import HeldOut
from jaxlm.errors import UserError

STDLIB = "python-stdlib"
_NOT_STDLIB = {"site-packages", "dist-packages", "test", "tests", "idlelib", "__pycache__"}


@dataclass(frozen=True)
class Source:
    """Text in documents. `train()` and `validation()` each start a new pass over their part.

    Attributes:
      name: a description, for people.
      fingerprint: changes with the content (not with the names or dates of files).
      left_out: {part of the text: the counts of what the latest pass over it left out}.
    """

    name: str
    fingerprint: str
    train: Documents
    validation: Documents
    left_out: dict[str, LeftOut]


def open_source(data: DataConfig) -> Source:
    """The text that `data` names. Local files are looked up and hashed here; their content is checked while it is read.

    Raises:
      UserError: the text cannot be had, or (from `train()` and `validation()` too) is not what it should be.
    """
    if data.train_files:
        return _own_files(data)
    if data.dataset_name == STDLIB:
        return _standard_library(data)
    return _hub(data)


class _Part(NamedTuple):
    """A part of a source: a hash of its content, and the function that reads it."""

    fingerprint: str
    read: Callable[[LeftOut], Iterator[Document]]


def _source(data: DataConfig, name: str, where: str, train: _Part, validation: _Part | None) -> Source:
    """`train` and `validation` without their empty documents; without `validation`, a part of `train` is held out."""

    def documents(part: _Part, left_out: LeftOut) -> Documents:
        return partial(left_out.non_empty, partial(part.read, left_out))

    left_out, held_out = LeftOut(data), LeftOut(data)
    if validation is None:
        split = HeldOut(documents(train, left_out), data.validation_fraction, where)
        return Source(name, train.fingerprint, split.train, split.validation, {"text": left_out})
    return Source(
        name,
        f"{train.fingerprint}-{validation.fingerprint}",
        documents(train, left_out),
        documents(validation, held_out),
        {"training text": left_out, "held-out text": held_out},
    )


def _own_files(data: DataConfig) -> Source:
    def part(patterns: tuple[str, ...], field: str) -> tuple[str, _Part]:
        paths = files.find_files(patterns, field)
        read = partial(files.read_files, paths, data.text_column, field)
        return files.summary(paths), _Part(files.hash_files(paths, field), read)

    name, train = part(data.train_files, "data.train_files")
    validation = None
    if data.validation_files:
        held_out, validation = part(data.validation_files, "data.validation_files")
        name = f"{name}, held out: {held_out}"
    return _source(data, name, "data.train_files", train, validation)


def _hub(data: DataConfig) -> Source:
    where = f"data.dataset_name ({data.dataset_name})"

    def part(split: str, field: str) -> _Part:
        rows = hub.load_split(builder, split, data.text_column, field)
        return _Part(rows._fingerprint, partial(hub.read_split, rows, data.text_column, f"{where} {split}"))

    name, builder = hub.prepare(data.dataset_name, data.dataset_config, where)
    train = part(data.dataset_split, "data.dataset_split")
    validation = None if data.validation_split is None else part(data.validation_split, "data.validation_split")
    return _source(data, name, where, train, validation)


def _standard_library(data: DataConfig) -> Source:
    where, root = f"data.dataset_name ({STDLIB})", Path(sysconfig.get_path("stdlib"))
    documents, not_utf8, digest = [], 0, hashlib.sha256()
    for path in _library_files(root):
        content = _read(path, where)
        try:
            content.decode()
        except UnicodeDecodeError:
            not_utf8 += 1
        else:
            documents.append(path)
            digest.update(len(content).to_bytes(8, "big") + content)
    if not documents:
        raise UserError(f"{where}: no Python source files in {root}; use data.train_files")

    def read(left_out: LeftOut) -> Iterator[Document]:
        return (Document(_read(path, where).decode(), f"{where}: {path}") for path in documents)

    note = f"; {not_utf8} left out: not UTF-8" if not_utf8 else ""
    name = f"{STDLIB} {platform.python_version()} ({len(documents)} files{note})"
    return _source(data, name, where, _Part(digest.hexdigest(), read), None)


def _library_files(root: Path) -> list[Path]:
    """The source files below `root`, sorted. Folders beside the library are not even listed: they can be large."""
    names = []
    for folder, folders, found in os.walk(root):
        folders[:] = [name for name in folders if name not in _NOT_STDLIB]
        names += [os.path.relpath(os.path.join(folder, name), root) for name in found if name.endswith(".py")]
    return [root / name for name in sorted(names)]


def _read(path: Path, where: str) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise UserError(f"{where}: {path} cannot be read: {error.strerror}") from error

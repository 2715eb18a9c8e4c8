"""Where the text comes from: the standard library, own files, or the Hugging Face Hub.

Nothing here keeps the text in memory: a source is read again, from the start, each time that its text is asked for.
"""

import glob
import hashlib
import os
import platform
import sysconfig
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NamedTuple

from jaxlm.config import DataConfig
from jaxlm.data import hub
from jaxlm.data.documents import Document, Documents, LeftOut, not_empty
from jaxlm.data.files import READERS
from jaxlm.data.held_out import HeldOut
from jaxlm.errors import UserError, one_line

STDLIB = "python-stdlib"
_NOT_STDLIB = {"site-packages", "dist-packages", "test", "tests", "idlelib", "__pycache__"}


@dataclass(frozen=True)
class Source:
    """Text in documents. `train()` and `validation()` each start a new pass over their part.

    Attributes:
      name: what the text is, for people.
      fingerprint: changes with the content (not with the names or dates of files).
      left_out: {part of the text: what the latest pass over it left out}.
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
        return _files(data)
    if data.dataset_name == STDLIB:
        return _stdlib(data)
    return _hub(data)


class _Text(NamedTuple):
    """A part of a source: a hash of its content, and what reads it."""

    fingerprint: str
    read: Callable[[LeftOut], Iterator[Document]]


def _source(data: DataConfig, name: str, where: str, train: _Text, validation: _Text | None) -> Source:
    """`train` and `validation` without their empty documents; without `validation`, a part of `train` is held out."""

    def documents(text: _Text, left_out: LeftOut) -> Documents:
        return partial(not_empty, partial(text.read, left_out), left_out)

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


def _stdlib(data: DataConfig) -> Source:
    where, root = f"data.dataset_name ({STDLIB})", Path(sysconfig.get_path("stdlib"))
    documents, not_utf8, digest = [], 0, hashlib.sha256()
    for name in _stdlib_names(root):
        content = _read(root / name, where)
        if _is_utf8(content):
            documents.append(root / name)
            digest.update(len(content).to_bytes(8, "big") + content)
        else:
            not_utf8 += 1
    if not documents:
        raise UserError(f"{where}: no Python source files in {root}; use data.train_files")

    def read(left_out: LeftOut) -> Iterator[Document]:
        return (Document(_read(path, where).decode(), f"{where}: {path}") for path in documents)

    note = f"; {not_utf8} left out: not UTF-8" if not_utf8 else ""
    name = f"{STDLIB} {platform.python_version()} ({len(documents)} files{note})"
    return _source(data, name, where, _Text(digest.hexdigest(), read), None)


def _stdlib_names(root: Path) -> list[str]:
    """The source files below `root`, sorted; what is not the library is not even looked into: it can be large."""
    names = []
    for folder, folders, files in os.walk(root):
        folders[:] = [name for name in folders if name not in _NOT_STDLIB]
        names += [(Path(folder) / name).relative_to(root).as_posix() for name in files if name.endswith(".py")]
    return sorted(names)


def _is_utf8(content: bytes) -> bool:
    try:
        content.decode()
    except UnicodeDecodeError:
        return False
    return True


def _read(path: Path, where: str) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise UserError(f"{where}: {path} cannot be read: {error.strerror}") from error


def _files(data: DataConfig) -> Source:
    def text(patterns: tuple[str, ...], field: str) -> tuple[str, _Text]:
        paths = _find_files(patterns, field)
        return _names(paths), _Text(_hash_files(paths, field), partial(_read_files, paths, data.text_column, field))

    name, train = text(data.train_files, "data.train_files")
    validation = None
    if data.validation_files:
        held_out, validation = text(data.validation_files, "data.validation_files")
        name = f"{name}, held out: {held_out}"
    return _source(data, name, "data.train_files", train, validation)


def _names(paths: list[Path]) -> str:
    return str(paths[0]) if len(paths) == 1 else f"{len(paths)} files ({paths[0]} ...)"


def _find_files(patterns: Iterable[str], field: str) -> list[Path]:
    """The files that `patterns` stand for, in the order given, those of one glob sorted."""
    found = []
    for pattern in patterns:
        path = Path(pattern).expanduser()
        globbed = not os.path.exists(path) and glob.has_magic(pattern)
        paths = [Path(match) for match in sorted(glob.glob(str(path), recursive=True))] if globbed else [path]
        if not paths:
            raise UserError(f"{field} ({pattern}) matches no file")
        for path in paths:
            if os.path.isdir(path):
                raise UserError(f"{field} ({path}) is a folder; name its files, such as {path}/*.txt")
            if not os.path.exists(path):  # as in Path.exists, but also no for a name too long, a folder not ours
                raise UserError(f"{field} ({path}) does not exist, or is out of reach")
            if path.suffix.lower() not in READERS:
                known = ", ".join(READERS)
                raise UserError(
                    f"{field} ({path}) has an unknown extension ({path.suffix or 'none'}); use one of {known}"
                )
        found += paths
    return found


def _hash_files(paths: list[Path], field: str) -> str:
    digest = hashlib.sha256()
    for path in paths:
        where = f"{field} ({path})"
        try:
            with path.open("rb") as file:
                content = hashlib.file_digest(file, "sha256").digest()
        except OSError as error:
            raise UserError(f"{where} cannot be read: {error.strerror}") from error
        digest.update(path.suffix.lower().encode() + content)
    return digest.hexdigest()


def _read_files(paths: list[Path], column: str, field: str, left_out: LeftOut) -> Iterator[Document]:
    """The documents of all `paths`; a UserError names the file and the line."""
    characters = 0
    for path in paths:
        where = f"{field} ({path})"
        try:
            if not path.stat().st_size:
                left_out.add(f"{where} is empty")
                continue
            for document in READERS[path.suffix.lower()](path, column, where, left_out):
                characters += len(document.text)
                yield document
        except OSError as error:
            raise UserError(f"{where} cannot be read: {one_line(error)}") from error
    if not characters:
        bad = f"; {left_out.bad:,} bad document(s) left out: {left_out.first[0]}" if left_out.bad else ""
        raise UserError(f"{field} ({_names(paths)}) holds no text{bad}")


def _hub(data: DataConfig) -> Source:
    where = f"data.dataset_name ({data.dataset_name})"

    def text(split: str, field: str) -> _Text:
        rows = hub.load_split(builder, split, data.text_column, field)
        return _Text(rows._fingerprint, partial(hub.read, rows, data.text_column, f"{where} {split}"))

    name, builder = hub.prepare(data.dataset_name, data.dataset_config, where)
    train = text(data.dataset_split, "data.dataset_split")
    validation = None if data.validation_split is None else text(data.validation_split, "data.validation_split")
    return _source(data, name, where, train, validation)

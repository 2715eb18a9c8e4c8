"""Where the text comes from: the standard library, own files, or the Hugging Face Hub.

Nothing here keeps the text in memory: a source is read again, from the start, each time that its text is asked for.
"""

import hashlib
import os
import platform
import sysconfig
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import chain
from pathlib import Path
from typing import NamedTuple

from jaxlm.config import DataConfig
from jaxlm.data import files, hub
from jaxlm.data.documents import Documents, Found, LeftOut
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
    """A part of a source."""

    where: str  # begins messages
    fingerprint: str  # changes with the content
    read: Callable[[], Found]


def _source(data: DataConfig, name: str, train: _Part, validation: _Part | None) -> Source:
    """`train` and `validation` without what is left out; without `validation`, a part of `train` is held out."""
    left_out = LeftOut(data)
    train_documents = partial(left_out.good, train.read, train.where)
    if validation is None:
        split = HeldOut(train_documents, data.validation_fraction, train.where)
        return Source(name, train.fingerprint, split.train, split.validation, {"text": left_out})
    held_out = LeftOut(data)
    return Source(
        name,
        f"{train.fingerprint}-{validation.fingerprint}",
        train_documents,
        partial(held_out.good, validation.read, validation.where),
        {"training text": left_out, "held-out text": held_out},
    )


def _own_files(data: DataConfig) -> Source:
    def part(patterns: tuple[str, ...], field: str) -> tuple[str, _Part]:
        paths = files.find_files(patterns, field)
        name, read = files.summary(paths), partial(files.read_files, paths, data.text_column, field)
        return name, _Part(f"{field} ({name})", files.hash_files(paths, field), read)

    name, train = part(data.train_files, "data.train_files")
    if not data.validation_files:
        return _source(data, name, train, None)
    held_out, validation = part(data.validation_files, "data.validation_files")
    return _source(data, f"{name}, held out: {held_out}", train, validation)


def _hub(data: DataConfig) -> Source:
    where = f"data.dataset_name ({data.dataset_name})"

    def part(split: str, field: str) -> _Part:
        rows = hub.load_split(builder, split, data.text_column, field)
        read = partial(hub.read_split, rows, data.text_column, f"{where} {split}")
        return _Part(f"{where} {split}", rows._fingerprint, read)

    name, builder = hub.prepare(data.dataset_name, data.dataset_config, where)
    train = part(data.dataset_split, "data.dataset_split")
    validation = None if data.validation_split is None else part(data.validation_split, "data.validation_split")
    return _source(data, name, train, validation)


def _standard_library(data: DataConfig) -> Source:
    where, root = f"data.dataset_name ({STDLIB})", Path(sysconfig.get_path("stdlib"))
    paths, digest = _library_files(root), hashlib.sha256()
    if not paths:
        raise UserError(f"{where}: no Python source files in {root}; use data.train_files")
    for path in paths:
        with files.reading(f"{where}: {path}"):
            content = path.read_bytes()
        digest.update(len(content).to_bytes(8, "big") + content)

    def read() -> Found:
        return chain.from_iterable(files.read_txt(path, "", f"{where}: {path}") for path in paths)

    name = f"{STDLIB} {platform.python_version()} ({len(paths)} files)"
    return _source(data, name, _Part(where, digest.hexdigest(), read), None)


def _library_files(root: Path) -> list[Path]:
    """The source files below `root`, sorted. Folders beside the library are not even listed: they can be large."""
    names = []
    for folder, folders, found in os.walk(root):
        folders[:] = [name for name in folders if name not in _NOT_STDLIB]
        names += [os.path.relpath(os.path.join(folder, name), root) for name in found if name.endswith(".py")]
    return [root / name for name in sorted(names)]

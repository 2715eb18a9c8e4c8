"""Where the text comes from: the standard library, own files, or the Hugging Face Hub; and what of it is held out.

Nothing here keeps the text in memory: a source is read again, from the start, each time that its text is asked for.
"""

import codecs
import csv
import glob
import hashlib
import itertools
import json
import logging
import math
import platform
import re
import sys
import sysconfig
import threading
from array import array
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from jaxlm.config import DataConfig, nearest
from jaxlm.errors import UserError

if TYPE_CHECKING:
    import datasets

STDLIB = "python-stdlib"
_NOT_STDLIB = {"site-packages", "dist-packages", "test", "tests", "idlelib", "__pycache__"}

# The Hub wants "namespace/name"; these are the bare names that guides use.
HUB_NAMES = {
    "wikitext": "Salesforce/wikitext",
    "openwebtext": "Skylion007/openwebtext",
    "tiny_shakespeare": "karpathy/tiny_shakespeare",
    "c4": "allenai/c4",
    "imdb": "stanfordnlp/imdb",
}
HUB_WAY_OUT = f"use --data.train_files with own text, or --data.dataset_name {STDLIB}"
HUB_SECONDS = 10  # the Hub has to answer a first request within this time

Documents = Callable[[], Iterator[str]]


@dataclass(frozen=True)
class Source:
    """Text in documents. `train()` and `validation()` each start a new pass over their part.

    Attributes:
      name: what the text is, for people.
      fingerprint: changes with the content (not with the names or dates of files).
    """

    name: str
    fingerprint: str
    train: Documents
    validation: Documents


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


# ---- Held-out text ---------------------------------------------------------------------------------------------------


class HeldOut:
    """Splits documents into training and held-out text, the same way in every run and for every seed.

    Of n documents, round(n * fraction) are held out: those whose text has the smallest SHA-256. Where that would be
    less than one, the end of the text is held out instead: `fraction` of its characters, from a line end or other white
    space near that point if there is one.
    """

    def __init__(self, documents: Documents, fraction: float, where: str) -> None:
        """`where` begins the message of the UserError for text that is too short to be split."""
        self._documents, self._fraction, self._where = documents, fraction, where

    def train(self) -> Iterator[str]:
        """The training text; empty documents belong to neither part."""
        return (text[:cut] for text, cut in zip(self._documents(), self._cuts, strict=True) if cut)

    def validation(self) -> Iterator[str]:
        """The held-out text."""
        return (text[cut:] for text, cut in zip(self._documents(), self._cuts, strict=True) if cut < len(text))

    @cached_property
    def _cuts(self) -> np.ndarray:
        """int64 [documents]: the characters of each document that are training text; the rest is held out."""
        hashes, sizes = array("Q"), array("q")
        for text in self._documents():
            hashes.append(int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big"))
            sizes.append(len(text))
        lengths = np.array(sizes, np.int64)
        total = int(lengths.sum())
        cuts = lengths.copy()
        if len(lengths) * self._fraction >= 1:
            held_out = math.floor(len(lengths) * self._fraction + 0.5)
            cuts[np.argsort(np.array(hashes, np.uint64), kind="stable")[:held_out]] = 0
        elif total:
            ends = np.cumsum(lengths)
            held_out = max(1, math.floor(total * self._fraction + 0.5))
            index = int(np.searchsorted(ends, total - held_out, side="right"))
            cuts[index + 1 :] = 0
            text = next(itertools.islice(self._documents(), index, None))
            cuts[index] = _break_near(text, total - held_out - int(ends[index] - lengths[index]), held_out // 2)
        if not 0 < int(cuts.sum()) < total:
            raise UserError(
                f"{self._where}: {len(lengths)} documents with {total} characters are too little "
                f"to hold out data.validation_fraction ({self._fraction}) of them; give more text"
            )
        return cuts


def _break_near(text: str, point: int, reach: int) -> int:
    """The place nearest to `point` just after a line end, else after other white space, else `point` itself."""
    low, high = max(point - min(reach, 1000), 0), min(point + min(reach, 1000), len(text))
    for blank in (r"\n", r"\s"):
        places = [low + found.end() for found in re.finditer(blank, text[low:high])]
        if inside := [place for place in places if 0 < place < len(text)]:
            return min(inside, key=lambda place: abs(place - point))
    return point


# ---- The standard library --------------------------------------------------------------------------------------------


def _stdlib(data: DataConfig) -> Source:
    root = Path(sysconfig.get_path("stdlib"))
    paths = {path.relative_to(root).as_posix(): path for path in root.rglob("*.py")}
    names = sorted(name for name in paths if not _NOT_STDLIB.intersection(name.split("/")))
    documents, left_out, digest = [], 0, hashlib.sha256()
    for name in names:
        content = _read(paths[name], f"data.dataset_name ({STDLIB})")
        if _is_utf8(content):
            documents.append(paths[name])
            _add_to(digest, content)
        else:
            left_out += 1
    if not documents:
        raise UserError(f"data.dataset_name ({STDLIB}): no Python source files in {root}; use data.train_files")

    def texts() -> Iterator[str]:
        return (path.read_bytes().decode() for path in documents)

    split = HeldOut(texts, data.validation_fraction, f"data.dataset_name ({STDLIB})")
    note = f"; {left_out} left out: not UTF-8" if left_out else ""
    name = f"{STDLIB} {platform.python_version()} ({len(documents)} files{note})"
    return Source(name, digest.hexdigest(), split.train, split.validation)


def _is_utf8(content: bytes) -> bool:
    try:
        content.decode()
    except UnicodeDecodeError:
        return False
    return True


# ---- Own files -------------------------------------------------------------------------------------------------------


def _files(data: DataConfig) -> Source:
    train = _find_files(data.train_files, "data.train_files")
    digest = _hash_files(train, "data.train_files")
    name = _names(train)
    if not data.validation_files:
        split = HeldOut(
            partial(_read_files, train, data, "data.train_files"), data.validation_fraction, "data.train_files"
        )
        return Source(name, digest, split.train, split.validation)
    validation = _find_files(data.validation_files, "data.validation_files")
    return Source(
        f"{name}, held out: {_names(validation)}",
        f"{digest}-{_hash_files(validation, 'data.validation_files')}",
        partial(_read_files, train, data, "data.train_files"),
        partial(_read_files, validation, data, "data.validation_files"),
    )


def _names(paths: list[Path]) -> str:
    return str(paths[0]) if len(paths) == 1 else f"{len(paths)} files ({paths[0]} ...)"


def _find_files(patterns: Iterable[str], field: str) -> list[Path]:
    """The files that `patterns` stand for, in the order given, those of one glob sorted."""
    found = []
    for pattern in patterns:
        path = Path(pattern).expanduser()
        globbed = not path.exists() and glob.has_magic(pattern)
        paths = [Path(match) for match in sorted(glob.glob(str(path), recursive=True))] if globbed else [path]
        if not paths:
            raise UserError(f"{field} ({pattern}) matches no file")
        for path in paths:
            if path.is_dir():
                raise UserError(f"{field} ({path}) is a folder; name its files, such as {path}/*.txt")
            if not path.exists():
                raise UserError(f"{field} ({path}) does not exist")
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
                size = file.tell()
        except OSError as error:
            raise UserError(f"{where} cannot be read: {error.strerror}") from error
        if not size:
            raise UserError(f"{where} is empty")
        digest.update(path.suffix.lower().encode() + content)
    return digest.hexdigest()


def _read_files(paths: list[Path], data: DataConfig, field: str) -> Iterator[str]:
    """The documents of all `paths`; a UserError names the file and the line."""
    characters = 0
    for path in paths:
        where = f"{field} ({path})"
        try:
            for text in READERS[path.suffix.lower()](path, data.text_column, where):
                characters += len(text)
                yield text
        except OSError as error:
            raise UserError(f"{where} cannot be read: {_line(error)}") from error
    if not characters:
        raise UserError(f"{field} ({_names(paths)}) holds no text")


def _read_txt(path: Path, column: str, where: str) -> Iterator[str]:
    yield _decode(path.read_bytes(), where)


def _read_jsonl(path: Path, column: str, where: str) -> Iterator[str]:
    offset = 0
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            text, offset = _decode(line, where, offset), offset + len(line)
            if not text.strip():
                continue
            try:
                row = json.loads(text)
            except json.JSONDecodeError as error:
                raise UserError(f"{where}: bad JSON at line {number}, column {error.colno}: {error.msg}") from error
            if not isinstance(row, dict):
                raise UserError(f"{where}: line {number} is not a JSON object")
            if column not in row:
                raise _no_column(column, row, f"{where}: line {number}")
            yield _checked(row[column], column, f"{where}: line {number}")


def _read_csv(path: Path, column: str, where: str) -> Iterator[str]:
    limit = csv.field_size_limit(sys.maxsize)  # the 128 kB that csv takes by default is less than many documents
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            rows = csv.DictReader(file, strict=True)
            if column not in (rows.fieldnames or ()):
                raise _no_column(column, rows.fieldnames or (), where)
            for row in rows:
                if None in row:
                    raise UserError(f"{where}: line {rows.line_num} has more fields than the header; quote its commas")
                yield _checked(row[column], column, f"{where}: line {rows.line_num}")
    except UnicodeDecodeError:
        _decode(path.read_bytes(), where)  # raises, with the place in the file
        raise
    except csv.Error as error:
        raise UserError(f"{where}: bad CSV at line {rows.line_num}: {error}") from error
    finally:
        csv.field_size_limit(limit)


def _read_parquet(path: Path, column: str, where: str) -> Iterator[str]:
    import pyarrow
    from pyarrow import parquet

    try:
        with parquet.ParquetFile(path) as file:
            if column not in file.schema_arrow.names:
                raise _no_column(column, file.schema_arrow.names, where)
            batches = file.iter_batches(batch_size=1024, columns=[column])
            values = itertools.chain.from_iterable(batch.column(0).to_pylist() for batch in batches)
            for row, value in enumerate(values, 1):
                yield _checked(value, column, f"{where}: row {row}")
    except (pyarrow.ArrowException, UnicodeDecodeError) as error:
        raise UserError(f"{where} is not a readable Parquet file: {_line(error)}") from error


READERS: dict[str, Callable[[Path, str, str], Iterator[str]]] = {
    ".txt": _read_txt,
    ".jsonl": _read_jsonl,
    ".csv": _read_csv,
    ".parquet": _read_parquet,
}


def _read(path: Path, where: str) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise UserError(f"{where}: {path} cannot be read: {error.strerror}") from error


def _decode(content: bytes, where: str, offset: int = 0) -> str:
    """`content` as text, without a byte order mark; `offset` is where it begins in its file."""
    try:
        text = content.decode()
    except UnicodeDecodeError as error:
        raise UserError(
            f"{where} is not UTF-8: bad byte at offset {offset + error.start}; convert it to UTF-8"
        ) from error
    return text if offset else text.removeprefix(codecs.BOM_UTF8.decode())


def _no_column(column: str, there: Iterable[str], where: str) -> UserError:
    names = list(there)
    listed = ", ".join(names[:20]) + (", ..." if len(names) > 20 else "")
    return UserError(
        f"data.text_column ({column}): not in {where}{nearest(column, names)}; there is: {listed or 'nothing'}"
    )


def _checked(value: Any, column: str, where: str) -> str:
    if not isinstance(value, str):
        raise UserError(f"data.text_column ({column}): {where} holds {type(value).__name__}, not text")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise UserError(f"{where}: {value[error.start]!r} is half a surrogate pair, not text") from error
    return value


def _add_to(digest: Any, content: bytes) -> None:
    digest.update(len(content).to_bytes(8, "big") + content)


def _line(error: BaseException) -> str:
    return " ".join(str(error).split())


# ---- The Hugging Face Hub --------------------------------------------------------------------------------------------


def _hub(data: DataConfig) -> Source:
    name = data.dataset_name
    if name in HUB_NAMES:
        name = HUB_NAMES[name]
    where = f"data.dataset_name ({data.dataset_name})"
    if name and Path(name).exists():
        raise UserError(f"{where} is a local path; use data.train_files for own text")
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", name):
        hint = nearest(name, [*HUB_NAMES, STDLIB])
        raise UserError(f"{where} is not a Hub name of the form namespace/name{hint}; {HUB_WAY_OUT}")
    builder, note = _prepare_hub(name, data.dataset_config, where)
    train = _hub_split(builder, data.dataset_split, data.text_column, "data.dataset_split")
    label = " ".join(part for part in (name, data.dataset_config, note) if part)
    if data.validation_split is None:
        split = HeldOut(partial(_rows, train, data.text_column, where), data.validation_fraction, where)
        return Source(label, train._fingerprint, split.train, split.validation)
    validation = _hub_split(builder, data.validation_split, data.text_column, "data.validation_split")
    return Source(
        label,
        f"{train._fingerprint}-{validation._fingerprint}",
        partial(_rows, train, data.text_column, where),
        partial(_rows, validation, data.text_column, where),
    )


def _prepare_hub(name: str, configuration: str | None, where: str) -> tuple["datasets.DatasetBuilder", str | None]:
    """Downloads the data set into the cache of `datasets`, or finds it there; a note says if it had to."""
    reason = _why_unreachable(name)
    import datasets
    import huggingface_hub
    from huggingface_hub.errors import HTTPError

    for library in ("datasets", "huggingface_hub"):
        logging.getLogger(library).setLevel(logging.ERROR)  # one error is one line, ours
    if reason:
        # What was downloaded before can still be used; told to be offline, the library looks there at once.
        datasets.config.HF_HUB_OFFLINE = huggingface_hub.constants.HF_HUB_OFFLINE = True
    try:
        builder = datasets.load_dataset_builder(name, configuration)
        builder.download_and_prepare()
    except datasets.exceptions.DatasetNotFoundError as error:
        raise UserError(f"{where} is not on the Hub, or is not public; {HUB_WAY_OUT}") from error
    except ValueError as error:
        said = _line(error).partition(" Example of usage")[0]
        raise UserError(
            f"data.dataset_config ({configuration}) of {name}: {said}; set it to one that there is"
        ) from error
    except (OSError, HTTPError) as error:
        raise UserError(
            f"{where}: the Hugging Face Hub is out of reach ({reason or _line(error)}); {HUB_WAY_OUT}"
        ) from error
    except datasets.exceptions.DatasetsError as error:
        raise UserError(f"{where} cannot be loaded: {_line(error)}") from error
    return builder, f"(downloaded before; the Hub is out of reach: {reason})" if reason else None


def _why_unreachable(name: str) -> str | None:
    """None if the Hub answers in time, else why not. The library alone would retry for minutes."""
    answer: list[str | None] = []

    def ask() -> None:
        from huggingface_hub import HfApi
        from huggingface_hub.errors import HfHubHTTPError, HTTPError, RepositoryNotFoundError

        try:
            HfApi().dataset_info(name, timeout=HUB_SECONDS)
            answer.append(None)
        except RepositoryNotFoundError:
            answer.append(None)  # the Hub is there, and says no; loading will say it too
        except HfHubHTTPError as error:
            answer.append(f"HTTP status {error.response.status_code}")
        except (OSError, HTTPError) as error:
            answer.append(_line(error))
        except (ValueError, KeyError, TypeError):
            answer.append("what answers is not the Hub")  # such as the sign-in page of a hotel

    thread = threading.Thread(target=ask, daemon=True)  # a name server that is silent cannot be timed out otherwise
    thread.start()
    thread.join(2 * HUB_SECONDS)
    return answer[0] if answer else f"no answer within {2 * HUB_SECONDS} s"


def _hub_split(builder: "datasets.DatasetBuilder", split: str, column: str, field: str) -> "datasets.Dataset":
    try:
        dataset = builder.as_dataset(split=split)
    except ValueError as error:
        hint = "; none: hold out data.validation_fraction" if field == "data.validation_split" else ""
        raise UserError(f"{field} ({split}): {_line(error).rstrip('.')}{hint}") from error
    if column not in dataset.column_names:
        raise _no_column(column, dataset.column_names, f"split {split}")
    if not len(dataset):
        raise UserError(f"{field} ({split}) is empty")
    return dataset


def _rows(dataset: "datasets.Dataset", column: str, where: str) -> Iterator[str]:
    batches = dataset.select_columns([column]).iter(batch_size=1024)
    for row, value in enumerate(itertools.chain.from_iterable(batch[column] for batch in batches), 1):
        yield _checked(value, column, f"{where}: row {row}")

"""Where the text comes from: the standard library, own files, or the Hugging Face Hub; and what of it is held out.

Nothing here keeps the text in memory: a source is read again, from the start, each time that its text is asked for.
"""

import csv
import glob
import hashlib
import itertools
import json
import logging
import math
import os
import platform
import re
import sysconfig
import threading
from array import array
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TextIO

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
LONGEST_LINE = 2**28  # characters; a longer one, or a longer CSV field, is a damaged file: a closing quote is missing
SHOWN = 3  # bad documents that are named, of those left out


class Document(NamedTuple):
    """A text, and where it is: the file and the line or row of it."""

    text: str
    place: str


class LeftOut:
    """The documents that the latest pass over a text left out: empty ones, and bad ones if they are to be skipped."""

    def __init__(self, data: DataConfig) -> None:
        self._skip = data.on_bad_document == "skip"
        self.begin()

    def begin(self) -> None:
        """A new pass begins."""
        self.empty, self.bad, self.first = 0, 0, list[str]()

    def add(self, what: str) -> None:
        """`what` says where a bad document is, and what is wrong with it. Raises UserError if that is to stop."""
        if not self._skip:
            raise UserError(f"{what}; mend it, or set data.on_bad_document skip to leave out bad documents")
        self.bad += 1
        if self.bad <= SHOWN:
            self.first.append(what)

    def lines(self, part: str) -> list[str]:
        """What was left out of `part`, in words."""
        lines = [f"{part}: {self.empty:,} empty document(s) left out"] if self.empty else []
        if self.bad:
            more = f"; and {self.bad - SHOWN:,} more" if self.bad > SHOWN else ""
            lines.append(f"{part}: {self.bad:,} bad document(s) left out: {'; '.join(self.first)}{more}")
        return lines


Documents = Callable[[], Iterator[Document]]


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

    def train(self) -> Iterator[Document]:
        """The training text; empty documents belong to neither part."""
        return (Document(text[:cut], place) for text, place, cut in self._with_cuts() if cut)

    def validation(self) -> Iterator[Document]:
        """The held-out text."""
        return (Document(text[cut:], place) for text, place, cut in self._with_cuts() if cut < len(text))

    def _with_cuts(self) -> Iterator[tuple[str, str, int]]:
        for document, cut in itertools.zip_longest(self._documents(), self._cuts.tolist()):
            if document is None or cut is None or cut > len(document.text):
                raise self._changed()
            yield *document, cut

    def _changed(self) -> UserError:
        return UserError(f"{self._where}: the text changed while it was read; start again when it is complete")

    @cached_property
    def _cuts(self) -> np.ndarray:
        """int64 [documents]: the characters of each document that are training text; the rest is held out."""
        hashes, sizes = array("Q"), array("q")
        for text, _ in self._documents():
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
            document = next(itertools.islice(self._documents(), index, None), None)
            if document is None:
                raise self._changed()
            begin = int(ends[index] - lengths[index])
            cuts[index] = _break_near(document.text, total - held_out - begin, held_out // 2)
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
    documents, not_utf8, digest = [], 0, hashlib.sha256()
    for name in names:
        content = _read(paths[name], f"data.dataset_name ({STDLIB})")
        if _is_utf8(content):
            documents.append(paths[name])
            _add_to(digest, content)
        else:
            not_utf8 += 1
    if not documents:
        raise UserError(f"data.dataset_name ({STDLIB}): no Python source files in {root}; use data.train_files")

    def read() -> Iterator[Document]:
        where = f"data.dataset_name ({STDLIB})"
        return (Document(path.read_bytes().decode(), f"{where}: {path}") for path in documents)

    note = f"; {not_utf8} left out: not UTF-8" if not_utf8 else ""
    name = f"{STDLIB} {platform.python_version()} ({len(documents)} files{note})"
    left_out = LeftOut(data)
    split = HeldOut(partial(_not_empty, read, left_out), data.validation_fraction, f"data.dataset_name ({STDLIB})")
    return Source(name, digest.hexdigest(), split.train, split.validation, {"text": left_out})


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
    name, left_out = _names(train), LeftOut(data)
    read_train = partial(_read_files, train, data, "data.train_files", left_out)
    if not data.validation_files:
        split = HeldOut(partial(_not_empty, read_train, left_out), data.validation_fraction, "data.train_files")
        return Source(name, digest, split.train, split.validation, {"text": left_out})
    validation, held_out = _find_files(data.validation_files, "data.validation_files"), LeftOut(data)
    read_validation = partial(_read_files, validation, data, "data.validation_files", held_out)
    return Source(
        f"{name}, held out: {_names(validation)}",
        f"{digest}-{_hash_files(validation, 'data.validation_files')}",
        partial(_not_empty, read_train, left_out),
        partial(_not_empty, read_validation, held_out),
        {"training text": left_out, "held-out text": held_out},
    )


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


def _read_files(paths: list[Path], data: DataConfig, field: str, left_out: LeftOut) -> Iterator[Document]:
    """The documents of all `paths`; a UserError names the file and the line."""
    characters = 0
    for path in paths:
        where = f"{field} ({path})"
        try:
            if not path.stat().st_size:
                left_out.add(f"{where} is empty")
                continue
            for document in READERS[path.suffix.lower()](path, data.text_column, where, left_out):
                characters += len(document.text)
                yield document
        except OSError as error:
            raise UserError(f"{where} cannot be read: {_line(error)}") from error
    if not characters:
        bad = f"; {left_out.bad:,} bad document(s) left out: {left_out.first[0]}" if left_out.bad else ""
        raise UserError(f"{field} ({_names(paths)}) holds no text{bad}")


def _not_empty(read: Documents, left_out: LeftOut) -> Iterator[Document]:
    """A pass over what `read` gives, without the empty documents."""
    left_out.begin()
    for document in read():
        if document.text:
            yield document
        else:
            left_out.empty += 1


def _read_txt(path: Path, column: str, where: str, left_out: LeftOut) -> Iterator[Document]:
    content = path.read_bytes()
    try:
        yield Document(content.decode().removeprefix("\ufeff"), where)
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        left_out.add(f"{where}: line {line} is not UTF-8 (byte {content[error.start]:#x} at offset {error.start})")


def _open_text(path: Path) -> TextIO:
    """Bytes that are not UTF-8 become halves of surrogate pairs, so that only their line is lost; see `_bad_utf8`."""
    return path.open(encoding="utf-8-sig", errors="surrogateescape", newline="")


def _lines(file: TextIO, where: str, left_out: LeftOut) -> Iterator[str]:
    """The lines of `file`, a blank one in place of each that is too long."""
    number = 0
    while line := file.readline(LONGEST_LINE + 1):
        number += 1
        if len(line) > LONGEST_LINE:
            left_out.add(f"{where}: line {number} is longer than {LONGEST_LINE:,} characters")
            while line and not line.endswith(("\n", "\r")):
                line = file.readline(LONGEST_LINE)
            line = "\n"
        yield line


def _read_jsonl(path: Path, column: str, where: str, left_out: LeftOut) -> Iterator[Document]:
    with _open_text(path) as file:
        for number, line in enumerate(_lines(file, where, left_out), 1):
            if line.isspace():
                continue
            place = f"{where}: line {number}"
            try:
                row = json.loads(line)
            except json.JSONDecodeError as error:
                left_out.add(_bad_utf8(line, place) or f"{place}: bad JSON at column {error.pos + 1}: {error.msg}")
            except (ValueError, RecursionError) as error:  # a number of thousands of digits; lists in lists in lists
                left_out.add(f"{place}: JSON out of bounds: {_line(error)}")
            else:
                if not isinstance(row, dict):
                    left_out.add(f"{place} is not a JSON object")
                elif column not in row:
                    left_out.add(_no_column(column, row, place))
                elif fault := _bad_utf8(line, place) or _not_text(row[column], column, place):
                    left_out.add(fault)
                else:
                    yield Document(row[column], place)


def _read_csv(path: Path, column: str, where: str, left_out: LeftOut) -> Iterator[Document]:
    limit = csv.field_size_limit(LONGEST_LINE)  # the 128 kB that csv takes by default is less than many documents
    try:
        with _open_text(path) as file:
            rows = csv.reader(_lines(file, where, left_out), strict=True)
            header = _header(rows, where)
            if column not in header:
                raise UserError(_no_column(column, header, f"line 1 of {where}"))
            yield from _csv_rows(rows, header.index(column), header, where, left_out)
    finally:
        csv.field_size_limit(limit)


def _header(rows: Any, where: str) -> list[str]:
    try:
        header: list[str] = next(rows, [])
    except csv.Error as error:
        raise UserError(f"{where}: line 1: bad CSV: {error}") from error
    if fault := _bad_utf8("".join(header), f"{where}: line 1"):
        raise UserError(f"{fault}; convert it")
    return header


def _csv_rows(rows: Any, at: int, header: list[str], where: str, left_out: LeftOut) -> Iterator[Document]:
    while True:
        begin = rows.line_num + 1
        place = f"{where}: line {begin}"
        try:
            row = next(rows, None)
        except csv.Error as error:
            if rows.line_num > begin:  # in quotes over several lines: where they should have ended is unknown
                left_out.add(f"{place} and all after it: bad CSV: {error}")
                return
            left_out.add(f"{place}: bad CSV: {error}")
            continue
        if row is None:
            return
        if not row:
            continue
        if len(row) > len(header):
            left_out.add(f"{place} has more fields than the header; quote its commas")
        elif fault := _not_text(row[at] if at < len(row) else None, header[at], place):
            left_out.add(fault)
        else:
            yield Document(row[at], place)


def _read_parquet(path: Path, column: str, where: str, left_out: LeftOut) -> Iterator[Document]:
    import pyarrow
    from pyarrow import parquet

    row = 0
    try:
        with parquet.ParquetFile(path) as file:
            if column not in file.schema_arrow.names:
                raise UserError(_no_column(column, file.schema_arrow.names, where))
            for batch in file.iter_batches(batch_size=1024, columns=[column]):
                for value in batch.column(0):
                    row += 1
                    place = f"{where}: row {row}"
                    try:
                        text = value.as_py()
                    except UnicodeDecodeError as error:
                        left_out.add(f"{place} is not UTF-8 (byte {error.object[error.start]:#x})")
                        continue
                    if fault := _not_text(text, column, place):
                        left_out.add(fault)
                    else:
                        yield Document(text, place)
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
        if isinstance(error, OSError) and error.errno is not None:  # the disk's fault, not the content's
            raise
        rest = f", from row {row + 1} on," if row else ""
        left_out.add(f"{where}{rest} is not a readable Parquet file: {_line(error)}")


READERS: dict[str, Callable[[Path, str, str, LeftOut], Iterator[Document]]] = {
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


def _no_column(column: str, there: Iterable[str], where: str) -> str:
    names = list(there)
    listed = ", ".join(names[:20]) + (", ..." if len(names) > 20 else "")
    return f"data.text_column ({column}): not in {where}{nearest(column, names)}; there is: {listed or 'nothing'}"


def _not_text(value: Any, column: str, place: str) -> str | None:
    """What to say of a value that is no text; None: it is."""
    if not isinstance(value, str):
        return f"data.text_column ({column}): {place} holds {type(value).__name__}, not text"
    return _bad_utf8(value, place)


def _bad_utf8(text: str, place: str) -> str | None:
    """What to say of a text that cannot be written as UTF-8; None: it can."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        code = ord(text[error.start])
        if 0xDC80 <= code <= 0xDCFF:  # what `_open_text` makes of such bytes
            return f"{place} is not UTF-8 (byte {code - 0xDC00:#x} at character {error.start + 1})"
        return f"{place}: {text[error.start]!r} is half a surrogate pair, not text"
    return None


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
    label, left_out = " ".join(part for part in (name, data.dataset_config, note) if part), LeftOut(data)
    read_train = partial(_rows, train, data.text_column, f"{where} {data.dataset_split}", left_out)
    if data.validation_split is None:
        split = HeldOut(partial(_not_empty, read_train, left_out), data.validation_fraction, where)
        return Source(label, train._fingerprint, split.train, split.validation, {"text": left_out})
    validation = _hub_split(builder, data.validation_split, data.text_column, "data.validation_split")
    held_out = LeftOut(data)
    read_validation = partial(_rows, validation, data.text_column, f"{where} {data.validation_split}", held_out)
    return Source(
        label,
        f"{train._fingerprint}-{validation._fingerprint}",
        partial(_not_empty, read_train, left_out),
        partial(_not_empty, read_validation, held_out),
        {"training text": left_out, "held-out text": held_out},
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
        raise UserError(_no_column(column, dataset.column_names, f"split {split}"))
    if not len(dataset):
        raise UserError(f"{field} ({split}) is empty")
    return dataset


def _rows(dataset: "datasets.Dataset", column: str, where: str, left_out: LeftOut) -> Iterator[Document]:
    batches = dataset.select_columns([column]).iter(batch_size=1024)
    for row, value in enumerate(itertools.chain.from_iterable(batch[column] for batch in batches), 1):
        place = f"{where}: row {row}"
        if fault := _not_text(value, column, place):
            left_out.add(fault)
        else:
            yield Document(value, place)

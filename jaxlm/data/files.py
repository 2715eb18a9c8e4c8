"""Own text files: the patterns that name them, a hash of their content, and their documents.

The documents of .txt (one a file), .jsonl, .csv and .parquet files each know the line or row where they begin.
"""

import csv
import glob
import hashlib
import json
import os
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from typing import TextIO

from jaxlm.data.documents import Document, Found, checked, encoding_fault, missing_column
from jaxlm.errors import UserError, one_line


def find_files(patterns: Iterable[str], field: str) -> list[Path]:
    """The files that `patterns` (paths or globs) name, in the order given, those of one glob sorted.

    Raises:
      UserError: it begins with `field`, the option; a pattern names no file, a folder, or one with another extension.
    """
    found = []
    for pattern in patterns:
        path = os.path.expanduser(pattern)
        is_glob = glob.has_magic(pattern) and not os.path.exists(path)
        paths = [Path(match) for match in sorted(glob.glob(path, recursive=True))] if is_glob else [Path(path)]
        if not paths:
            raise UserError(f"{field} ({pattern}) matches no file")
        for file in paths:
            where = f"{field} ({file})"
            if os.path.isdir(file):
                raise UserError(f"{where} is a folder; name its files, such as {file}/*.txt")
            if not os.path.exists(file):  # unlike Path.exists, no error where a name is too long or a folder closed
                raise UserError(f"{where} does not exist, or is out of reach")
            if file.suffix.lower() not in READERS:
                kind = file.suffix or "none"
                raise UserError(f"{where} has an unknown extension ({kind}); use one of {', '.join(READERS)}")
        found += paths
    return found


def hash_files(paths: Iterable[Path], field: str) -> str:
    """SHA-256 of extensions and content, in order; UserError, which `field` begins, if a file cannot be read."""
    digest = hashlib.sha256()
    for path in paths:
        with reading(f"{field} ({path})"), path.open("rb") as file:
            digest.update(path.suffix.lower().encode() + hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()


def read_files(paths: list[Path], column: str, field: str) -> Found:
    """The documents of all `paths`, whose text is in the key or column `column`, except in .txt files.

    Raises:
      UserError: it begins with `field`, the option; a file cannot be read, or has no such column.
    """
    for path in paths:
        where = f"{field} ({path})"
        with reading(where):
            if path.stat().st_size:
                yield from READERS[path.suffix.lower()](path, column, where)
            else:
                yield UserError(f"{where} is empty")


def summary(paths: list[Path]) -> str:
    """The files, for people."""
    return str(paths[0]) if len(paths) == 1 else f"{len(paths)} files ({paths[0]} ...)"


@contextmanager
def reading(where: str) -> Iterator[None]:
    """Makes what is wrong with reading a file a UserError, which `where` begins."""
    try:
        yield
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{where} cannot be read: {one_line(error)}") from error


# ---- One reader a format ---------------------------------------------------------------------------------------------


def read_txt(path: Path, column: str, where: str) -> Found:
    content = path.read_bytes()
    try:
        yield Document(content.decode().removeprefix("\ufeff"), where)
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        yield UserError(f"{where}: line {line} is not UTF-8 (byte {content[error.start]:#x} at offset {error.start})")


def _read_jsonl(path: Path, column: str, where: str) -> Found:
    with _open_text(path) as file:
        for number, line in enumerate(file, 1):
            if not line.isspace():
                place = f"{where}: line {number}"
                yield encoding_fault(line, place) or _json_document(line, column, place)


def _json_document(line: str, column: str, place: str) -> Document | UserError:
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        return UserError(f"{place}: bad JSON at column {error.pos + 1}: {error.msg}")
    except (ValueError, RecursionError) as error:  # a number of thousands of digits; lists in lists in lists
        return UserError(f"{place}: JSON out of bounds: {one_line(error)}")
    if not isinstance(row, dict):
        return UserError(f"{place} is not a JSON object")
    return checked(row[column], column, place) if column in row else missing_column(column, row, place)


def _read_csv(path: Path, column: str, where: str) -> Found:
    csv.field_size_limit(sys.maxsize)  # of the process; the default, 128 kB, is less than many documents
    with _open_text(path) as file:
        rows = csv.reader(file, strict=True)
        try:
            header = next(rows, [])
        except csv.Error as error:
            raise UserError(f"{where}: line 1: bad CSV: {error}") from error
        if fault := encoding_fault("".join(header), f"{where}: line 1"):
            raise fault
        if column not in header:
            raise missing_column(column, header, f"line 1 of {where}")
        index = header.index(column)
        while True:
            first_line = rows.line_num + 1
            place = f"{where}: line {first_line}"
            try:
                row = next(rows)
            except StopIteration:
                return
            except csv.Error as error:
                if rows.line_num > first_line:  # a quoted field over several lines: its end is unknown
                    yield UserError(f"{place} and all after it: bad CSV: {error}")
                    return
                yield UserError(f"{place}: bad CSV: {error}")
                continue
            if len(row) > len(header):
                yield UserError(f"{place} has more fields than the header; quote its commas")
            elif row:
                yield checked(row[index] if index < len(row) else None, column, place)


def _read_parquet(path: Path, column: str, where: str) -> Found:
    import pyarrow
    from pyarrow import parquet

    row = 0
    try:
        with parquet.ParquetFile(path) as file:
            if column not in file.schema_arrow.names:
                raise missing_column(column, file.schema_arrow.names, where)
            batches = file.iter_batches(batch_size=1024, columns=[column])
            for row, value in enumerate(chain.from_iterable(batch.column(0) for batch in batches), 1):
                place = f"{where}: row {row}"
                try:
                    yield checked(value.as_py(), column, place)
                except UnicodeDecodeError as error:
                    yield UserError(f"{place} is not UTF-8 (byte {error.object[error.start]:#x})")
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:  # the last: names of columns
        if isinstance(error, OSError) and error.errno is not None:  # the disk's fault, not the content's
            raise
        rest = f", from row {row + 1} on," if row else ""
        yield UserError(f"{where}{rest} is not a readable Parquet file: {one_line(error)}")


# (file, data.text_column, the beginning of places and messages) -> documents
READERS: dict[str, Callable[[Path, str, str], Found]] = {
    ".txt": read_txt,
    ".jsonl": _read_jsonl,
    ".csv": _read_csv,
    ".parquet": _read_parquet,
}


def _open_text(path: Path) -> TextIO:
    """Bytes that are not UTF-8 become surrogates, so that only their line is lost; see `encoding_fault`."""
    return path.open(encoding="utf-8-sig", errors="surrogateescape", newline="")

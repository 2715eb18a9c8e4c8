"""Own text files: the patterns that name them, a hash of their content, and their documents.

The documents of .txt (one a file), .jsonl, .csv and .parquet files each know the line or row where they begin.
"""

import csv
import glob
import hashlib
import json
import os
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, TextIO

from jaxlm.data.documents import Document, LeftOut, encoding_fault, missing_column
from jaxlm.errors import UserError, one_line

if TYPE_CHECKING:
    from _csv import Reader as CsvReader

LONGEST_LINE = 2**28  # characters; a longer one, or a longer CSV field, is a damaged file: a closing quote is missing


def find_files(patterns: Iterable[str], field: str) -> list[Path]:
    """The files that `patterns` (paths or globs) name, in the order given, those of one glob sorted.

    Raises:
      UserError: it begins with `field`, the option; a pattern names no file, a folder, or one with another extension.
    """
    found = []
    for pattern in patterns:
        path = Path(pattern).expanduser()
        is_glob = not os.path.exists(path) and glob.has_magic(pattern)
        paths = [Path(match) for match in sorted(glob.glob(str(path), recursive=True))] if is_glob else [path]
        if not paths:
            raise UserError(f"{field} ({pattern}) matches no file")
        for path in paths:
            where = f"{field} ({path})"
            if os.path.isdir(path):
                raise UserError(f"{where} is a folder; name its files, such as {path}/*.txt")
            if not os.path.exists(path):  # unlike Path.exists, no error where a name is too long or a folder closed
                raise UserError(f"{where} does not exist, or is out of reach")
            if path.suffix.lower() not in READERS:
                kind = path.suffix or "none"
                raise UserError(f"{where} has an unknown extension ({kind}); use one of {', '.join(READERS)}")
        found += paths
    return found


def hash_files(paths: Iterable[Path], field: str) -> str:
    """SHA-256 of extensions and content, in order; UserError, which `field` begins, if a file cannot be read."""
    digest = hashlib.sha256()
    for path in paths:
        try:
            with path.open("rb") as file:
                content = hashlib.file_digest(file, "sha256").digest()
        except OSError as error:
            raise UserError(f"{field} ({path}) cannot be read: {error.strerror}") from error
        digest.update(path.suffix.lower().encode() + content)
    return digest.hexdigest()


def read_files(paths: list[Path], column: str, field: str, left_out: LeftOut) -> Iterator[Document]:
    """The documents of all `paths`.

    Args:
      column: the key or column that holds the text, except in .txt files.
      field: the option that named the files; begins places and messages.

    Raises:
      UserError: a file cannot be read, none has any text, or (see `LeftOut`) a document is bad.
    """
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
        raise UserError(f"{field} ({summary(paths)}) holds no text{bad}")


def summary(paths: list[Path]) -> str:
    """The files, for people."""
    return str(paths[0]) if len(paths) == 1 else f"{len(paths)} files ({paths[0]} ...)"


# ---- One reader a format ---------------------------------------------------------------------------------------------


def _read_txt(path: Path, column: str, where: str, left_out: LeftOut) -> Iterator[Document]:
    content = path.read_bytes()
    try:
        yield Document(content.decode().removeprefix("\ufeff"), where)
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        left_out.add(f"{where}: line {line} is not UTF-8 (byte {content[error.start]:#x} at offset {error.start})")


def _read_jsonl(path: Path, column: str, where: str, left_out: LeftOut) -> Iterator[Document]:
    with _open_text(path) as file:
        for number, line in enumerate(_lines(file, where, left_out), 1):
            if line.isspace():
                continue
            place = f"{where}: line {number}"
            encoding = encoding_fault(line, place)
            try:
                row = json.loads(line)
            except json.JSONDecodeError as error:
                left_out.add(encoding or f"{place}: bad JSON at column {error.pos + 1}: {error.msg}")
            except (ValueError, RecursionError) as error:  # a number of thousands of digits; lists in lists in lists
                left_out.add(f"{place}: JSON out of bounds: {one_line(error)}")
            else:
                if not isinstance(row, dict):
                    left_out.add(f"{place} is not a JSON object")
                elif column not in row:
                    left_out.add(missing_column(column, row, place))
                elif encoding:
                    left_out.add(encoding)
                else:
                    yield from left_out.checked(row[column], column, place)


def _read_csv(path: Path, column: str, where: str, left_out: LeftOut) -> Iterator[Document]:
    csv.field_size_limit(LONGEST_LINE)  # of the process; the default, 128 kB, is less than many documents
    with _open_text(path) as file:
        rows = csv.reader(_lines(file, where, left_out), strict=True)
        try:
            header = next(rows, [])
        except csv.Error as error:
            raise UserError(f"{where}: line 1: bad CSV: {error}") from error
        if fault := encoding_fault("".join(header), f"{where}: line 1"):
            raise UserError(f"{fault}; convert it")
        if column not in header:
            raise UserError(missing_column(column, header, f"line 1 of {where}"))
        yield from _csv_documents(rows, header, column, where, left_out)


def _csv_documents(
    rows: "CsvReader", header: list[str], column: str, where: str, left_out: LeftOut
) -> Iterator[Document]:
    index = header.index(column)
    while True:
        first_line = rows.line_num + 1
        place = f"{where}: line {first_line}"
        try:
            row = next(rows, None)
        except csv.Error as error:
            if rows.line_num > first_line:  # a quoted field over several lines: where it should have ended is unknown
                left_out.add(f"{place} and all after it: bad CSV: {error}")
                return
            left_out.add(f"{place}: bad CSV: {error}")
            continue
        if row is None:
            return
        if len(row) > len(header):
            left_out.add(f"{place} has more fields than the header; quote its commas")
        elif row:
            yield from left_out.checked(row[index] if index < len(row) else None, column, place)


def _read_parquet(path: Path, column: str, where: str, left_out: LeftOut) -> Iterator[Document]:
    import pyarrow
    from pyarrow import parquet

    row = 0
    try:
        with parquet.ParquetFile(path) as file:
            if column not in file.schema_arrow.names:
                raise UserError(missing_column(column, file.schema_arrow.names, where))
            for batch in file.iter_batches(batch_size=1024, columns=[column]):
                for value in batch.column(0):
                    row += 1
                    place = f"{where}: row {row}"
                    try:
                        text = value.as_py()
                    except UnicodeDecodeError as error:
                        left_out.add(f"{place} is not UTF-8 (byte {error.object[error.start]:#x})")
                    else:
                        yield from left_out.checked(text, column, place)
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:  # the last: names of columns
        if isinstance(error, OSError) and error.errno is not None:  # the disk's fault, not the content's
            raise
        rest = f", from row {row + 1} on," if row else ""
        left_out.add(f"{where}{rest} is not a readable Parquet file: {one_line(error)}")


# (file, data.text_column, the beginning of places and messages, what counts bad documents) -> documents
READERS: dict[str, Callable[[Path, str, str, LeftOut], Iterator[Document]]] = {
    ".txt": _read_txt,
    ".jsonl": _read_jsonl,
    ".csv": _read_csv,
    ".parquet": _read_parquet,
}


def _open_text(path: Path) -> TextIO:
    """Bytes that are not UTF-8 become surrogates, so that only their line is lost; see `encoding_fault`."""
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

"""The documents of .txt, .jsonl, .csv and .parquet files, each with the file and the line that it is on."""

import csv
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TextIO

from jaxlm.data.documents import Document, LeftOut, bad_utf8, no_column, not_text
from jaxlm.errors import UserError, one_line

LONGEST_LINE = 2**28  # characters; a longer one, or a longer CSV field, is a damaged file: a closing quote is missing


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
            try:
                row = json.loads(line)
            except json.JSONDecodeError as error:
                left_out.add(bad_utf8(line, place) or f"{place}: bad JSON at column {error.pos + 1}: {error.msg}")
            except (ValueError, RecursionError) as error:  # a number of thousands of digits; lists in lists in lists
                left_out.add(f"{place}: JSON out of bounds: {one_line(error)}")
            else:
                if not isinstance(row, dict):
                    left_out.add(f"{place} is not a JSON object")
                elif column not in row:
                    left_out.add(no_column(column, row, place))
                elif fault := bad_utf8(line, place) or not_text(row[column], column, place):
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
                raise UserError(no_column(column, header, f"line 1 of {where}"))
            yield from _csv_rows(rows, header.index(column), header, where, left_out)
    finally:
        csv.field_size_limit(limit)


def _header(rows: Any, where: str) -> list[str]:
    try:
        header: list[str] = next(rows, [])
    except csv.Error as error:
        raise UserError(f"{where}: line 1: bad CSV: {error}") from error
    if fault := bad_utf8("".join(header), f"{where}: line 1"):
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
        elif fault := not_text(row[at] if at < len(row) else None, header[at], place):
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
                raise UserError(no_column(column, file.schema_arrow.names, where))
            for batch in file.iter_batches(batch_size=1024, columns=[column]):
                for value in batch.column(0):
                    row += 1
                    place = f"{where}: row {row}"
                    try:
                        text = value.as_py()
                    except UnicodeDecodeError as error:
                        left_out.add(f"{place} is not UTF-8 (byte {error.object[error.start]:#x})")
                        continue
                    if fault := not_text(text, column, place):
                        left_out.add(fault)
                    else:
                        yield Document(text, place)
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
        if isinstance(error, OSError) and error.errno is not None:  # the disk's fault, not the content's
            raise
        rest = f", from row {row + 1} on," if row else ""
        left_out.add(f"{where}{rest} is not a readable Parquet file: {one_line(error)}")


def _open_text(path: Path) -> TextIO:
    """Bytes that are not UTF-8 become halves of surrogate pairs, so that only their line is lost; see `bad_utf8`."""
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


# By extension: (file, data.text_column, what begins the places and messages, what is left out) -> its documents.
READERS: dict[str, Callable[[Path, str, str, LeftOut], Iterator[Document]]] = {
    ".txt": _read_txt,
    ".jsonl": _read_jsonl,
    ".csv": _read_csv,
    ".parquet": _read_parquet,
}

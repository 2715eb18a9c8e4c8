"""Own text files: the patterns that name them, a hash of their content, and their documents.

The documents of plain text (one a file), JSON, tables and Parquet files each know the line or row where they begin.
"""

import bz2
import csv
import glob
import gzip
import hashlib
import io
import json
import lzma
import os
import sys
import zlib
from collections.abc import Callable, Collection, Generator, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from itertools import chain
from pathlib import Path
from typing import IO, Any, NamedTuple, TextIO

from jaxlm.config import DataConfig
from jaxlm.config.mixture import mixture_options
from jaxlm.data.documents import Document, Found, RowFormat, encoding_fault
from jaxlm.data.nested import cleaner
from jaxlm.errors import UserError, one_line

# Extensions of files that are one document each; none at all stands for names such as enwik8 and LICENSE.
PLAIN = """
.txt .text .md .markdown .rst .tex .org .adoc .html .htm .xml .py .pyi .c .h .cc .cpp .cxx .hpp .cu .cuh .m .java .kt
.scala .go .rs .swift .js .mjs .jsx .ts .tsx .vue .css .scss .rb .php .pl .lua .r .jl .hs .ml .ex .erl .clj .lisp .scm
.el .sh .sql .proto .dart .f90 .asm .s .zig .nim .cs .fs .vb .yaml .yml .toml .ini .cfg .srt .log"""
PIECE = 2**24  # bytes of a file of plain text that are read at a time, to the end of a line
ESCAPED = "surrogateescape"  # bytes that are not UTF-8 become lone surrogates, for `encoding_fault` to find
KINDS = "name .jsonl, .json, .csv, .tsv or text such as .txt, .md or .py, also as .gz, .bz2, .xz or .zst; or .parquet"


def find_files(patterns: Iterable[str], field: str) -> tuple[list[Path], str]:
    """The files that `patterns` (paths, globs, folders) name, in the order given, each once; and a name for people.

    The files of a glob are sorted, as are those below a folder; of these, hidden ones and other kinds are left out.

    Raises:
      UserError: it begins with `field`, the option; a pattern names no file, or one with another extension.
    """
    found, others = list[Path](), 0
    for pattern in patterns:
        if not pattern:
            raise UserError(f"{field} is empty; name a file or a folder, or leave it out")
        path = os.path.expanduser(pattern)
        is_glob = glob.has_magic(pattern) and not os.path.exists(path)
        paths = [Path(match) for match in sorted(glob.glob(path, recursive=True))] if is_glob else [Path(path)]
        if not paths:
            raise UserError(f"{field} ({pattern}) matches no file")
        for file in paths:
            where = f"{field} ({file})"
            if os.path.isdir(file):
                inside = below(file)
                texts = [path for path in inside if _kind(path) in READERS and path.suffix]
                found, others = found + texts, others + len(inside) - len(texts)
                if not texts:
                    raise UserError(f"{where} is a folder without texts; {KINDS}")
            elif not os.path.exists(file):  # unlike Path.exists, no error where a name is too long or a folder closed
                raise UserError(f"{where} does not exist, or is out of reach")
            elif _kind(file) not in READERS:
                raise UserError(f"{where} has an unknown extension ({file.suffix}); {KINDS}")
            else:
                found.append(file)
    once = list({os.path.realpath(file): file for file in reversed(found)}.values())[::-1]
    name = str(once[0]) if len(once) == 1 else f"{len(once)} files ({once[0]} ...)" if once else "no files"
    name += f", {len(found) - len(once)} named twice, read once" * (len(found) > len(once))
    return once, name + f", {others} of other kinds left out" * (others > 0)


def check_names(data: DataConfig) -> None:
    """Raises UserError if data names a file that is not there, or of no known kind; doesn't look into folders."""
    sources = (("data.sources", patterns) for patterns in mixture_options(data).files.values())
    own = ("data.train_files", data.train_files), ("data.validation_files", data.validation_files)
    for field, patterns in (*own, *sources):
        find_files([path for path in patterns if not os.path.isdir(os.path.expanduser(path))], field)


def below(folder: Path, without: Collection[str] = ()) -> list[Path]:
    """All files below `folder`, sorted by their path, but for hidden ones.

    Subfolders called as in `without` are not even listed: they can be large.
    """
    names, above = [], len(os.path.join(folder, ""))
    for at, folders, found in os.walk(folder):
        folders[:] = [name for name in folders if name not in without and not name.startswith(".")]
        names += [os.path.join(at, name)[above:] for name in found if not name.startswith(".")]
    return [folder / name for name in sorted(names)]


def hash_files(paths: Iterable[Path], field: str) -> tuple[str, dict[bytes, Path]]:
    """SHA-256 of extensions and content, in order; and the digests of the files.

    Raises:
      UserError: it begins with `field`, the option; a file cannot be read.
    """
    digest, files = hashlib.sha256(), {}
    for path in paths:
        with reading(f"{field} ({path})"), path.open("rb") as file:
            of_file = hashlib.file_digest(file, "sha256").digest()
        kind = path.suffix.lower() if path.suffix.lower() not in COMPRESSED else _kind(path) + path.suffix.lower()
        digest.update(kind.encode() + of_file)
        files[of_file] = path
    return digest.hexdigest(), files


def text_size(paths: Iterable[Path]) -> int | None:
    """The bytes of all `paths`; None where some are compressed, and have more text than that."""
    paths = [*paths]
    packed = any(path.suffix.lower() in COMPRESSED or _kind(path) == ".parquet" for path in paths)
    return None if packed else sum(path.stat().st_size for path in paths)


def read_files(paths: Iterable[Path], format_: RowFormat, field: str) -> Found:
    """The documents of all `paths`: those of rows as `format_` makes them, and files of plain text.

    Raises:
      UserError: it begins with `field`, the option; a file cannot be read, or lacks a column.
    """
    for row in _rows(paths, format_.columns, field):
        if isinstance(row, UserError):
            yield row
        elif not isinstance(row.values, str):
            yield format_.document(row.values, row.place)
        elif format_.kind == "text":
            yield Document(row.values, row.place, more=row.more)
        else:
            yield UserError(f"data.format ({format_.kind}): {row.place} is plain text")


def first_row(paths: Iterable[Path], columns: Collection[str], field: str) -> Mapping[str, Any] | None:
    """What the first good row of `paths` holds, of a table in `columns` and no others if it has any of these.

    None where the first good thing in them is plain text, or nothing.
    """
    rows = _rows(paths, lambda names, _: [name for name in names if name in columns] or [*names][:1], field)
    try:
        values = next((row.values for row in rows if not isinstance(row, UserError)), None)
    finally:
        rows.close()
    return None if isinstance(values, str) else values


class Row(NamedTuple):
    """What a row or a file of plain text holds, and its place; or a piece of such a file, in which there is `more`."""

    values: Mapping[str, Any] | str
    place: str
    more: bool = False


Rows = Generator[Row | UserError]
Columns = Callable[[Collection[str], str], list[str]]  # of a table's columns (and where it is): those that are needed


def _rows(paths: Iterable[Path], columns: Columns, field: str) -> Rows:
    for path in paths:
        where = f"{field} ({path})"
        with reading(where):
            if not path.stat().st_size:
                yield UserError(f"{where} is empty")
                continue
            try:
                yield from READERS[_kind(path)](path, columns, where)
            except (EOFError, OSError, zlib.error, lzma.LZMAError) as error:
                if isinstance(error, OSError) and error.errno is not None:  # the disk's fault, not the content's
                    raise
                yield UserError(f"{where} is damaged: {one_line(error)}")


@contextmanager
def reading(where: str) -> Iterator[None]:
    """Makes what is wrong with reading a file a UserError, which `where` begins."""
    try:
        yield
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{where} cannot be read: {one_line(error)}") from error


# ---- One reader a format ---------------------------------------------------------------------------------------------


def _read_txt(path: Path, columns: Columns, where: str) -> Rows:
    with _open(path) as file:
        size = min(PIECE, path.stat().st_size)  # not PIECE: Python would make room for all of it
        piece = file.read(size) + file.readline()
        text = text_of(piece)
        while following := file.read(size) + file.readline() if len(piece) >= size else b"":
            yield Row(text, where, more=True)
            piece, text = following, following.decode(errors=ESCAPED)
        yield Row(text, where)


def text_of(content: bytes) -> str:
    """The text of a file that begins with `content`; see `encoding_fault`."""
    return content.decode(errors=ESCAPED).removeprefix("\ufeff")


def _read_jsonl(path: Path, columns: Columns, where: str) -> Rows:
    with _open_text(path) as file:
        for number, line in enumerate(file, 1):
            if not line.isspace():
                place = f"{where}: line {number}"
                yield encoding_fault(line, place) or _row(_json_value(line, place), place)


def _json_value(text: str, place: str) -> object:
    """What the JSON of `text` says, or the error."""
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        return UserError(f"{place}: bad JSON at character {error.pos + 1}: {error.msg}")
    except (ValueError, RecursionError) as error:  # a number of thousands of digits; lists in lists in lists
        return UserError(f"{place}: JSON out of bounds: {one_line(error)}")


def _row(value: object, place: str) -> Row | UserError:
    if isinstance(value, UserError):
        return value
    return Row(value, place) if isinstance(value, dict) else UserError(f"{place} is not a JSON object")


def _read_json(path: Path, columns: Columns, where: str) -> Rows:
    """A list of objects, one object, or an object a line."""
    with _open_text(path) as file:
        rows = _json_value(file.read(), where)
    if not isinstance(rows, UserError):
        rows = rows if isinstance(rows, list) else [rows]
        yield from (_row(row, f"{where}: item {number}") for number, row in enumerate(rows, 1))
    elif ": Extra data" in str(rows):
        yield from _read_jsonl(path, columns, where)
    else:
        yield rows


def _read_csv(path: Path, columns: Columns, where: str, delimiter: str = ",") -> Rows:
    csv.field_size_limit(sys.maxsize)  # of the process; the default, 128 kB, is less than many documents
    with _open_text(path) as file:
        rows = csv.reader(file, strict=True, delimiter=delimiter)
        try:
            header = next(rows, [])
        except csv.Error as error:
            raise UserError(f"{where}: line 1: bad CSV: {error}") from error
        if fault := encoding_fault("".join(header), f"{where}: line 1"):
            raise fault
        wanted = [(name, header.index(name)) for name in columns(header, f"line 1 of {where}")]
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
                yield UserError(f"{place} has more fields than the header; quote those with a {delimiter!r} inside")
            elif row:
                yield Row({name: row[index] if index < len(row) else None for name, index in wanted}, place)


def _read_parquet(path: Path, columns: Columns, where: str) -> Rows:
    import pyarrow
    from pyarrow import parquet

    row = 0
    try:
        with parquet.ParquetFile(path) as file:
            wanted = columns(file.schema_arrow.names, where)  # "a.b" may be b of a, too
            batches = file.iter_batches(batch_size=1024, columns=wanted)
            schema = file.schema_arrow
            clean = [cleaner(schema.field(schema.names.index(name)).type) for name in wanted]
            columns_of = lambda batch: [batch.column(batch.schema.names.index(name)) for name in wanted]  # noqa: E731
            cells = chain.from_iterable(zip(*columns_of(batch), strict=True) for batch in batches)
            for row, values in enumerate(cells, 1):
                place = f"{where}: row {row}"
                try:
                    found = zip(wanted, clean, values, strict=True)
                    yield Row({name: cleaned(x.as_py()) for name, cleaned, x in found}, place)
                except UnicodeDecodeError as error:
                    yield UserError(f"{place} is not UTF-8 (byte {error.object[error.start]:#x})")
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:  # the last: names of columns
        if isinstance(error, OSError) and error.errno is not None:  # the disk's fault, not the content's
            raise
        rest = f", from row {row + 1} on," if row else ""
        yield UserError(f"{where}{rest} is not a readable Parquet file: {one_line(error)}")


# (file, the columns needed, the beginning of places and messages) -> rows
READERS: dict[str, Callable[[Path, Columns, str], Rows]] = {
    **dict.fromkeys(["", *PLAIN.split()], _read_txt),
    ".jsonl": _read_jsonl,
    ".ndjson": _read_jsonl,
    ".json": _read_json,
    ".csv": _read_csv,
    ".tsv": partial(_read_csv, delimiter="\t"),
    ".parquet": _read_parquet,
}


def _open_zst(path: Path, mode: str) -> IO[bytes]:
    import pyarrow

    return io.BufferedReader(pyarrow.CompressedInputStream(pyarrow.OSFile(str(path)), "zstd"))


COMPRESSED: dict[str, Callable[..., Any]] = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open, ".zst": _open_zst}


def _kind(path: Path) -> str:
    """What decides how a file is read: its extension, or that before .gz and the like; parquet is never compressed."""
    *_, kind, last = ["", "", *(suffix.lower() for suffix in path.suffixes)]
    return kind if last in COMPRESSED and kind != ".parquet" else last


def _open(path: Path) -> IO[bytes]:
    opened: IO[bytes] = COMPRESSED.get(path.suffix.lower(), Path.open)(path, "rb")
    return opened


def _open_text(path: Path) -> TextIO:
    """Bytes that are not UTF-8 become surrogates, so that only their line is lost; see `encoding_fault`."""
    return io.TextIOWrapper(_open(path), encoding="utf-8-sig", errors=ESCAPED, newline="")

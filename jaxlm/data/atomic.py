"""The one way to write a file or a folder whole: under another name beside it, then renamed."""

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import FileLock

from jaxlm.errors import UserError


@contextmanager
def atomic_path(path: Path, goes_on: bool = False) -> Iterator[Path]:
    """Yields `.NAME.part` beside `path`, for a file or a folder that is renamed to `path` when the block ends.

    It is on the disk by then, so that even a power cut leaves the old content or the new. If the block raises or writes
    nothing, `path` stays as it was. A file replaces a file, a folder only an empty one: else `OSError` is raised.
    Of several processes that write the same path, the others wait, and the next removes what a killed one has left;
    with `goes_on` it is given that, unless the block ended with a UserError.
    """
    part = _part_of(path)
    check_writable(path.parent)
    with FileLock(path.with_name(f".{path.name}.lock")) as lock:
        if not goes_on:
            _remove(part)
        try:
            yield part
            if part.exists():
                for written in part.rglob("*"):
                    with suppress(FileNotFoundError):  # a lock, say, of another process that shares the folder
                        sync(written)
                sync(part)
                part.replace(path)
                sync(path.parent)
        except UserError:
            _remove(part)
            raise
        finally:
            if not goes_on:
                _remove(part)
            _remove(Path(lock.lock_file))  # filelock lets a process that waits for a deleted file begin again


@contextmanager
def shared_part(path: Path) -> Iterator[Path]:
    """Yields the folder that `atomic_path(path, goes_on=True)` goes on with, for several processes to write into.

    It is removed if the block ends with a UserError.
    """
    part = _part_of(path)
    part.mkdir(exist_ok=True)
    try:
        yield part
    except UserError:
        _remove(part)
        raise


def atomic_write(path: Path, text: str) -> None:
    """Writes `text` as UTF-8 to `path`, whole or not at all."""
    with atomic_path(path) as part:
        part.write_text(text, encoding="utf-8")


def check_writable(folder: Path) -> None:
    """Raises OSError where no file can be made: filelock would wait for ever, or make a folder that is missing."""
    with tempfile.TemporaryFile(dir=folder):
        pass


def sync(path: Path) -> None:
    """Returns when the file, or the folder's list of files, is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _part_of(path: Path) -> Path:
    return path.with_name(f".{path.name}.part")


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)

"""Whether a saved folder is complete and undamaged: a manifest of all of its files, written last, checked on load.

Orbax restores an array with a flipped bit without a word; a digest of every file leaves no such doubt.
"""

import hashlib
import json
import os
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

MANIFEST = "manifest.json"
THREADS = 8  # hashing lets go of the interpreter's lock


def seal(folder: Path, final: Path) -> None:
    """Writes the manifest of `folder`, waits until all of it is on the disk, and renames it to `final`.

    So `final` is complete whenever it exists, even after a power cut.
    """
    folders, files = [folder], []
    for parent, inner, names in os.walk(folder):
        folders += [Path(parent, name) for name in inner]
        files += [Path(parent, name) for name in names]
    with ThreadPoolExecutor(THREADS) as pool:
        entries = pool.map(_entry, files)
        listed = {str(path.relative_to(folder)): entry for path, entry in zip(files, entries, strict=True)}
    manifest = folder / MANIFEST
    manifest.write_text(json.dumps({"sha256": listed, "of_these": _digest_of(listed)}, indent=1), encoding="utf-8")
    for path in (manifest, *folders):
        sync(path)
    folder.rename(final)
    sync(final.parent)


def _entry(path: Path) -> str:
    sync(path)
    return _digest(path)


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _digest_of(listed: Any) -> str:
    return hashlib.sha256(json.dumps(listed, sort_keys=True).encode()).hexdigest()


def sync(path: Path) -> None:
    """Returns when the file or the folder's list of files is on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def is_sealed(folder: Path) -> bool:
    """Whether `folder` was saved to its end; what happened to it since is for `damage` to say."""
    return (folder / MANIFEST).is_file()


def damage(folder: Path, items: Iterable[str] | None = None, part: int = 0, parts: int = 1) -> str | None:
    """What is wrong with a sealed folder, in a few words that name the file; None if nothing is.

    Args:
      items: the entries of `folder` to look into; None: all of them.
      part: of `parts` equal ones, the one to look into.
    """
    try:
        listed = _read(folder / MANIFEST)
    except FileNotFoundError:
        return f"{MANIFEST} is missing, so it was not saved to its end"
    except (OSError, ValueError) as error:
        return f"{MANIFEST} is not readable ({error})"
    if items is not None:
        wanted = tuple(f"{item}/" for item in items)
        listed = {name: digest for name, digest in listed.items() if name.startswith(wanted)}
    listed = dict(list(listed.items())[part::parts])
    with ThreadPoolExecutor(THREADS) as pool:
        found = pool.map(lambda name: _wrong(folder / name, listed[name]), listed)
        return next((f"{name} {wrong}" for name, wrong in zip(listed, found, strict=True) if wrong), None)


def _read(path: Path) -> dict[str, str]:
    content: Any = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(content, dict) or content.keys() != {"sha256", "of_these"}:
        raise ValueError("not a manifest")
    if _digest_of(content["sha256"]) != content["of_these"]:
        raise ValueError("not as it was saved")
    return content["sha256"]


def _wrong(path: Path, digest: str) -> str | None:
    try:
        return None if _digest(path) == digest else "is not as it was saved"
    except FileNotFoundError:
        return "is missing"
    except OSError as error:
        return f"is not readable ({error.strerror})"

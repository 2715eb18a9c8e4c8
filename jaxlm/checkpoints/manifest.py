"""The manifest of a saved folder, a digest of each file, written last: shows whether it is complete and undamaged.

Orbax itself restores an array with a flipped bit without an error.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from jaxlm.data.atomic import sync

MANIFEST = "manifest.json"
PREFIX, MODELS = "checkpoint", ("best_model", "final_model", "average_model")  # names in a run's folder
THREADS = 8  # hashing releases the interpreter's lock


def seal(folder: Path, final: Path) -> None:
    """Writes the manifest of `folder`, waits until all of it is on the disk, and puts it in the place of `final`.

    So `final` is complete whenever it exists, even after a power cut; what was there before is `.old` for a moment.
    """
    content = list(folder.rglob("*"))
    files = {str(path.relative_to(folder)): path for path in content if path.is_file()}
    with ThreadPoolExecutor(THREADS) as pool:
        list(pool.map(sync, content))
        listed = dict(zip(files, pool.map(_digest, files.values()), strict=True))
    manifest = folder / MANIFEST
    manifest.write_text(json.dumps({"sha256": listed, "of_these": _digest_of(listed)}, indent=1), encoding="utf-8")
    sync(manifest)
    sync(folder)
    old = final.with_name(final.name + ".old")
    if final.exists() and final != folder:
        final.rename(old)
    folder.rename(final)
    sync(final.parent)
    shutil.rmtree(old, ignore_errors=True)


def is_sealed(folder: Path) -> bool:
    """Whether `folder` was saved completely; `damage` says what has happened to it since."""
    return os.path.isfile(folder / MANIFEST)  # False, too, where one may not look


def numbered(folder: Path) -> dict[int, Path]:
    """{step: path} of what is called a checkpoint in a run's folder, in order."""
    steps = {path: path.name.removeprefix(f"{PREFIX}_") for path in folder.glob(f"{PREFIX}_*")}
    return dict(sorted((int(step), path) for path, step in steps.items() if step.isdecimal()))


def model_in(folder: Path) -> Path:
    """What a run's folder stands for: the first that is there of MODELS, else its newest checkpoint."""
    if os.path.isdir(folder / "params"):
        return folder
    saved = [*(folder / name for name in MODELS), *reversed(numbered(folder).values())]
    return next((path for path in saved if is_sealed(path)), folder)


def damage(folder: Path, items: Iterable[str] | None = None, part: int = 0, parts: int = 1) -> str | None:
    """The first damage found in a sealed folder, in a few words that name the file; None if there is none.

    Args:
      items: the entries of `folder` to check; None: all of them.
      part: which of `parts` equal shares of the files to check.
    """
    try:
        content = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        listed = content["sha256"]
        if content["of_these"] != _digest_of(listed):
            raise ValueError("not as it was saved")
    except FileNotFoundError:
        return f"{MANIFEST} is missing, so it was not saved to its end"
    except (OSError, ValueError, LookupError, TypeError) as error:
        return f"{MANIFEST} is not readable ({error})"
    wanted = ("",) if items is None else tuple(f"{item}/" for item in items)
    names = [name for name in listed if name.startswith(wanted)][part::parts]
    with ThreadPoolExecutor(THREADS) as pool:
        faults = pool.map(lambda name: _fault(folder / name, listed[name]), names)
        return next((f"{name} {fault}" for name, fault in zip(names, faults, strict=True) if fault), None)


def _fault(path: Path, digest: str) -> str | None:
    try:
        return None if _digest(path) == digest else "is not as it was saved"
    except FileNotFoundError:
        return "is missing"
    except OSError as error:
        return f"is not readable ({error.strerror})"


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _digest_of(listed: dict[str, str]) -> str:
    return hashlib.sha256(json.dumps(listed, sort_keys=True).encode()).hexdigest()

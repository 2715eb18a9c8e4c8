"""A run's folder: whose it is, which checkpoints are in it, and putting it in order after a crash.

What is being saved has a name that ends in ".new"; what is being deleted, one that ends in ".old". Everything else is
complete.
"""

import itertools
import os
import re
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import jax
from filelock import FileLock, Timeout

from jaxlm.checkpoints.manifest import damage, is_sealed
from jaxlm.errors import UserError
from jaxlm.parallel.processes import barrier, is_leader, say, text_from_any_process

PREFIX = "checkpoint"
MODELS = ("best_model", "final_model")


def open_folder(folder: Path, fresh: bool) -> FileLock:
    """Makes the run's folder this run's own, after moving an old one aside if `fresh`.

    Returns:
      the lock that keeps other runs out, held by the leader; within one process it can be taken again.

    Raises:
      UserError: it cannot be written to, or another run is using it.
    """
    where = f"training.checkpoint_dir ({folder})"
    lock = FileLock(folder / ".lock", timeout=0, is_singleton=True)
    with writing_to(folder):
        try:
            if fresh and folder.exists() and is_leader():
                with lock:
                    aside = _unused(folder.with_name(f"{folder.name}.{time.strftime('%Y%m%d_%H%M%S')}"))
                    folder.rename(aside)
                say(f"moved aside: {folder} is now {aside}")
            barrier("moved the old folder aside")
            folder.mkdir(parents=True, exist_ok=True)
            probe = folder / f".write_test_{jax.process_index()}_{os.getpid()}"
            probe.touch()
            probe.unlink()
            if is_leader():
                lock.acquire()
        except Timeout as error:  # which is an OSError
            raise UserError(f"{where}: another run is using it; wait for its end, or name another folder") from error
    return lock


def _unused(path: Path) -> Path:
    """`path`, or that name with a number where clocks have jumped or somebody was quick."""
    numbered = (path.with_name(f"{path.name}_{i}") for i in itertools.count(2))
    return path if not path.exists() else next(name for name in numbered if not name.exists())


@contextmanager
def writing_to(folder: Path) -> Iterator[None]:
    """Makes an error of the block's writing to the run's folder one of the user's."""
    try:
        yield
    except OSError as error:
        raise UserError(
            f"training.checkpoint_dir ({folder}): cannot be written to ({error.strerror}); mend that or name another "
            "folder"
        ) from error


def new_name(path: Path) -> Path:
    """Where what will be `path` is written; `clean` removes what a crash left of it."""
    return path.with_name(path.name + ".new")


def delete(path: Path) -> None:
    """Deletes a folder, such that a crash leaves no part of it under its name."""
    old = path.with_name(path.name + ".old")
    path.rename(old)
    shutil.rmtree(old)


def clean(folder: Path) -> None:
    """Puts a run's folder in order after a crash: a model between two renames is put back, unfinished saves go.

    For the leader alone, while nothing is being saved.
    """
    for name in MODELS:
        old = folder / f"{name}.old"
        if is_sealed(old) and not (folder / name).exists():
            old.rename(folder / name)
    for name in (f"{PREFIX}_*", *MODELS):
        for leftover in (*folder.glob(f"{name}.new*"), *folder.glob(f"{name}.old")):
            shutil.rmtree(leftover, ignore_errors=True)


def checkpoint_steps(folder: Path) -> dict[int, Path]:
    """{step: path} of the complete checkpoints in a run's folder, in order."""
    return {step: path for step, path in _numbered(folder).items() if is_sealed(path)}


def _numbered(folder: Path) -> dict[int, Path]:
    found = {}
    for path in folder.glob(f"{PREFIX}_*"):
        step = re.fullmatch(rf"{PREFIX}_(\d+)", path.name)
        if step:
            found[int(step[1])] = path
    return dict(sorted(found.items()))


def _damage(path: Path) -> str | None:
    """As `manifest.damage`; all processes call it together, and each looks into its part."""
    return text_from_any_process(damage(path, part=jax.process_index(), parts=jax.process_count()))


def is_intact(path: Path) -> bool:
    """Whether there is a complete folder at `path`, as it was saved."""
    return is_sealed(path) and _damage(path) is None


def newest_intact(folder: Path, report: Callable[[str], None]) -> Path | None:
    """The newest checkpoint that is as it was saved, if there is any; damaged ones are reported and left out.

    Raises:
      UserError: there are checkpoints, but all are damaged.
    """
    steps = list(checkpoint_steps(folder).values())
    for path in reversed(steps):
        wrong = _damage(path)
        if wrong is None:
            return path
        if path == steps[0]:
            raise UserError(
                f"{folder}: all of its checkpoints ({len(steps)}) are damaged, the last: {wrong}; --fresh starts over"
            )
        report(f"{path} is damaged: {wrong}; the checkpoint before it is tried")
    return None


def find_checkpoint(path: str, folder: Path, report: Callable[[str], None]) -> Path:
    """The checkpoint that `training.resume_from_checkpoint` names: a folder, or "latest" of the run in `folder`.

    Raises:
      UserError: there is none, or it is damaged.
    """
    where = f"training.resume_from_checkpoint ({path})"
    if path == "latest":
        newest = newest_intact(folder, report)
        if newest is None:
            raise UserError(f"{where}: no checkpoint in {folder}; leave it out to start there")
        return newest
    chosen = Path(path)
    if not chosen.is_dir():
        raise UserError(f"{where}: no such folder; name a {PREFIX}_<step> folder, or latest")
    if not (chosen / "optimizer").is_dir() or not (chosen / "params").is_dir():
        inside = checkpoint_steps(chosen)
        hint = f"one of its checkpoints, such as {inside[max(inside)]}" if inside else f"a {PREFIX}_<step> folder"
        raise UserError(f"{where}: is not a checkpoint folder; name {hint}")
    wrong = _damage(chosen)
    if wrong is not None:
        raise UserError(f"{where}: is damaged: {wrong}; name another")
    return chosen


def move_later_aside(folder: Path, step: int) -> list[Path]:
    """Moves checkpoints beyond `step` into `<folder>/aside_<time>/`, so that a run can go on from `step`.

    For the leader alone, before any process opens the checkpoints.
    """
    later = [path for number, path in _numbered(folder).items() if number > step]
    if later:
        aside = _unused(folder / time.strftime("aside_%Y%m%d_%H%M%S"))
        aside.mkdir()
        for path in later:
            path.rename(aside / path.name)
    return later

"""A run's folder: its lock, the checkpoints in it, and putting it in order after a crash.

The name of a folder that is being saved ends in ".new", and of one that is being deleted in ".old". All others are
complete.
"""

import itertools
import os
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import jax
from filelock import FileLock, Timeout

from jaxlm.checkpoints.items import read_progress
from jaxlm.checkpoints.manifest import MODELS, PREFIX, damage, is_sealed, numbered
from jaxlm.data.atomic import check_writable
from jaxlm.errors import UserError
from jaxlm.parallel.processes import barrier, is_leader, say, text_from_any_process

AUTOTUNING = "autotuning.txt"  # what XLA has found fastest, see run/autotuning.py; it reads text where a name ends so
TIME_FORMAT = "%Y%m%d_%H%M%S"


class RunFolder:
    """The run's folder, made if it is not there, with the lock that keeps other runs out, held by the leader.

    Within one process the lock can be taken again. As a context it puts everything back if the block ends by an error:
    a start that is refused leaves nothing behind.

    Args:
      fresh: an old folder is moved aside first.

    Raises:
      UserError: the folder cannot be written to, or another run is using it.
    """

    def __init__(self, folder: Path, fresh: bool) -> None:
        self.folder = folder
        self._aside: Path | None = None
        self._lock = FileLock(folder / ".lock", timeout=0, is_singleton=True)
        with writing_to(folder):
            if fresh and folder.exists() and is_leader():
                with self._lock:
                    self._aside = _unused(folder.with_name(f"{folder.name}.{time.strftime(TIME_FORMAT)}"))
                    folder.rename(self._aside)
                say(f"moved aside: {folder} is now {self._aside}")
            barrier("moved the old folder aside")
            self._made = [path for path in (folder, *folder.parents) if not path.exists()]
            folder.mkdir(parents=True, exist_ok=True)
            if is_leader():
                check_writable(folder)
                self._lock.acquire()

    def hold(self) -> None:
        """Takes the lock again, if it has been released in this process."""
        if is_leader() and not self._lock.is_locked:
            with writing_to(self.folder):
                self._lock.acquire()

    def release(self) -> None:
        """Lets other runs in."""
        self._lock.release(force=True)

    def put_back(self) -> None:
        """Releases it, and removes what was made if nothing has been written there since; an old one is moved back."""
        if not self.folder.is_dir():  # it has been put back before
            self._lock.release()
            return
        empty = is_leader() and {path.name for path in self.folder.iterdir()} <= {".lock", AUTOTUNING}
        if empty and self._made:
            (self.folder / AUTOTUNING).unlink(missing_ok=True)
            (self.folder / ".lock").unlink(missing_ok=True)  # while it is held: nobody else gets this one any more
        self._lock.release()
        with suppress(OSError):  # another process has begun to use it
            for path in self._made if empty else ():
                path.rmdir()
            if empty and self._aside is not None:
                self._aside.rename(self.folder)
                say(f"moved back: {self._aside} is {self.folder} again")

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is not None:
            self.put_back()


@contextmanager
def writing_to(folder: Path) -> Iterator[None]:
    """Makes an error of the block's writing to the run's folder one of the user's."""
    try:
        yield
    except OSError as error:
        message = f"cannot be written to ({error.strerror}); mend that or name another folder"
        if isinstance(error, Timeout):  # of the lock
            where = f"training.checkpoint_dir ({folder})"
            raise UserError(f"{where}: another run is using it; wait for its end, or name another folder") from error
        raise UserError(f"training.checkpoint_dir ({folder}): {message}") from error


def new_name(path: Path) -> Path:
    """The path at which `path` is written, until it is complete; `clean` removes what a crash left there."""
    return path.with_name(path.name + ".new")


def clean(folder: Path) -> None:
    """Puts back a model that a crash left between two renames, deletes unfinished saves.

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
    return {step: path for step, path in numbered(folder).items() if is_sealed(path)}


def newest_intact(folder: Path, report: Callable[[str], None]) -> Path | None:
    """The newest undamaged checkpoint, if there is any; newer ones that are damaged are reported.

    Raises:
      UserError: there are checkpoints, but all are damaged.
    """
    checkpoints = list(checkpoint_steps(folder).values())
    for path in reversed(checkpoints):
        fault = damage_anywhere(path)
        if fault is None:
            return path
        if path == checkpoints[0]:
            hint = f"all of its checkpoints ({len(checkpoints)}) are damaged, the last: {fault}; --fresh starts over"
            raise UserError(f"{folder}: {hint}")
        report(f"{path} is damaged: {fault}; the checkpoint before it is tried")
    return None


def find_checkpoint(path: str) -> Path:
    """The checkpoint folder that `training.resume_from_checkpoint` names; UserError if there is none, or damaged."""
    where = f"training.resume_from_checkpoint ({path})"
    chosen = Path(path).expanduser()
    if not os.path.isdir(chosen / "optimizer"):  # which says no, too, where one may not look
        problem = "is not a checkpoint folder" if os.path.isdir(chosen) else "no such folder"
        inside = list(checkpoint_steps(chosen).values())
        hint = f"one of its checkpoints, such as {inside[-1]}" if inside else f"a {PREFIX}_<step> folder, or latest"
        raise UserError(f"{where}: {problem}; name {hint}")
    if fault := damage_anywhere(chosen):
        raise UserError(f"{where}: is damaged: {fault}; name another")
    return chosen


def move_later_aside(folder: Path, step: int) -> list[Path]:
    """Moves checkpoints beyond `step` into `<folder>/aside_<time>/`, so that a run can go on from `step`; returns them.

    Models beyond it, which the run may replace, are copied there. For the leader alone, before any process opens the
    checkpoints.
    """
    later = [path for number, path in numbered(folder).items() if number > step]
    if later:
        aside = _unused(folder / f"aside_{time.strftime(TIME_FORMAT)}")
        aside.mkdir()
        for model in filter(is_sealed, (folder / name for name in MODELS)):
            with suppress(UserError):  # it is damaged: nothing is lost with it
                if (made := read_progress(model).step) > step:
                    shutil.copytree(model, aside / model.name)
                    say(f"copied aside: {model.name}, of step {made}; it also stays, until it is replaced")
        for path in later:  # last: where the copies can't be made, the next start tries again
            path.rename(aside / path.name)
    return later


def damage_anywhere(path: Path) -> str | None:
    """As `damage`; all processes call it together, and each checks its share of the files."""
    return text_from_any_process(damage(path, part=jax.process_index(), parts=jax.process_count()))


def _unused(path: Path) -> Path:
    """`path`, or that name with a number if it exists: a clock has jumped, or two runs start in the same second."""
    numbered = (path.with_name(f"{path.name}_{i}") for i in itertools.count(2))
    return next(name for name in itertools.chain([path], numbered) if not name.exists())

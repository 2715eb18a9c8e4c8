"""Saving checkpoints and models with Orbax."""

import errno
import gc
import logging
import os
import shutil
import sys
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path

import jax
import orbax.checkpoint as ocp
from absl import logging as absl_logging

from jaxlm.checkpoints.folder import checkpoint_steps, clean, new_name
from jaxlm.checkpoints.items import Progress, write_json_items
from jaxlm.checkpoints.manifest import PREFIX, seal
from jaxlm.config import Config
from jaxlm.data.tokenizer import Tokenizer
from jaxlm.parallel.processes import is_leader, text_from_any_process
from jaxlm.parallel.split import Params
from jaxlm.train.step import TrainState

OPTIMIZER_ITEM = ("step", "skipped", "loss_scale", "opt_state")  # of TrainState
# Copies of an array on several devices each write their part of it where the parts are as large; each part is cut out
# by a program of its own, which takes longer to compile than a smaller array to write.
SMALLEST_PART_BYTES = 2**20
SAVE_ERRORS = (OSError, ValueError, RuntimeError)  # of files; of tensorstore; of the other processes, as JAX puts it


@contextmanager
def quiet_orbax() -> Iterator[None]:
    """Silences what Orbax says of each save, and what asyncio and Python say of each write of a save that failed.

    Such a failure is one error, and it is raised.
    """
    asyncio_log, hook = logging.getLogger("asyncio"), sys.unraisablehook
    with ExitStack() as restored, warnings.catch_warnings():
        restored.callback(asyncio_log.setLevel, asyncio_log.level)
        restored.callback(absl_logging.set_verbosity, absl_logging.get_verbosity())
        restored.callback(setattr, sys, "unraisablehook", hook)
        asyncio_log.setLevel(logging.CRITICAL)
        absl_logging.set_verbosity(absl_logging.FATAL)
        sys.unraisablehook = lambda raised: None if "Event loop is closed" in str(raised.exc_value) else hook(raised)
        warnings.filterwarnings("ignore", r"coroutine '.*\.write_fragment' was never awaited", RuntimeWarning)
        yield


def _arrays() -> ocp.PyTreeCheckpointHandler:
    """Writes a tree of arrays, in the form that Orbax's StandardCheckpointer reads."""
    handler = ocp.type_handlers.ArrayHandler(min_slice_bytes_for_replica_parallel=SMALLEST_PART_BYTES)
    registry = ocp.type_handlers.create_type_handler_registry((jax.Array, handler))
    return ocp.PyTreeCheckpointHandler(type_handler_registry=registry)


class Checkpoints:
    """The `checkpoint_<step>` folders of a run, the newest `limit` of them (None: all), written in the background.

    A save that fails, on a full disk for one, is reported and given up; those before it stay.
    """

    def __init__(self, folder: Path, limit: int | None, report: Callable[[str], None]) -> None:
        self.folder, self.limit, self.report = folder.resolve(), limit, report
        self.failed: str | None = None  # why the last save failed, if it did
        self.any_failed = False  # or a save of a model in this run, which whoever made it notes here
        self._orbax = ocp.AsyncCheckpointer(ocp.CompositeCheckpointHandler(params=_arrays(), optimizer=_arrays()))
        self._saving: tuple[int, Future[None]] | None = None
        self._thread = ThreadPoolExecutor(1, "save")
        self._open = ExitStack()
        self._open.enter_context(quiet_orbax())

    def save(self, state: TrainState, config: Config, tokenizer: Tokenizer, progress: Progress) -> None:
        """Saves atomically, in the background; a step that is there already stays as it is."""
        self.wait()
        final = self.folder / f"{PREFIX}_{progress.step}"
        if final.exists():
            return
        arrays = {"params": state.params, "optimizer": {name: getattr(state, name) for name in OPTIMIZER_ITEM}}
        args = ocp.args.Composite(**{item: ocp.args.PyTreeSave(tree) for item, tree in arrays.items()})
        try:
            _check_room(self.folder, state)
            self._orbax.save(new_name(final), args=args, force=True)
            self._saving = progress.step, self._thread.submit(self._finish, final, config, tokenizer, progress)
        except SAVE_ERRORS as error:
            self._give_up(progress.step, error)

    def _finish(self, final: Path, config: Config, tokenizer: Tokenizer, progress: Progress) -> None:
        """Makes a checkpoint of what Orbax has written, and only then deletes old ones."""
        self._orbax.wait_until_finished()
        if is_leader():
            write_json_items(new_name(final), config, tokenizer, progress)
            seal(new_name(final), final)
            if self.limit:
                for path in list(checkpoint_steps(self.folder).values())[: -self.limit]:
                    shutil.rmtree(path.rename(f"{path}.old"))  # so that a crash leaves no part of it under its name

    def wait(self) -> None:
        """Returns when the last save is on disk, or was given up."""
        if self._saving is not None:
            step, future = self._saving
            self._saving = None
            try:
                future.result()
                self.failed = None
            except SAVE_ERRORS as error:
                self._give_up(step, error)

    def newest(self) -> Path | None:
        """The newest checkpoint, once the last save is on disk."""
        self.wait()
        return next(reversed(checkpoint_steps(self.folder).values()), None)

    def _give_up(self, step: int, error: Exception) -> None:
        self.failed, self.any_failed = reason_of(error), True
        self.report(f"checkpoint_{step} was NOT saved: {self.failed}; the checkpoints before it stay")
        if is_leader():
            clean(self.folder)

    def close(self) -> None:
        self.wait()
        self._thread.shutdown()
        self._orbax.close()
        if self.any_failed:
            gc.collect()  # writes that were never begun, while what Python says of them is still dropped
        self._open.close()
        if is_leader():
            clean(self.folder)  # what threads of a save that was given up still wrote


def _check_room(folder: Path, arrays: object) -> None:
    """Raises OSError if `arrays` don't fit on the disk; Orbax would find out too, but only after some hundred lines."""
    needed, free = sum(x.nbytes for x in jax.tree.leaves(arrays)), shutil.disk_usage(folder).free
    lacking = f"{os.strerror(errno.ENOSPC)}, {needed / 2**20:,.1f} MiB needed and {free / 2**20:,.1f} MiB free"
    _raise_everywhere(lacking if free < needed else None)


def _raise_everywhere(failure: str | None) -> None:
    """Raises OSError in all processes, which call it together, if one of them has a failure."""
    failure = text_from_any_process(failure)
    if failure is not None:
        raise OSError(errno.EIO, failure)


def reason_of(error: Exception) -> str:
    """An error of a file in one short line; tensorstore's are long, and name the disk that is full in their middle."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    lines = str(error).splitlines() or [type(error).__name__]
    known = next((text for text in ("No space left on device", "Permission denied") if text in lines[0]), None)
    return known or lines[0][:200]


def save_model(path: Path, params: Params, config: Config, tokenizer: Tokenizer, progress: Progress) -> None:
    """Writes a self-contained model folder, replacing the one at `path` so that a crash leaves one of the two.

    All processes call it together.

    Raises:
      one of SAVE_ERRORS: it could not be written; the old one stays.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    _check_room(path.parent, params)
    new = new_name(path)
    with quiet_orbax(), ocp.Checkpointer(_arrays()) as orbax:
        orbax.save((new / "params").resolve(), args=ocp.args.PyTreeSave(params), force=True)
    failure = None
    if is_leader():
        try:
            write_json_items(new, config, tokenizer, progress)
            seal(new, path)
        except OSError as error:
            failure = reason_of(error)
    _raise_everywhere(failure)

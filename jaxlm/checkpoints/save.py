"""Saving checkpoints and models with Orbax."""

import dataclasses
import errno
import gc
import json
import os
import shutil
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp

from jaxlm.checkpoints.folder import PREFIX, checkpoint_steps, clean, delete, new_name
from jaxlm.checkpoints.items import JSON_ITEMS, Progress
from jaxlm.checkpoints.manifest import seal
from jaxlm.checkpoints.quiet import quiet_orbax
from jaxlm.config import Config, to_dict
from jaxlm.data.tokenizer import Tokenizer
from jaxlm.parallel.processes import is_leader, text_from_any_process
from jaxlm.parallel.split import Params
from jaxlm.train.step import TrainState

OPTIMIZER_ITEM = ("step", "skipped", "loss_scale", "opt_state")  # of TrainState
SAVE_ERRORS = (OSError, ValueError, RuntimeError)  # of files; of tensorstore; of the other processes, as JAX puts it


def _handlers() -> dict[str, Any]:
    arrays = {name: ocp.StandardCheckpointHandler() for name in ("params", "optimizer")}
    return arrays | {name: ocp.JsonCheckpointHandler(filename) for name, filename in JSON_ITEMS.items()}


def _items(params: Params, config: Config, tokenizer: Tokenizer, progress: Progress) -> dict[str, Any]:
    return {
        "params": ocp.args.StandardSave(params),
        "config": ocp.args.JsonSave(to_dict(config)),
        "tokenizer": ocp.args.JsonSave(json.loads(tokenizer.to_json())),
        "progress": ocp.args.JsonSave(dataclasses.asdict(progress)),
    }


class Checkpoints:
    """The `checkpoint_<step>` folders of a run, the newest `limit` of them (None: all), written in the background.

    A save that fails, on a full disk for one, is reported and given up; those before it stay.
    """

    def __init__(self, folder: Path, limit: int | None, report: Callable[[str], None]) -> None:
        self.folder, self.limit, self.report = folder.resolve(), limit, report
        self.failed: str | None = None  # why the last save failed, if it did
        self._any_failed = False
        self._orbax = ocp.AsyncCheckpointer(ocp.CompositeCheckpointHandler(**_handlers()))
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
        optimizer = {name: getattr(state, name) for name in OPTIMIZER_ITEM}
        items = _items(state.params, config, tokenizer, progress)
        args = ocp.args.Composite(optimizer=ocp.args.StandardSave(optimizer), **items)
        new = new_name(final)
        try:
            _check_room(self.folder, state)
            self._orbax.save(new, args=args, force=True)
        except SAVE_ERRORS as error:
            self._give_up(progress.step, error)
            return
        self._saving = progress.step, self._thread.submit(self._finish, new, final)

    def _finish(self, new: Path, final: Path) -> None:
        """Makes a checkpoint of what Orbax has written, and only then deletes old ones."""
        self._orbax.wait_until_finished()
        if is_leader():
            seal(new, final)
            if self.limit:
                for old in list(checkpoint_steps(self.folder).values())[: -self.limit]:
                    delete(old)

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
        self.failed, self._any_failed = reason_of(error), True
        self.report(f"checkpoint_{step} was NOT saved: {self.failed}; the checkpoints before it stay")
        if is_leader():
            clean(self.folder)

    def close(self) -> None:
        self.wait()
        self._thread.shutdown()
        self._orbax.close()
        if self._any_failed:
            gc.collect()  # writes that were never begun, while what Python says of them is still dropped
        self._open.close()
        if is_leader():
            clean(self.folder)  # what threads of a save that was given up still wrote


def _check_room(folder: Path, arrays: Any) -> None:
    """Raises OSError if `arrays` don't fit on the disk; Orbax would find out too, but only after some hundred lines."""
    needed, free = sum(x.nbytes for x in jax.tree.leaves(arrays)), shutil.disk_usage(folder).free
    lacking = f"{os.strerror(errno.ENOSPC)}, {needed / 2**20:,.1f} MiB needed and {free / 2**20:,.1f} MiB free"
    message = text_from_any_process(lacking if free < needed else None)
    if message is not None:
        raise OSError(errno.ENOSPC, message)


def reason_of(error: Exception) -> str:
    """An error of a file in one short line; tensorstore's are long, and name the disk that is full in their middle."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    lines = str(error).splitlines() or [type(error).__name__]
    known = next((text for text in ("No space left on device", "Permission denied") if text in lines[0]), None)
    return known or lines[0][:200]


def save_model(path: Path, params: Params, config: Config, tokenizer: Tokenizer, progress: Progress) -> None:
    """Writes a self-contained model folder, replacing the one at `path` so that a crash leaves one of the two.

    The new one is written beside it and swapped in; `clean` mends a crash between the two renames.
    All processes call it together.

    Raises:
      one of SAVE_ERRORS: it could not be written; the old one stays.
    """
    _check_room(path.parent, params)
    new = new_name(path)
    handlers = {name: handler for name, handler in _handlers().items() if name != "optimizer"}
    with quiet_orbax(), ocp.Checkpointer(ocp.CompositeCheckpointHandler(**handlers)) as orbax:
        orbax.save(new.resolve(), args=ocp.args.Composite(**_items(params, config, tokenizer, progress)), force=True)
    failed = None
    if is_leader():
        try:
            _swap(new, path)
        except OSError as error:
            failed = reason_of(error)
    failed = text_from_any_process(failed)
    if failed is not None:
        raise OSError(failed)


def _swap(new: Path, path: Path) -> None:
    """Seals the model in `new` and puts it in the place of the one at `path`, if there is one."""
    ready, old = path.with_name(path.name + ".new.ready"), path.with_name(path.name + ".old")
    seal(new, ready)
    if path.exists():
        path.rename(old)
    ready.rename(path)
    shutil.rmtree(old, ignore_errors=True)

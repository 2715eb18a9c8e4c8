"""Saving checkpoints and models with Orbax, and loading them.

Every saved folder holds the same items: `params` (Orbax), `config/config.json`, `tokenizer/tokenizer.json` and
`progress/progress.json`; a checkpoint also holds `optimizer` (Orbax).
"""

import dataclasses
import errno
import gc
import json
import logging
import os
import shutil
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, TypeVar

import jax
import orbax.checkpoint as ocp
from absl import logging as absl_logging
from flax import nnx

from jaxlm.checkpoints.folder import PREFIX, checkpoint_steps, clean, delete, new_name
from jaxlm.checkpoints.manifest import damage, seal
from jaxlm.config import Config, from_dict, to_dict, validate
from jaxlm.data.tokenizer import Tokenizer
from jaxlm.errors import UserError
from jaxlm.generation.api import answer
from jaxlm.model import Transformer
from jaxlm.ops.attention_kernels import compute_capability, why_unsupported
from jaxlm.parallel.processes import is_leader, told_by_any
from jaxlm.parallel.sharding import path_name
from jaxlm.train.precision import compute_dtype
from jaxlm.train.step import TrainState

T = TypeVar("T")

OPTIMIZER_ITEM = ("step", "skipped", "loss_scale", "opt_state")  # of TrainState
JSON_ITEMS = {"config": "config.json", "tokenizer": "tokenizer.json", "progress": "progress.json"}

SAVE_ERRORS = (OSError, ValueError, RuntimeError)  # of files; of tensorstore; of the other processes, as JAX puts it

logging.getLogger("asyncio").setLevel(logging.CRITICAL)  # it repeats every error of a save that failed
absl_logging.set_verbosity(absl_logging.FATAL)  # Orbax reports every save, and errors that we report ourselves


@dataclasses.dataclass(frozen=True)
class Progress:
    """What a resumed run has to know beside arrays."""

    step: int  # optimizer updates done
    total_steps: int
    best_loss: float | None  # lowest validation loss so far, nats a token
    requested_vocab_size: int  # what the BPE was asked for; config.json has what it reached
    data_fingerprint: str
    global_batch: int  # rows an update; with the step, it says where in the data the run is
    shards: int  # devices that arrays were sharded over: an axis that it does not divide was saved padded with zeros
    model_class: str = Transformer.__name__  # folders from before there were others don't say


def _handlers() -> dict[str, Any]:
    arrays = {name: ocp.StandardCheckpointHandler() for name in ("params", "optimizer")}
    return arrays | {name: ocp.JsonCheckpointHandler(filename) for name, filename in JSON_ITEMS.items()}


def _items(params: Any, config: Config, tokenizer: Tokenizer, progress: Progress) -> dict[str, Any]:
    return {
        "params": ocp.args.StandardSave(params),
        "config": ocp.args.JsonSave(to_dict(config)),
        "tokenizer": ocp.args.JsonSave(json.loads(tokenizer.to_json())),
        "progress": ocp.args.JsonSave(dataclasses.asdict(progress)),
    }


@contextmanager
def _without_echo() -> Iterator[None]:
    """Drops what the other writes of a save say after one has failed: it is one error, and it is raised."""
    warnings.filterwarnings("ignore", r"coroutine '.*\.write_fragment' was never awaited", RuntimeWarning)
    hook = sys.unraisablehook
    sys.unraisablehook = lambda raised: None if "Event loop is closed" in str(raised.exc_value) else hook(raised)
    try:
        yield
    finally:
        sys.unraisablehook = hook


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
        self._open.enter_context(_without_echo())

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
    said = told_by_any(lacking if free < needed else None)
    if said is not None:
        raise OSError(errno.ENOSPC, said)


def reason_of(error: Exception) -> str:
    """An error of a file in one short line; tensorstore's are long, and name the disk that is full in their middle."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    lines = str(error).splitlines() or [type(error).__name__]
    known = next((text for text in ("No space left on device", "Permission denied") if text in lines[0]), None)
    return known or lines[0][:200]


def _read_json(path: Path, item: str, build: Callable[[Any], T]) -> T:
    file = path / item / JSON_ITEMS[item]
    try:
        return build(json.loads(file.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError) as error:
        raise UserError(f"{file}: not readable ({error}); it is of another version: name another") from error


def read_progress(path: Path) -> Progress:
    """The progress saved in a checkpoint or model folder; UserError if it can't be read."""
    return _read_json(path, "progress", lambda values: Progress(**values))


def read_config(path: Path) -> Config:
    """The resolved configuration saved in a checkpoint or model folder; UserError if it can't be read."""
    return _read_json(path, "config", lambda values: from_dict(values, str(path)))


def read_tokenizer(path: Path) -> Tokenizer:
    """The tokenizer saved in a checkpoint or model folder; UserError if it can't be read."""
    return Tokenizer.load(path / "tokenizer", name=str(path))


def _restore(path: Path, item: str, target: Any, shards: int) -> Any:
    """One array item of a saved folder, with the shapes, dtypes and placement of `target`.

    Args:
      shards: the most devices that either side is sharded over; fewer zeros than that are cut off or added.
    """
    with ocp.StandardCheckpointer() as checkpointer:
        stored = checkpointer.metadata((path / item).resolve()).item_metadata.tree
    try:
        padded = _is_padded(stored, target, shards)
    except ValueError as error:
        raise UserError(f"{path / item}: is of another model ({error}); name another") from error
    with ocp.Checkpointer(ocp.StandardCheckpointHandler()) as checkpointer:
        arguments = ocp.args.StandardRestore(target, strict=not padded)
        return checkpointer.restore((path / item).resolve(), args=arguments)


def _is_padded(stored: Any, target: Any, shards: int) -> bool:
    """Whether shapes differ by padding; ValueError if they differ by more, or the trees do."""
    shapes = [
        {path_name(p): x.shape for p, x in jax.tree_util.tree_leaves_with_path(tree)} for tree in (stored, target)
    ]
    if shapes[0].keys() != shapes[1].keys():
        raise ValueError(f"other arrays: {sorted(shapes[0].keys() ^ shapes[1].keys())[:3]}")
    for name, shape in shapes[0].items():
        other = shapes[1][name]
        if len(shape) != len(other) or any(abs(a - b) >= shards for a, b in zip(shape, other, strict=True) if a != b):
            raise ValueError(f"{name} has shape {tuple(shape)} instead of {tuple(other)}")
    return shapes[0] != shapes[1]


def restore_params(path: Path, target: Any, shards: int) -> Any:
    """The parameters saved in a model or checkpoint folder, as `target` has them; see `restore_state`."""
    return _restore(path, "params", target, max(shards, read_progress(path).shards))


def restore_state(path: Path, target: TrainState, shards: int) -> TrainState:
    """The state saved in the checkpoint at `path`.

    Args:
      target: abstract state (shapes, dtypes, shardings) of the run that goes on.
      shards: devices that its arrays are sharded over.

    Raises:
      UserError: damaged, or of another model.
    """
    rest = {name: getattr(target, name) for name in OPTIMIZER_ITEM}
    optimizer = _restore(path, "optimizer", rest, max(shards, read_progress(path).shards))
    return TrainState(params=restore_params(path, target.params, shards), **optimizer)


def save_model(path: Path, params: Any, config: Config, tokenizer: Tokenizer, progress: Progress) -> None:
    """Writes a self-contained model folder, replacing the one at `path` so that a crash leaves one of the two.

    The new one is written beside it and swapped in; `clean` mends a crash between the two renames.
    All processes call it together.

    Raises:
      one of SAVE_ERRORS: it could not be written; the old one stays.
    """
    _check_room(path.parent, params)
    new = new_name(path)
    handlers = {name: handler for name, handler in _handlers().items() if name != "optimizer"}
    with _without_echo(), ocp.Checkpointer(ocp.CompositeCheckpointHandler(**handlers)) as orbax:
        orbax.save(new.resolve(), args=ocp.args.Composite(**_items(params, config, tokenizer, progress)), force=True)
    failed = None
    if is_leader():
        try:
            _swap(new, path)
        except OSError as error:
            failed = reason_of(error)
    failed = told_by_any(failed)
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


@dataclasses.dataclass(frozen=True)
class LoadedModel:
    """What `load` returns; `model` is a flax.nnx module whose call gives hidden states (see `Transformer`)."""

    model: Transformer
    tokenizer: Tokenizer
    config: Config
    progress: Progress

    def generate(self, prompt: str | Sequence[str], **options: Any) -> Any:
        """As `Trainer.generate_text`: `prompt` and a continuation, or a list of them."""
        return answer(self.model, self.tokenizer, prompt, **options)


def load(path: str | os.PathLike[str], model_class: type[Transformer] = Transformer) -> LoadedModel:
    """The model, tokenizer and configuration in a best_model, final_model or checkpoint folder.

    The parameters are float32, on JAX's default device, whatever devices they were saved from. A model of a class of
    your own needs that class.

    Raises:
      UserError: not such a folder, damaged, or a model of another class.
    """
    folder = Path(path)
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder; name a best_model, final_model or checkpoint_<step> folder")
    if not (folder / "params").is_dir():
        inside = [name for name in ("best_model", "final_model") if (folder / name).is_dir()]
        hint = f", such as {folder / inside[0]}" if inside else ""
        if (folder / "model.safetensors").exists() or (folder / "model.safetensors.index.json").exists():
            hint += " (this one is for transformers; training.init_from starts a run from it)"
        raise UserError(f"{folder}: holds no model; name a best_model, final_model or checkpoint_<step> folder{hint}")
    wrong = damage(folder, ("params", *JSON_ITEMS))
    if wrong is not None:
        raise UserError(f"{folder} is damaged: {wrong}; name another")
    progress = read_progress(folder)
    if progress.model_class != model_class.__name__:
        raise UserError(
            f"{folder}: holds a {progress.model_class}, not a {model_class.__name__}; from Python, load(path, "
            f"{progress.model_class}) opens it"
        )
    config = validate(read_config(folder))
    why_not = why_unsupported("pallas", config, compute_capability(jax.devices()[0]))  # cudnn can't do every prompt
    implementation, dtype = "pallas" if why_not is None else "blockwise", compute_dtype(config.training)
    make = lambda: model_class(config.model, implementation=implementation, dtype=dtype, rngs=nnx.Rngs(0))  # noqa: E731
    graphdef, abstract = nnx.split(nnx.eval_shape(make))
    device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    target = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=device), nnx.to_pure_dict(abstract))
    model = nnx.merge(graphdef, _restore(folder, "params", target, progress.shards))
    return LoadedModel(model, read_tokenizer(folder), config, progress)

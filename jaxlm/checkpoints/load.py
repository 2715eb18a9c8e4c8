"""Restoring what was saved, on whatever devices are there, and `load`."""

import dataclasses
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp
from flax import nnx

from jaxlm.checkpoints.items import JSON_ITEMS, Progress, read_config, read_progress, read_tokenizer
from jaxlm.checkpoints.manifest import damage
from jaxlm.checkpoints.quiet import quiet_orbax
from jaxlm.checkpoints.save import OPTIMIZER_ITEM
from jaxlm.config import Config, validate
from jaxlm.data.tokenizer import Tokenizer
from jaxlm.errors import UserError
from jaxlm.generation.api import generate_one_or_many
from jaxlm.model import Transformer
from jaxlm.ops.attention_kernels import compute_capability, why_unsupported
from jaxlm.parallel.split import path_name
from jaxlm.train.assemble import abstract_model
from jaxlm.train.step import TrainState


def _restore(path: Path, item: str, target: Any, shards: int) -> Any:
    """One array item of a saved folder, with the shapes, dtypes and placement of `target`.

    Args:
      shards: the most devices that either side is sharded over; fewer zeros than that are cut off or added.
    """
    with quiet_orbax(), ocp.StandardCheckpointer() as checkpointer:
        stored = checkpointer.metadata((path / item).resolve()).item_metadata.tree
    try:
        padded = _is_padded(stored, target, shards)
    except ValueError as error:
        raise UserError(f"{path / item}: is of another model ({error}); name another") from error
    with quiet_orbax(), ocp.Checkpointer(ocp.StandardCheckpointHandler()) as checkpointer:
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


@dataclasses.dataclass(frozen=True)
class LoadedModel:
    """What `load` returns; `model` is a flax.nnx module whose call gives hidden states (see `Transformer`)."""

    model: Transformer
    tokenizer: Tokenizer
    config: Config
    progress: Progress

    def generate(self, prompt: str | Sequence[str], **options: Any) -> Any:
        """As `Trainer.generate_text`: `prompt` and a continuation, or a list of them."""
        return generate_one_or_many(self.model, self.tokenizer, prompt, **options)


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
    pallas = (
        why_unsupported("pallas", config, compute_capability(jax.devices()[0])) is None
    )  # cudnn can't do every prompt
    graphdef, abstract = nnx.split(abstract_model(config, "pallas" if pallas else "blockwise", model_class))
    device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    target = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=device), nnx.to_pure_dict(abstract))
    model = nnx.merge(graphdef, _restore(folder, "params", target, progress.shards))
    return LoadedModel(model, read_tokenizer(folder), config, progress)

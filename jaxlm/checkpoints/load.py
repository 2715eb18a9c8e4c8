"""Restoring what was saved, on whatever devices are there, and `load`."""

import dataclasses
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp
from flax import nnx

from jaxlm.checkpoints.folder import MODELS
from jaxlm.checkpoints.items import JSON_ITEMS, Progress, read_config, read_progress, read_tokenizer
from jaxlm.checkpoints.manifest import damage
from jaxlm.checkpoints.save import OPTIMIZER_ITEM, quiet_orbax
from jaxlm.config import Config, validate
from jaxlm.data.tokenizer import Tokenizer
from jaxlm.errors import UserError
from jaxlm.generation.api import generate_one_or_many
from jaxlm.model import Transformer
from jaxlm.ops.attention_kernels import compute_capability, why_unsupported
from jaxlm.parallel.split import path_name
from jaxlm.train.assemble import abstract_model
from jaxlm.train.step import TrainState


def restore_item(path: Path, item: str, target: Any, shards: int) -> Any:
    """One array item of a saved folder, with the shapes, dtypes and placement of `target`, which has `shards`.

    Zeros are cut off or added, fewer than either side has shards.

    Raises:
      UserError: damaged, or of another model.
    """
    folder, shards = (path / item).resolve(), max(shards, read_progress(path).shards)
    with quiet_orbax(), ocp.StandardCheckpointer() as checkpointer:
        stored, wanted = _shapes(checkpointer.metadata(folder).item_metadata.tree), _shapes(target)
        difference = _difference(stored, wanted, shards)
        if difference is not None:
            raise UserError(f"{path / item}: is of another model ({difference}); name another")
        return checkpointer.restore(folder, target, strict=stored == wanted)


def _shapes(tree: Any) -> dict[str, tuple[int, ...]]:
    return {path_name(path): tuple(x.shape) for path, x in jax.tree_util.tree_leaves_with_path(tree)}


def _difference(stored: dict[str, tuple[int, ...]], wanted: dict[str, tuple[int, ...]], shards: int) -> str | None:
    """In what two sets of arrays differ, except for padding."""
    if stored.keys() != wanted.keys():
        return f"other arrays: {sorted(stored.keys() ^ wanted.keys())[:3]}"
    for name, shape in stored.items():
        other = wanted[name]
        if len(shape) != len(other) or any(abs(a - b) >= shards for a, b in zip(shape, other, strict=True)):
            return f"{name} has shape {shape} instead of {other}"
    return None


def restore_state(path: Path, target: TrainState, shards: int) -> TrainState:
    """The state saved in the checkpoint at `path`; see `restore_item`."""
    optimizer = restore_item(path, "optimizer", {name: getattr(target, name) for name in OPTIMIZER_ITEM}, shards)
    return TrainState(params=restore_item(path, "params", target.params, shards), **optimizer)


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
    if not (folder / "params").is_dir():
        inside = [name for name in MODELS if (folder / name).is_dir()]
        hint = f", such as {folder / inside[0]}" if inside else ""
        if any(folder.glob("model.safetensors*")):
            hint += " (this one is for transformers; training.init_from starts a run from it)"
        problem = "holds no model" if folder.is_dir() else "no such folder"
        raise UserError(f"{folder}: {problem}; name a best_model, final_model or checkpoint_<step> folder{hint}")
    if fault := damage(folder, ("params", *JSON_ITEMS)):
        raise UserError(f"{folder} is damaged: {fault}; name another")
    progress = read_progress(folder)
    if progress.model_class != model_class.__name__:
        own = progress.model_class
        difference = f"holds a {own}, not a {model_class.__name__}"
        raise UserError(f"{folder}: {difference}; from Python, load(path, {own}) opens it")
    config = validate(read_config(folder))
    pallas = (
        why_unsupported("pallas", config, compute_capability(jax.devices()[0])) is None
    )  # cudnn can't do every prompt
    graphdef, abstract = nnx.split(abstract_model(config, "pallas" if pallas else "blockwise", model_class))
    device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    target = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=device), nnx.to_pure_dict(abstract))
    model = nnx.merge(graphdef, restore_item(folder, "params", target, progress.shards))
    return LoadedModel(model, read_tokenizer(folder), config, progress)

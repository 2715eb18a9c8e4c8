"""Restoring what was saved, on whatever devices are there."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp
from flax import nnx

from jaxlm.checkpoints.items import Progress, read_progress
from jaxlm.checkpoints.save import OPTIMIZER_ITEM, quiet_orbax
from jaxlm.config import Config
from jaxlm.data.tokenizer import Tokenizer
from jaxlm.errors import UserError
from jaxlm.generation.api import generate_one_or_many
from jaxlm.model import Transformer
from jaxlm.parallel.split import params_by_name, path_name
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


def _shapes(tree: object) -> dict[str, tuple[int, ...]]:
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
    """What `jaxlm.load` returns; `model` is a flax.nnx module whose call gives hidden states (see `Transformer`)."""

    model: Transformer
    tokenizer: Tokenizer
    config: Config
    progress: Progress | None  # None of a model that jaxlm has not trained
    folder: Path | None = None  # that it was read from

    def generate(self, prompt: str | Sequence[str], **options: Any) -> Any:
        """As `Trainer.generate_text`: `prompt` and a continuation, or a list of them."""
        return generate_one_or_many(self.model, self.tokenizer, prompt, **options)

    def params_by_name(self, *, unstacked: bool = False) -> dict[str, jax.Array]:
        """The parameters by the names that training.freeze takes, such as "blocks/mlp/up/kernel", [layers, ...].

        With `unstacked`, those of each layer by themselves, such as "blocks/0/mlp/up/kernel".
        """
        return params_by_name(nnx.to_pure_dict(nnx.state(self.model)), unstacked=unstacked)

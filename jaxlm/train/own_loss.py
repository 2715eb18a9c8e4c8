"""A loss of the user's own in place of the cross entropy, as a part of the compiled update.

Shapes: B rows, T positions.
"""

from collections.abc import Callable
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from jaxlm.config import TrainingConfig, shown
from jaxlm.errors import UserError
from jaxlm.model import Transformer
from jaxlm.train.loss import learned

Extras: TypeAlias = dict[str, tuple[jax.Array, jax.Array]]  # {name: (sum, count)}, logged as their ratio
Found: TypeAlias = tuple[jax.Array, Extras]  # a loss, summed over targets, and what else a loss measures
# (model, [B, T] batch, dropout keys or None) -> the loss of each token, float32 [B, T], and more metrics
OwnLoss: TypeAlias = Callable[[Any, dict[str, jax.Array], jax.Array | None], tuple[jax.Array, Extras]]

TAKEN = {
    "loss", "learning_rate", "grad_norm", "tokens_per_second", "mfu", "epoch", "skipped_steps", "loss_scale",
    "memory_gib", "host_memory_gib", "perplexity", "bits_per_byte", "tokens",
}  # fmt: skip
RETURNS = "return (losses, metrics): the loss of each token, float32 [B, T], and {name: (sum, count)}"


def name_of(loss: OwnLoss | None) -> str | None:
    """The function's own name, as checkpoints have it; None: the cross entropy."""
    return None if loss is None else getattr(loss, "__qualname__", type(loss).__qualname__)


def own_sums(
    loss: OwnLoss, model: Transformer, batch: dict[str, jax.Array], keys: jax.Array | None, factor: ArrayLike
) -> tuple[jax.Array, Found]:
    """What is minimised, and the same for reports, with the other metrics; sums over the targets of `batch`.

    Args:
      factor: of every loss; in it goes the gradient's scale.
    """
    losses_BT, extras = loss(model, {name: x for name, x in batch.items() if name != "rows"}, keys)
    total = jnp.where(
        learned(batch), losses_BT * factor, 0.0
    ).sum()  # what is not learned may be NaN, if not by a gradient
    return total, (total, {name: (jnp.float32(x), jnp.float32(n)) for name, (x, n) in extras.items()})


def check_own_loss(loss: OwnLoss, training: TrainingConfig, results: Any, shape: tuple[int, ...]) -> None:
    """Checks the shapes and dtypes that `loss` returned for a batch of `shape`, and the options of the cross entropy.

    Raises:
      UserError: they are not those of `OwnLoss`, or an option has no use.
    """
    where = f"compute_loss ({name_of(loss)})"
    for name in ("z_loss", "loss_chunk_mib"):
        if value := vars(training)[name]:
            raise UserError(f"training.{name} ({shown(value)}) is of the cross entropy, not of {where}; leave it out")
    first = results[0] if isinstance(results, tuple) and results else results
    if isinstance(first, jax.ShapeDtypeStruct) and not first.shape:
        mean = "a mean of a micro-batch is no part of a sum over all"
        raise UserError(f"{where} returns a scalar, and {mean}; {RETURNS}, which jaxlm weights and sums")
    if not (isinstance(results, tuple) and [type(x) for x in results] == [jax.ShapeDtypeStruct, dict]):
        raise UserError(f"{where} returns something else; {RETURNS}")
    losses, extras = results
    if (losses.shape, losses.dtype) != (shape, jnp.float32):
        raise UserError(f"{where} returns losses {losses.dtype} {[*losses.shape]}, not float32 {[*shape]}; {RETURNS}")
    for name, pair in extras.items():
        if name in TAKEN or name.startswith("average_"):
            raise UserError(f"{where}: the metric {name} is jaxlm's own; call it something else")
        if jax.tree.map(lambda x: x.shape, pair) != ((), ()):
            raise UserError(f"{where}: the metric {name} is not two scalars, its sum and its count over the batch")

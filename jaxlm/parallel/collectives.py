"""Communication of sharded parameters and gradients, called on each device inside a `shard_map` over the rows' axes.

L "lead": how many leading axes of a parameter are missing from an array (1 for one layer of stacked blocks).
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.core import Primitive
from jax.typing import DTypeLike

from jaxlm.parallel.mesh import DATA
from jaxlm.parallel.split import Params, Split


@partial(jax.custom_vjp, nondiff_argnums=(1, 2, 3))
def all_gather(shard: jax.Array, split: Split, lead: int, dtype: DTypeLike) -> jax.Array:
    """The whole parameter in `dtype`; its gradient is summed over "data" into shards, in float32."""
    shard = shard.astype(dtype)
    if split.shards == 1:
        return shard
    return split.crop(jax.lax.all_gather(shard, DATA, axis=split.axis - lead, tiled=True), lead)


def reduce_scatter(gradient: jax.Array, split: Split, lead: int = 0) -> jax.Array:
    """This device's shard of the sum of `gradient` over "data"."""
    if split.shards == 1:
        return gradient
    return jax.lax.psum_scatter(split.pad(gradient, lead), DATA, scatter_dimension=split.axis - lead, tiled=True)


all_gather.defvjp(
    lambda shard, split, lead, dtype: (all_gather(shard, split, lead, dtype), None),
    lambda split, lead, dtype, _, g: (reduce_scatter(g.astype(jnp.float32), split, lead),),
)


def keep_all_but_gathered(primitive: Primitive, *_: object, **params: Any) -> bool:
    """Checkpoint policy: what `all_gather` makes is gathered again in the backward pass, all else is kept."""
    if primitive.name != "custom_vjp_call":
        return primitive.name != "all_gather"
    return not any(equation.primitive.name == "all_gather" for equation in params["call_jaxpr"].eqns)


def all_gather_as_one(shards: Params, splits: Params) -> Params:
    """Whole parameters by a single operation, with a single one for their gradients.

    So each of the two waits for the loop over the blocks, or the loop for it. XLA's CPU runtime would start what does
    not depend on a loop together with the loop's own communication, in another order on another device, and hang.
    """
    leaves, tree = jax.tree.flatten(shards)
    splits_of_leaves: list[Split] = jax.tree.leaves(splits)
    if splits_of_leaves[0].shards == 1:
        return shards
    moved = [jnp.moveaxis(x, split.axis, 0) for split, x in zip(splits_of_leaves, leaves, strict=True)]
    flat = jnp.concatenate([x.reshape(-1) for x in moved])
    parts = jax.lax.split(jax.lax.all_gather(flat, DATA), [x.size for x in moved], axis=1)
    whole = [
        split.crop(jnp.moveaxis(part.reshape(split.padded_size, *x.shape[1:]), 0, split.axis))
        for split, part, x in zip(splits_of_leaves, parts, moved, strict=True)
    ]
    return jax.tree.unflatten(tree, whole)

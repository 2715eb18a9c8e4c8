"""How one parameter is divided over the devices: by ZeRO along one axis, by tensor parallelism along another."""

import dataclasses
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

from jaxlm.errors import UserError
from jaxlm.parallel.mesh import DATA, TENSOR, AnyMesh

# The axis that "tensor" splits, counted from the end: the output axis of the matrices that a sub-layer begins with, the
# input axis of those that it ends with (Shoeybi et al. 2019, arXiv:1909.08053).
TENSOR_AXES = {
    "qkv/kernel": -1,
    "attention/q/kernel": -1,
    "attention/kv/kernel": -1,
    "out/kernel": -2,
    "up/kernel": -1,
    "down/kernel": -2,
    "qkv/adapter/b": -1,
    "attention/q/adapter/b": -1,
    "attention/kv/adapter/b": -1,
    "out/adapter/a": -2,
    "up/adapter/b": -1,
    "down/adapter/a": -2,
    "token_embedding": -2,
    "output_embedding": -2,
}
STACKED = "blocks"  # its leaves have a leading layer axis, which is never split: blocks are gathered one by one

Params: TypeAlias = dict[str, Any]  # nested dict of arrays, or of what stands for them
Path: TypeAlias = tuple[Any, ...]  # of a leaf in a tree, as JAX gives it


def path_name(path: Path) -> str:
    """A leaf's path in a tree of dicts, tuples and dataclasses, such as "blocks/mlp/up/kernel"."""
    return "/".join(str(getattr(e, "key", getattr(e, "name", getattr(e, "idx", "")))) for e in path)


def params_by_name(params: Params, *, unstacked: bool = False) -> dict[str, jax.Array]:
    """The parameters by the names that training.freeze takes, such as "blocks/mlp/up/kernel", [layers, ...].

    With `unstacked`, those of each layer by themselves, such as "blocks/0/mlp/up/kernel".
    """
    named = {path_name(path): x for path, x in jax.tree_util.tree_leaves_with_path(params)}
    if not unstacked:
        return named
    layers = {f"blocks/{i}/{n[7:]}": x[i] for n, x in named.items() if n.startswith("blocks/") for i in range(len(x))}
    return {name: x for name, x in named.items() if not name.startswith("blocks/")} | layers


@dataclasses.dataclass(frozen=True)
class Split:
    """How one parameter is divided."""

    shape: tuple[int, ...]  # of the whole
    shards: int
    axis: int  # that ZeRO splits
    tensor_axis: int | None

    @property
    def padded_size(self) -> int:
        """Size of the split axis, padded to a multiple of the shards."""
        return -(-self.shape[self.axis] // self.shards) * self.shards

    def placed(self, mesh: AnyMesh, sharded: bool) -> jax.ShapeDtypeStruct:
        """Float32 shape and sharding on `mesh`: split over "tensor" only, or sharded and padded, too."""
        shape, axes = list(self.shape), {self.tensor_axis: TENSOR}
        if sharded:
            shape[self.axis] = self.padded_size
            axes[self.axis] = DATA
        return jax.ShapeDtypeStruct(tuple(shape), jnp.float32, sharding=NamedSharding(mesh, self._spec(axes)))

    @property
    def shard_rows_spec(self) -> PartitionSpec:
        """The part of a shard's sharding that a shard_map over ROWS handles; "tensor" is left to the compiler."""
        return self._spec({self.axis: DATA})

    def _spec(self, axes: dict[int | None, str]) -> PartitionSpec:
        return PartitionSpec(*(axes.get(i) for i in range(len(self.shape))))

    def pad(self, x: jax.Array, lead: int = 0) -> jax.Array:
        """A whole parameter with its axis padded; `lead` axes of `shape` are missing from `x`."""
        missing = self.padded_size - self.shape[self.axis]
        return jnp.pad(x, [(0, missing if i + lead == self.axis else 0) for i in range(x.ndim)]) if missing else x

    def crop(self, x: jax.Array, lead: int = 0) -> jax.Array:
        """The reverse of `pad`."""
        if self.padded_size == self.shape[self.axis]:
            return x
        return jax.lax.slice_in_dim(x, 0, self.shape[self.axis], axis=self.axis - lead)


def split_parameter(path: Path, shape: tuple[int, ...], shards: int, tensor: int = 1) -> Split:
    """How the parameter at `path` is divided: along the first axis that `shards` divides, else along the longest.

    The layer axis and the one that is meant for "tensor" are left alone.

    Raises:
      UserError: it has no other.
    """
    name = path_name(path)
    tensor_axis = next((len(shape) + axis for end, axis in TENSOR_AXES.items() if name.endswith(end)), None)
    free = [i for i in range(len(shape)) if i != tensor_axis and not (i == 0 and name.startswith(STACKED))]
    if not free:
        raise UserError(f"the parameter {name} has no axis to divide it along; give it one, such as the shape (1,)")
    axis = next((i for i in free if shape[i] % shards == 0), max(free, key=lambda i: shape[i]))
    splittable = tensor_axis is not None and tensor > 1 and shape[tensor_axis] % tensor == 0
    return Split(shape, shards, axis, tensor_axis if splittable else None)

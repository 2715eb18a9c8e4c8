"""The mesh, and where each array of the training state lives on it: ZeRO, hybrid ZeRO and tensor parallelism.

The mesh has three axes. Rows of a batch are split over "replica" and "data"; what a ZeRO stage shards (Rajbhandari et
al. 2020, arXiv:1910.02054) is split over "data" alone, so that each replica holds one full copy of it; "tensor"
splits the matrices of each layer (Shoeybi et al. 2019, arXiv:1909.08053).

A `Layout` is computed from abstract parameters; the model knows nothing of it. A parameter is *whole* (its own shape,
split over "tensor" only) or a *shard* (split over "data" along one axis too, which is padded with zeros where the
devices don't divide it).

| stage | parameters | gradients | optimizer state |
|---|---|---|---|
| 0 | whole | whole | whole |
| 1 | whole | whole; reduced once an update, into shards | shard |
| 2 | whole | shard; reduced every micro-batch | shard |
| 3 | shard; gathered block by block | shard; reduced every micro-batch | shard |
"""

import dataclasses
import math
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

from jaxlm.config import Config
from jaxlm.errors import UserError

REPLICA, DATA, TENSOR = AXES = ("replica", "data", "tensor")
ROWS = (REPLICA, DATA)
HOST_MEMORY = "pinned_host"

# The axis that "tensor" splits, counted from the end: columns of what widens, rows of what narrows again.
TENSOR_AXES = {
    "qkv/kernel": -1,
    "attention/q/kernel": -1,
    "attention/kv/kernel": -1,
    "out/kernel": -2,
    "up/kernel": -1,
    "down/kernel": -2,
    "token_embedding": -2,
    "output_embedding": -2,
}
STACKED = "blocks"  # its leaves have a leading layer axis, which is never split: blocks are gathered one by one

Params = Any  # nested dict of arrays, as in step.py


def mesh_shape(config: Config, n_devices: int) -> tuple[int, int, int]:
    """Devices along (replica, data, tensor) for a configuration on `n_devices`.

    Raises:
      UserError: they can't be divided as it asks.
    """
    tensor = config.training.tensor_parallel
    model = config.model
    for name, value in {"n_heads": model.n_heads, "n_kv_heads": model.kv_heads, "d_ff": model.d_ff}.items():
        if value % tensor:
            raise UserError(f"training.tensor_parallel ({tensor}) must divide model.{name} ({value})")
    if n_devices % tensor:
        raise UserError(f"training.tensor_parallel ({tensor}) must divide the {n_devices} device(s)")
    group = config.training.zero_group_size or n_devices
    if n_devices % group or group % tensor:
        raise UserError(
            f"training.zero_group_size ({group}) must divide the {n_devices} device(s) and be a multiple of "
            f"training.tensor_parallel ({tensor})"
        )
    return n_devices // group, group // tensor, tensor


def make_mesh(devices: list[jax.Device], shape: tuple[int, int, int] | None = None) -> Mesh:
    """`devices` as (replica, data, tensor), by default all along "data". Neighbours share a tensor group first.

    Axes are Auto: cuDNN's attention does not support explicit ones.
    """
    return Mesh(np.array(devices).reshape(shape or (1, -1, 1)), AXES, axis_types=(AxisType.Auto,) * 3)


def abstract_mesh(shape: tuple[int, int, int]) -> AbstractMesh:
    """The mesh of devices that are not here: enough to compute the shapes that each would hold."""
    return AbstractMesh(shape, AXES, axis_types=(AxisType.Auto,) * 3)


def replicated(mesh: Mesh) -> NamedSharding:
    """Every device holds the whole array."""
    return NamedSharding(mesh, PartitionSpec())


def train_batch_sharding(mesh: Mesh) -> NamedSharding:
    """[K, B, ...] arrays: the B rows of each micro-batch are split over devices."""
    return NamedSharding(mesh, PartitionSpec(None, ROWS))


def eval_batch_sharding(mesh: Mesh) -> NamedSharding:
    """[B, ...] arrays: rows are split over devices."""
    return NamedSharding(mesh, PartitionSpec(ROWS))


def row_shards(mesh: Mesh | AbstractMesh) -> int:
    """Into how many parts the rows of a micro-batch are split."""
    return mesh.shape[REPLICA] * mesh.shape[DATA]


def own_rows(mesh: Mesh, rows: int) -> slice:
    """Which of the `rows` of a micro-batch live on this process's devices."""
    indices = eval_batch_sharding(mesh).addressable_devices_indices_map((rows,)).values()
    slices = [index[0] for index in indices if index is not None]
    return slice(min(s.start or 0 for s in slices), max(rows if s.stop is None else s.stop for s in slices))


def put(batch: dict[str, np.ndarray], sharding: NamedSharding) -> dict[str, jax.Array]:
    """This process's part of a batch, on its devices, as part of the global arrays."""
    return {name: jax.make_array_from_process_local_data(sharding, array) for name, array in batch.items()}


def put_whole(x: np.ndarray, target: jax.ShapeDtypeStruct) -> jax.Array:
    """A whole parameter on the host -> as the layout holds it: `target`'s shape (padded with zeros) and sharding.

    Each device gets its own part only.
    """
    missing = [(0, held - size) for size, held in zip(x.shape, target.shape, strict=True)]
    padded = np.pad(x, missing) if any(after for _, after in missing) else x
    return jax.make_array_from_callback(target.shape, target.sharding, lambda index: padded[index])


def path_name(path: Any) -> str:
    """A leaf's path in a tree of dicts, tuples and dataclasses, such as "blocks/mlp/up/kernel"."""
    return "/".join(str(getattr(e, "key", getattr(e, "name", getattr(e, "idx", "")))) for e in path)


@dataclasses.dataclass(frozen=True)
class Split:
    """How one parameter is divided."""

    shape: tuple[int, ...]  # of the whole
    shards: int
    axis: int  # that ZeRO splits
    tensor_axis: int | None

    @property
    def size(self) -> int:
        """Of the split axis, padded to a multiple of the shards."""
        return -(-self.shape[self.axis] // self.shards) * self.shards

    @property
    def padded_shape(self) -> tuple[int, ...]:
        return (*self.shape[: self.axis], self.size, *self.shape[self.axis + 1 :])

    @property
    def whole_spec(self) -> PartitionSpec:
        return self._spec({self.tensor_axis: TENSOR})

    @property
    def shard_spec(self) -> PartitionSpec:
        return self._spec({self.tensor_axis: TENSOR, self.axis: DATA})

    @property
    def shard_rows_spec(self) -> PartitionSpec:
        """The part of `shard_spec` that a shard_map over ROWS handles; "tensor" is left to the compiler."""
        return self._spec({self.axis: DATA})

    def _spec(self, axes: dict[int | None, str]) -> PartitionSpec:
        return PartitionSpec(*(axes.get(i) for i in range(len(self.shape))))

    def pad(self, x: jax.Array, lead: int = 0) -> jax.Array:
        """A whole parameter with its axis padded; `lead` axes of `shape` are missing from `x`."""
        missing = self.size - self.shape[self.axis]
        return jnp.pad(x, [(0, missing if i + lead == self.axis else 0) for i in range(x.ndim)]) if missing else x

    def crop(self, x: jax.Array, lead: int = 0) -> jax.Array:
        """The reverse of `pad`."""
        if self.size == self.shape[self.axis]:
            return x
        return jax.lax.slice_in_dim(x, 0, self.shape[self.axis], axis=self.axis - lead)


def split_of(path: Any, shape: tuple[int, ...], shards: int, tensor: int = 1) -> Split:
    """How the parameter at `path` is divided: along the first axis that `shards` divides, else along the longest.

    The layer axis and the one that is meant for "tensor" are left alone.
    """
    name = path_name(path)
    tensor_axis = next((len(shape) + axis for end, axis in TENSOR_AXES.items() if name.endswith(end)), None)
    free = [i for i in range(len(shape)) if i != tensor_axis and not (i == 0 and name.startswith(STACKED))]
    axis = next((i for i in free if shape[i] % shards == 0), max(free, key=lambda i: shape[i]))
    splittable = tensor_axis is not None and tensor > 1 and shape[tensor_axis] % tensor == 0
    return Split(shape, shards, axis, tensor_axis if splittable else None)


@partial(jax.custom_vjp, nondiff_argnums=(1, 2, 3))
def _gather(shard: jax.Array, split: Split, lead: int, dtype: Any) -> jax.Array:
    """The whole parameter in `dtype`; its gradient is summed over "data" into shards in float32."""
    shard = shard.astype(dtype)
    if split.shards == 1:
        return shard
    return split.crop(jax.lax.all_gather(shard, DATA, axis=split.axis - lead, tiled=True), lead)


def _scatter(gradient: jax.Array, split: Split, lead: int) -> jax.Array:
    """This device's shard of the sum of `gradient` over "data"."""
    if split.shards == 1:
        return gradient
    return jax.lax.psum_scatter(split.pad(gradient, lead), DATA, scatter_dimension=split.axis - lead, tiled=True)


_gather.defvjp(
    lambda shard, split, lead, dtype: (_gather(shard, split, lead, dtype), None),
    lambda split, lead, dtype, _, g: (_scatter(g.astype(jnp.float32), split, lead),),
)


def _keep_all_but_gathered(primitive: Any, *_: Any, **params: Any) -> bool:
    """Checkpoint policy: what `_gather` makes is gathered again in the backward pass, all else is kept."""
    if primitive.name != "custom_vjp_call":
        return primitive.name != "all_gather"
    return not any(equation.primitive.name == "all_gather" for equation in params["call_jaxpr"].eqns)


def _gather_as_one(shards: Params, splits: Params) -> Params:
    """Whole parameters, by one operation for all of them, and one for their gradients.

    So each of the two waits for the loop over the blocks, or the loop for it. XLA's CPU runtime would start what does
    not wait for a loop together with the loop's own communication, in another order on another device, and hang.
    """
    (leaves, tree), ways = jax.tree.flatten(shards), jax.tree.leaves(splits)
    if ways[0].shards == 1:
        return shards
    rows = [jnp.moveaxis(x, way.axis, 0) for way, x in zip(ways, leaves, strict=True)]
    of_device = jnp.concatenate([x.reshape(-1) for x in rows])
    parts = jax.lax.split(jax.lax.all_gather(of_device, DATA), [x.size for x in rows], axis=1)
    whole = [
        way.crop(jnp.moveaxis(part.reshape(way.size, *x.shape[1:]), 0, way.axis))
        for way, part, x in zip(ways, parts, rows, strict=True)
    ]
    return jax.tree.unflatten(tree, whole)


class Layout:
    """Where the parameters, gradients and optimizer state of one model live.

    Args:
      mesh: the devices, or an abstract mesh where only shapes are wanted.
      stage: of ZeRO, 0 to 3.
      params: abstract whole parameters.
      offload: keep the optimizer state in host memory.
    """

    def __init__(self, mesh: Mesh | AbstractMesh, stage: int, params: Params, offload: bool = False) -> None:
        self.mesh, self.stage, self.offload = mesh, stage, offload
        shards, tensor = mesh.shape[DATA], mesh.shape[TENSOR]
        self.splits: Params = jax.tree_util.tree_map_with_path(
            lambda p, x: split_of(p, x.shape, shards, tensor), params
        )

    @property
    def shapes(self) -> Params:
        """Each parameter's own shape, without padding."""
        return jax.tree.map(lambda split: jax.ShapeDtypeStruct(split.shape, jnp.float32), self.splits)

    @property
    def shards(self) -> int:
        """Devices that share one sharded copy, tensor parallelism left out."""
        return self.mesh.shape[DATA]

    @property
    def platform(self) -> str:
        """JAX's name of the devices' backend; an abstract mesh stands for GPUs."""
        return self.mesh.devices.flat[0].platform if isinstance(self.mesh, Mesh) else "gpu"

    def describe(self) -> str:
        """A line for the start-up report."""
        names = ("replicated", "optimizer state", "optimizer state and gradients", "all of the state")
        shape = " x ".join(f"{self.mesh.shape[axis]} {axis}" for axis in AXES)
        sharded = f"{names[self.stage]} sharded over {self.shards}" if self.stage else names[0]
        return f"{shape}; ZeRO stage {self.stage} ({sharded}){', optimizer in host memory' if self.offload else ''}"

    def bytes_of_state(self, abstract_state: Any) -> int:
        """Bytes a device of the placed state, and of gradients as they are kept between micro-batches."""
        sharded = self.stage >= 2

        def gradient(split: Split) -> jax.ShapeDtypeStruct:
            shape, spec = (split.padded_shape, split.shard_spec) if sharded else (split.shape, split.whole_spec)
            return jax.ShapeDtypeStruct(shape, jnp.float32, sharding=NamedSharding(self.mesh, spec))

        return bytes_a_device(abstract_state) + bytes_a_device(jax.tree.map(gradient, self.splits))

    def _map(self, function: Any, tree: Params) -> Params:
        return jax.tree.map(function, self.splits, tree)

    def _constrain(self, tree: Params, sharded: bool) -> Params:
        def constrain(split: Split, x: jax.Array) -> jax.Array:
            spec = split.shard_spec if sharded else split.whole_spec
            return jax.lax.with_sharding_constraint(x, NamedSharding(self.mesh, spec))

        return self._map(constrain, tree)

    # ------------------------------------------------------------ at the level of whole arrays, in jit

    def to_shards(self, params: Params) -> Params:
        """Parameters as they are held -> as the optimizer sees them."""
        if self.stage == 0:
            return params
        return self._constrain(params if self.stage == 3 else self._map(Split.pad, params), sharded=True)

    def to_held(self, shards: Params) -> Params:
        """Parameters as the optimizer sees them -> as they are held between updates."""
        if self.stage == 0:
            return shards
        shards = self._constrain(shards, sharded=True)
        return shards if self.stage == 3 else self._constrain(self._map(Split.crop, shards), sharded=False)

    def to_whole(self, held: Params) -> Params:
        """Parameters as they are held -> their own shapes; the compiler decides where they live."""
        return self._map(Split.crop, held) if self.stage == 3 else held

    def cropped(self, tree: Params) -> Params:
        """Parameters or gradients, padded for sharding or not -> their own shapes."""
        return self._map(Split.crop, tree)

    def from_whole(self, whole: Params) -> Params:
        """The reverse of `to_whole`, for fresh parameters."""
        return self._map(Split.pad, whole) if self.stage == 3 else whole

    def on_device(self, opt_state: Any) -> Any:
        """The optimizer state to compute with, fetched from host memory if it is kept there."""
        if not self.offload:
            return opt_state
        return jax.device_put(opt_state, jax.memory.Space.Device)

    def place(self, abstract_state: Any) -> Any:
        """The shapes and dtypes of the tree `abstract_state` (a TrainState), each with its sharding.

        A leaf whose path ends in that of a parameter and has its shape (padded, where it is sharded) is laid out like
        it; all others are replicated.
        """
        by_name = {path_name(path): split for path, split in jax.tree_util.tree_leaves_with_path(self.splits)}

        def placed(path: Any, x: Any) -> jax.ShapeDtypeStruct:
            keys = path_name(path).split("/")
            split = next((by_name[n] for i in range(len(keys)) if (n := "/".join(keys[i:])) in by_name), None)
            optimizer, memory = keys[0] == "opt_state", None
            sharded = self.stage >= (1 if optimizer else 3)
            spec = PartitionSpec()
            if split is not None and x.shape == (split.padded_shape if sharded else split.shape):
                spec = split.shard_spec if sharded else split.whole_spec
                memory = HOST_MEMORY if optimizer and self.offload else None
            sharding = NamedSharding(self.mesh, spec, memory_kind=memory)
            return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)

        return jax.tree_util.tree_map_with_path(placed, abstract_state)

    # ------------------------------------------------------------ on each device, in a shard_map over ROWS

    def held_specs(self) -> Params:
        """in_specs of the parameters."""
        return jax.tree.map(lambda s: s.shard_rows_spec if self.stage == 3 else PartitionSpec(), self.splits)

    def gradient_specs(self) -> Params:
        """out_specs of the reduced gradients."""
        return jax.tree.map(lambda s: s.shard_rows_spec if self.stage else PartitionSpec(), self.splits)

    def gather(self, params: Params, dtype: Any) -> tuple[Params, Any]:
        """(parameters to run the model with, `fetch` for its blocks): at stage 3 all but the blocks are gathered.

        `fetch` is a function that makes one block's parameters whole just before it runs, and the checkpoint policy
        by which the backward pass does so again. Kernels are gathered in `dtype`, which they are computed in.
        """
        if self.stage < 3:
            return params, None

        def whole(lead: int) -> Any:
            def one(path: Any, split: Split, x: jax.Array) -> jax.Array:
                return _gather(x, split, lead, dtype if path[-1].key == "kernel" else x.dtype)

            return partial(jax.tree_util.tree_map_with_path, one)

        rest = {name: leaf for name, leaf in params.items() if name != STACKED}
        splits = {name: self.splits[name] for name in rest}
        rest = _gather_as_one(rest, splits) if self.platform == "cpu" else whole(0)(splits, rest)
        return rest | {STACKED: params[STACKED]}, (partial(whole(1), self.splits[STACKED]), _keep_all_but_gathered)

    def reduce_micro_batch(self, gradients: Params) -> Params:
        """What is accumulated: at stage 2 shards of the sum over "data" (at stage 3 `gather` has done it)."""
        return self._map(lambda s, g: _scatter(g, s, 0), gradients) if self.stage == 2 else gradients

    def reduce_update(self, gradients: Params) -> Params:
        """The accumulated gradients, summed over all devices."""
        if self.stage == 0:
            return self.sum_over(ROWS, gradients)
        if self.stage == 1:
            gradients = self._map(lambda s, g: _scatter(g, s, 0), gradients)
        return self.sum_over((REPLICA,), gradients)

    def sum_over(self, axes: tuple[str, ...], tree: Any) -> Any:
        """The sum over the devices along `axes`, on each of them."""
        axes = tuple(axis for axis in axes if self.mesh.shape[axis] > 1)  # the partitioner fails on sums over none
        return jax.lax.psum(tree, axes) if axes else tree


def bytes_a_device(abstract: Any) -> int:
    """Bytes that one device holds of the placed tree `abstract`, host memory left out."""
    return sum(
        math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize
        for x in jax.tree.leaves(abstract)
        if x.sharding.memory_kind != HOST_MEMORY
    )

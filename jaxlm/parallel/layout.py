"""Where each array of the training state lives on the mesh: ZeRO, hybrid ZeRO and tensor parallelism.

ZeRO is Rajbhandari et al. 2020, arXiv:1910.02054:

| stage | parameters | gradients | optimizer state |
|---|---|---|---|
| 0 | whole | whole | whole |
| 1 | whole | whole; reduced once an update, into shards | shard |
| 2 | whole | shard; reduced every micro-batch | shard |
| 3 | shard; gathered block by block | shard; reduced every micro-batch | shard |
"""

import math
from collections.abc import Callable
from functools import partial
from typing import Any, TypeAlias, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jax.typing import DTypeLike

from jaxlm.parallel.collectives import all_gather, all_gather_as_one, keep_all_but_gathered, reduce_scatter
from jaxlm.parallel.mesh import AXES, DATA, EVERYWHERE, REPLICA, ROWS, TENSOR, AnyMesh, replicated
from jaxlm.parallel.split import STACKED, Params, Path, Split, path_name, split_parameter

HOST_MEMORY = "pinned_host"
Tree = TypeVar("Tree")  # of arrays, or of what stands for them

# (the shards of one block's parameters -> the whole ones; the checkpoint policy that gathers them again)
GatherBlock: TypeAlias = tuple[Callable[[Params], Params], Callable[..., bool]]


class Layout:
    """Where the parameters, gradients and optimizer state of one model live. The model knows nothing of it.

    A parameter stands in one of three forms:

        whole  its own shape, split over "tensor" only: what the model computes with
        held   between updates: as whole, or at stage 3 as shard
        shard  as the optimizer sees it: at stage 0 as whole; else split over "data" along one axis too, which is padded
               with zeros where the devices don't divide it

        whole --from_whole--> held --to_shards--> shard --to_held--> held --to_whole--> whole

    Args:
      mesh: the devices, or an abstract mesh where only shapes are wanted.
      stage: of ZeRO, 0 to 3.
      params: abstract whole parameters.
      offload: keep the optimizer state in host memory.
      trained: those of `params` that have gradients and optimizer state; None: all.
    """

    def __init__(
        self, mesh: AnyMesh, stage: int, params: Params, offload: bool = False, trained: Params | None = None
    ) -> None:
        self.mesh, self.stage, self.offload = mesh, stage, offload
        shards, tensor = mesh.shape[DATA], mesh.shape[TENSOR]
        self.splits: Params = jax.tree_util.tree_map_with_path(
            lambda path, x: split_parameter(path, x.shape, shards, tensor), params
        )
        self.trained: Params = self.splits if trained is None else like(self.splits, trained)

    @property
    def shapes(self) -> Params:
        """Each parameter's own shape, without padding."""
        return _shapes(self.splits)

    @property
    def trained_shapes(self) -> Params:
        """`shapes` of what is trained."""
        return _shapes(self.trained)

    @property
    def shards(self) -> int:
        """Devices that share one sharded copy, tensor parallelism left out."""
        return self.mesh.shape[DATA]

    @property
    def platform(self) -> str:
        """JAX's name of the devices' backend; an abstract mesh stands for GPUs."""
        platform: str = self.mesh.devices.flat[0].platform if isinstance(self.mesh, Mesh) else "gpu"
        return "gpu" if platform == "cuda" else platform

    def describe(self) -> str:
        """A line for the start-up report."""
        names = ("replicated", "optimizer state", "optimizer state and gradients", "all of the state")
        shape = " x ".join(f"{self.mesh.shape[axis]} {axis}" for axis in AXES)
        sharded = f"{names[self.stage]} sharded over {self.shards}" if self.stage else names[0]
        return f"{shape}; ZeRO stage {self.stage} ({sharded}){', optimizer in host memory' if self.offload else ''}"

    def bytes_of_state(self, abstract_state: object) -> int:
        """Bytes a device of the placed state, and of gradients as they are kept between micro-batches."""
        gradients = jax.tree.map(lambda split: split.placed(self.mesh, sharded=self.stage >= 2), self.trained)
        return bytes_a_device(abstract_state) + bytes_a_device(gradients)

    def _map(self, function: Callable[..., Any], tree: Params) -> Params:
        """`function` of each parameter's split and leaf, for all parameters or for some (`like`)."""
        return jax.tree.map(function, like(self.splits, tree), tree)

    def _constrain(self, tree: Params, sharded: bool) -> Params:
        constrain = jax.lax.with_sharding_constraint
        return self._map(lambda split, x: constrain(x, split.placed(self.mesh, sharded).sharding), tree)

    # ------------------------------------------------------------ on global arrays, in jit

    def from_whole(self, whole: Params) -> Params:
        """Fresh whole parameters, as they are held between updates."""
        return self._map(Split.pad, whole) if self.stage == 3 else whole

    def to_shards(self, held: Params) -> Params:
        """Held parameters, as the optimizer sees them."""
        if self.stage == 0:
            return held
        return self._constrain(held if self.stage == 3 else self._map(Split.pad, held), sharded=True)

    def to_held(self, shards: Params) -> Params:
        """Parameters as the optimizer sees them, as they are held between updates."""
        if self.stage == 0:
            return shards
        shards = self._constrain(shards, sharded=True)
        return shards if self.stage == 3 else self._constrain(self._map(Split.crop, shards), sharded=False)

    def to_whole(self, tree: Params) -> Params:
        """Held parameters or reduced gradients in their own shapes; the compiler decides where they live."""
        return self._map(Split.crop, tree)

    def on_device(self, opt_state: Tree) -> Tree:
        """The optimizer state to compute with, fetched from host memory if it is kept there."""
        if not self.offload:
            return opt_state
        return jax.device_put(opt_state, jax.memory.Space.Device)

    def place(self, abstract_state: Tree) -> Tree:
        """The shapes and dtypes of the tree `abstract_state` (a TrainState), each with its sharding.

        A leaf whose path ends in that of a parameter and has its shape (padded, where it is sharded) is laid out like
        it; all others are replicated.
        """
        by_name = {path_name(path): split for path, split in jax.tree_util.tree_leaves_with_path(self.splits)}

        def placed(path: Path, x: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
            keys = path_name(path).split("/")
            split = next((by_name[n] for i in range(len(keys)) if (n := "/".join(keys[i:])) in by_name), None)
            optimizer, sharding = keys[0] == "opt_state", replicated(self.mesh)
            like = None if split is None else split.placed(self.mesh, sharded=self.stage >= (1 if optimizer else 3))
            if like is not None and x.shape == like.shape:
                memory = HOST_MEMORY if optimizer and self.offload else None
                sharding = like.sharding.with_memory_kind(memory)
            return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)

        return jax.tree_util.tree_map_with_path(placed, abstract_state)

    # ------------------------------------------------------------ on each device, in a shard_map over ROWS

    def on_each_device(self, function: Callable[..., Any], inputs: Any, outputs: Any) -> Callable[..., Any]:
        """`function` of global arrays, with its inputs and outputs split over ROWS as these PartitionSpecs say."""
        over_rows = partial(jax.shard_map, mesh=self.mesh, axis_names=set(ROWS), check_vma=False)
        return over_rows(function, in_specs=inputs, out_specs=outputs)

    def held_specs(self) -> Params:
        """in_specs of held parameters."""
        return jax.tree.map(lambda s: s.shard_rows_spec if self.stage == 3 else EVERYWHERE, self.splits)

    def gradient_specs(self) -> Params:
        """out_specs of the reduced gradients."""
        return jax.tree.map(lambda s: s.shard_rows_spec if self.stage else EVERYWHERE, self.trained)

    def gather(self, held: Params, dtype: DTypeLike) -> tuple[Params, GatherBlock | None]:
        """Parameters to run the model with, and how each block makes its own whole (below stage 3: None).

        At stage 3 everything but the blocks is gathered here, and each block just before it runs, and again in the
        backward pass. Kernels are gathered in `dtype`, which they are computed in.
        """
        if self.stage < 3:
            return held, None

        def gather_all(lead: int) -> Callable[[Params, Params], Params]:
            def gather_leaf(path: Path, split: Split, x: jax.Array) -> jax.Array:
                return all_gather(x, split, lead, dtype if path[-1].key == "kernel" else x.dtype)

            return partial(jax.tree_util.tree_map_with_path, gather_leaf)

        rest = {name: leaf for name, leaf in held.items() if name != STACKED}
        splits = {name: self.splits[name] for name in rest}
        rest = all_gather_as_one(rest, splits) if self.platform == "cpu" else gather_all(0)(splits, rest)
        return rest | {STACKED: held[STACKED]}, (partial(gather_all(1), self.splits[STACKED]), keep_all_but_gathered)

    def reduce_micro_batch(self, gradients: Params) -> Params:
        """What is accumulated: at stage 2 shards of the sum over "data" (at stage 3 `gather` has done it)."""
        return self._map(lambda s, g: reduce_scatter(g, s), gradients) if self.stage == 2 else gradients

    def reduce_update(self, gradients: Params) -> Params:
        """The accumulated gradients, summed over all devices."""
        if self.stage == 0:
            return self.sum_over(ROWS, gradients)
        if self.stage == 1:
            gradients = self._map(lambda s, g: reduce_scatter(g, s), gradients)
        return self.sum_over((REPLICA,), gradients)

    def sum_over(self, axes: tuple[str, ...], tree: Tree) -> Tree:
        """The sum over the devices along `axes`, on each of them."""
        axes = tuple(axis for axis in axes if self.mesh.shape[axis] > 1)  # the partitioner fails on sums over none
        return jax.lax.psum(tree, axes) if axes else tree


def _shapes(splits: Params) -> Params:
    return jax.tree.map(lambda split: jax.ShapeDtypeStruct(split.shape, jnp.float32), splits)


def like(splits: Params, tree: Params) -> Params:
    """The part of `splits` whose leaves `tree` has."""
    return {name: like(splits[name], x) if isinstance(x, dict) else splits[name] for name, x in tree.items()}


def bytes_a_device(abstract: object) -> int:
    """Bytes that one device holds of the placed tree `abstract`, host memory left out."""
    return sum(
        math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize
        for x in jax.tree.leaves(abstract)
        if x.sharding.memory_kind != HOST_MEMORY
    )


def put_whole(x: np.ndarray, target: jax.ShapeDtypeStruct) -> jax.Array:
    """A whole parameter on the host, as the layout holds it: with `target`'s shape (padded by zeros), dtype, sharding.

    Each device gets its own part only.
    """
    missing = [(0, held - size) for size, held in zip(x.shape, target.shape, strict=True)]
    x = x.astype(target.dtype, copy=False)
    padded = np.pad(x, missing) if any(after for _, after in missing) else x
    return jax.make_array_from_callback(target.shape, target.sharding, lambda index: padded[index])

"""The mesh, and where arrays live on it: plain data parallelism, with rows split over devices."""

from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec


def make_mesh(devices: list[jax.Device]) -> Mesh:
    """One axis, "data", over `devices`. Auto axes: cuDNN's attention does not support explicit ones."""
    return Mesh(np.array(devices), ("data",), axis_types=(AxisType.Auto,))


def replicated(mesh: Mesh) -> NamedSharding:
    """Every device holds the whole array."""
    return NamedSharding(mesh, PartitionSpec())


def train_batch_sharding(mesh: Mesh) -> NamedSharding:
    """[K, B, ...] arrays: the B rows of each micro-batch are split over devices."""
    return NamedSharding(mesh, PartitionSpec(None, "data"))


def eval_batch_sharding(mesh: Mesh) -> NamedSharding:
    """[B, ...] arrays: rows are split over devices."""
    return NamedSharding(mesh, PartitionSpec("data"))


def with_sharding(abstract: Any, sharding: NamedSharding) -> Any:
    """The shapes and dtypes of the tree `abstract`, each placed by `sharding`."""
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), abstract)

"""The mesh of devices, and how the rows of a batch are split over it.

The mesh has three axes. Rows of a batch are split over "replica" and "data"; what a ZeRO stage shards is split over
"data" alone, so that each replica holds one full copy of it; "tensor" splits the matrices of each layer.
"""

from typing import TypeAlias

import jax
import numpy as np
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

REPLICA, DATA, TENSOR = AXES = ("replica", "data", "tensor")
ROWS = (REPLICA, DATA)
EVERYWHERE = PartitionSpec()  # every device holds the whole array
TRAIN_BATCH = PartitionSpec(None, ROWS)  # [K, B, ...] arrays: the B rows of each micro-batch are split over devices
EVAL_BATCH = PartitionSpec(ROWS)  # [B, ...] arrays: rows are split over devices

AnyMesh: TypeAlias = Mesh | AbstractMesh


def make_mesh(devices: list[jax.Device], shape: tuple[int, int, int] | None = None) -> Mesh:
    """`devices` as (replica, data, tensor), by default all along "data". Neighbours share a tensor group first.

    Axes are Auto: cuDNN's attention does not support explicit ones.
    """
    return Mesh(np.array(devices).reshape(shape or (1, -1, 1)), AXES, axis_types=(AxisType.Auto,) * 3)


def abstract_mesh(shape: tuple[int, int, int]) -> AbstractMesh:
    """The mesh of devices that are not here: enough to compute the shapes that each would hold."""
    return AbstractMesh(shape, AXES, axis_types=(AxisType.Auto,) * 3)


def replicated(mesh: AnyMesh) -> NamedSharding:
    """Every device holds the whole array."""
    return NamedSharding(mesh, EVERYWHERE)


def row_shards(mesh: AnyMesh) -> int:
    """Into how many parts the rows of a micro-batch are split."""
    return mesh.shape[REPLICA] * mesh.shape[DATA]


def show_row_shards(mesh: AnyMesh) -> str:
    """What a micro-batch's rows are split over, for messages, such as 3 devices."""
    groups, tensor = row_shards(mesh), mesh.shape[TENSOR]
    return f"{groups} groups of {tensor} devices" if tensor > 1 else f"{groups} device{'s' * (groups > 1)}"


def rows_of_process(mesh: AnyMesh, rows: int) -> slice:
    """Which of the `rows` of a micro-batch live on this process's devices."""
    indices = NamedSharding(mesh, EVAL_BATCH).addressable_devices_indices_map((rows,)).values()
    slices = [index[0] for index in indices if index is not None]
    return slice(min(s.start or 0 for s in slices), max(rows if s.stop is None else s.stop for s in slices))


def put_batch(batch: dict[str, np.ndarray], mesh: AnyMesh, spec: PartitionSpec) -> dict[str, jax.Array]:
    """This process's part of a batch, on its devices, as part of the global arrays."""
    sharding = NamedSharding(mesh, spec)
    return {name: jax.make_array_from_process_local_data(sharding, array) for name, array in batch.items()}

"""Memory a device of a training run: of the program compiled for its GPUs, or, without the compiler, an approximation.

State is exact either way: it is that of `parallel.layout.Layout`, nothing is allocated. `temporaries` are the
compiler's figure, to which comes what is there beside the program: batches sent ahead, and whole parameters for
samples. What CUDA, cuDNN and NCCL take for themselves lies outside of JAX's share of the memory (`usable`).
"""

import dataclasses
import math
import os
from collections.abc import Callable
from typing import Any

import jax

from jaxlm.config import Config
from jaxlm.errors import UserError
from jaxlm.model.layers import GATES
from jaxlm.ops.reductions import logits_chunk_bytes
from jaxlm.parallel.gpus import FRACTION_VARIABLES
from jaxlm.parallel.layout import bytes_a_device
from jaxlm.parallel.mesh import DATA, REPLICA, TENSOR, abstract_mesh
from jaxlm.plan.program import CompiledUpdate, check_devices, compile_update, resolve_for
from jaxlm.run.setup import resolve
from jaxlm.train.assemble import Assembly, Resolved, assemble
from jaxlm.train.precision import compute_dtype

BATCHES_AHEAD = 3  # on the device beside the one that is computed with
MOST_ROWS = 2**20  # where the search for the largest batch_size ends
APPROXIMATION = (
    "method: state exact; the rest by Korthikanti et al. 2022 (arXiv:2205.05198), which may be off by a quarter "
    "(docs/memory.md)"
)


def _part(made_of: str) -> Any:
    return dataclasses.field(metadata={"made_of": made_of})


@dataclasses.dataclass(frozen=True)
class Memory:
    """Bytes a device."""

    parameters: int = _part("float32 (frozen matrices in 16 bits), as the ZeRO stage holds them")
    optimizer: int = _part("the optimizer's moments")
    batch: int = _part("tokens, targets, segments, positions of the updates in flight")
    temporaries: int = _part("activations, gradients, 16-bit and gathered weights, the loss")
    sampling: int = _part("whole parameters for samples at evaluations; not while temporaries are there")
    host: int = _part("optimizer state in host memory, which visits the device in each update")

    @property
    def total(self) -> int:
        """The peak."""
        return self.parameters + self.optimizer + self.batch + max(self.temporaries, self.sampling)


MADE_OF = {part.name: part.metadata["made_of"] for part in dataclasses.fields(Memory)}


def of_program(resolved: Resolved, compiled: CompiledUpdate) -> Memory:
    """What a run takes whose update is `compiled`.

    XLA counts optimizer state in host memory as the device's, where it is while the update is computed; so it is in
    `temporaries` here.
    """
    beside = _beside_the_program(resolved)
    return dataclasses.replace(
        beside, temporaries=compiled.peak - beside.parameters - beside.optimizer - _batch(resolved)
    )


def approximation(resolved: Resolved) -> Memory:
    """As `of_program`, without a compiler."""
    beside = _beside_the_program(resolved)
    return dataclasses.replace(beside, temporaries=_approximate_temporaries(resolved) + beside.host)


def estimate(config: Config, n_devices: int) -> Memory:
    """The approximation for `n_devices` GPUs, within seconds.

    Raises:
      UserError: the configuration is not valid, or does not fit the devices.
    """
    check_devices(config, n_devices)
    return approximation(resolve(config, n_devices).at_largest_batch())


def compiled_memory(config: Config, gpu: str, devices: int, hosts: int = 1) -> Memory:
    """What each of `devices` GPUs takes, of the program compiled for them.

    Raises:
      UserError: as `resolve_for` and `compile_update`.
    """
    resolved = resolve_for(config, gpu, devices, hosts).at_largest_batch()
    return of_program(resolved, compile_update(resolved, gpu, hosts))


def largest_batch_size(config: Config, share: int, total: Callable[[Config], int]) -> int:
    """The largest training.batch_size whose `total` is at most `share` bytes; 0: not even one row's is.

    What a row adds is nearly the same for all, so a few calls of `total` find it.
    """
    known: dict[int, int] = {}

    def fits(rows: int) -> bool:
        if rows not in known:
            known[rows] = total(_with_rows(config, rows))
        return known[rows] <= share

    if not fits(1):
        return 0
    low, high = 1, MOST_ROWS
    guess = 2 * config.training.batch_size
    while high - low > 1:
        if fits(guess):
            low = guess
        else:
            high = guess
        a, b = sorted(known)[-2:]
        slope = max(1.0, (known[b] - known[a]) / (b - a))
        guess = min(max(int(a + (share - known[a]) / slope), low + 1), high - 1)
    return low


def _with_rows(config: Config, rows: int) -> Config:
    return dataclasses.replace(config, training=dataclasses.replace(config.training, batch_size=rows))


def usable(memory: int, fraction: float) -> int:
    """Bytes of a device's `memory` that JAX takes: the share that the environment names for a run, else `fraction`.

    Raises:
      UserError: it names none.
    """
    name = next((name for name in FRACTION_VARIABLES if os.environ.get(name)), None)
    if name is None:
        return int(memory * fraction)
    try:
        share = float(os.environ[name])
    except ValueError:
        share = math.nan
    if not 0 < share <= 1:
        raise UserError(f"{name} ({os.environ[name]}) must be a number from 0 to 1")
    return int(memory * share)


def _batch(resolved: Resolved) -> int:
    training = resolved.config.training
    return 4 * training.gradient_accumulation_steps * training.batch_size * (4 * resolved.config.data.max_length + 1)


def _abstract(resolved: Resolved) -> Assembly:
    return assemble(resolved, attention="blockwise")  # which kernel does not matter for what is held


def _beside_the_program(resolved: Resolved) -> Memory:
    shape = resolved.mesh.shape  # of a mesh whose devices have host memory, which those of a topology have not
    abstract = dataclasses.replace(resolved, mesh=abstract_mesh((shape[REPLICA], shape[DATA], shape[TENSOR])))
    training, state = resolved.config.training, _abstract(abstract).abstract_state
    on_device = bytes_a_device(state.opt_state)
    everywhere = sum(
        math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in jax.tree.leaves(state.opt_state)
    )
    split = training.zero_stage == 3 or training.tensor_parallel > 1
    return Memory(
        parameters=bytes_a_device(state.params),
        optimizer=on_device,
        batch=(1 + BATCHES_AHEAD) * _batch(resolved),
        temporaries=0,
        sampling=4 * _abstract(resolved).parameters if training.sample_tokens and split else 0,
        host=everywhere - on_device,
    )


def _approximate_temporaries(resolved: Resolved) -> int:
    """Activations of a micro-batch by Korthikanti et al. 2022, gradients by ZeRO's table, 16-bit weights, the loss."""
    config, layout = resolved.config, _abstract(resolved).layout
    model, training = config.model, config.training
    c, tensor, stage = compute_dtype(training).itemsize, training.tensor_parallel, training.zero_stage or 0
    d, f = model.d_model, (3 if model.activation in GATES else 2) * model.d_ff
    heads = (model.n_heads + 2 * model.kv_heads) * model.head_size  # q, k and v
    block = c * (4 * d + (heads + d + f) // tensor)  # the inputs of norms, qkv and up, and what lies between
    tokens = training.batch_size * config.data.max_length
    recomputed = {"full": c * d, "dots": c * (2 * d + (heads + model.d_ff) // tensor)}[model.remat_policy]
    kept = recomputed * model.n_layers + block if model.gradient_checkpointing else block * model.n_layers
    count = lambda splits: sum(math.prod(split.shape) for split in jax.tree.leaves(splits)) // tensor  # noqa: E731
    elements = count(layout.trained)
    shard = elements // layout.mesh.shape[DATA]
    live = elements if stage < 3 else shard + 2 * count(layout.splits) // model.n_layers
    held = (shard if stage >= 2 else elements) if training.gradient_accumulation_steps > 1 else 0
    weights = 0 if c == 4 or stage == 3 else c * elements
    logits = min(logits_chunk_bytes(training, model.vocab_size, "gpu"), c * tokens * model.vocab_size)
    return tokens * kept + 4 * (live + held) + weights + logits // tensor


def parameters(resolved: Resolved) -> tuple[int, int]:
    """How many numbers the model has, and how many of them are frozen."""
    return _abstract(resolved).parameters, _abstract(resolved).frozen

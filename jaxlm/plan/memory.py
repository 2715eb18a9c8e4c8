"""Memory a device of a training run, computed without devices: exact for the state, counted from the code for the rest.

Parameters, optimizer state and gradients are those of `parallel.layout.Layout` over an abstract mesh; activations are
what JAX keeps for the backward pass (activations.py). Temporaries are counted from the code that makes them. The GPU's
attention kernel is assumed, and `model.vocab_size` as asked for. What CUDA, cuDNN and NCCL take for themselves is not
counted: it lies outside of JAX's share of the memory (`usable`). docs/memory.md has the formulas.

Letters: D model width, F feed-forward width, H heads, V vocabulary, L layers; c bytes of the compute type.
"""

import bisect
import dataclasses
import functools
import math
import os
from typing import Any

import jax
import jax.numpy as jnp

from jaxlm.config import Config
from jaxlm.errors import UserError
from jaxlm.model.layers import GATES
from jaxlm.ops.attention_kernels import FUSED_FROM, choose_attention
from jaxlm.ops.blockwise import BLOCK, UNROLL
from jaxlm.ops.reductions import logits_chunk_bytes
from jaxlm.parallel.gpus import FRACTION_VARIABLES
from jaxlm.parallel.layout import bytes_a_device
from jaxlm.parallel.split import STACKED, TENSOR_AXES, path_name
from jaxlm.plan.activations import activation_bytes, block_bytes, with_rows
from jaxlm.run.setup import resolve
from jaxlm.train.assemble import Resolved, assemble
from jaxlm.train.precision import compute_dtype

BATCHES = 4  # on the device at a time: one computed with, the others sent ahead
MOST_ROWS = 2**20  # where the search for the largest batch_size ends
MOST_DEVICES = 2**20  # of all hosts together
METHOD = (
    "method: state exact; activations are what JAX keeps; temporaries counted from the code (docs/memory.md)\n"
    "expected error: none of the state; the rest may be less: one GPU run took 11.9 GiB of an estimated 18.6"
)


def _part(made_of: str) -> Any:
    return dataclasses.field(metadata={"made_of": made_of})


@dataclasses.dataclass(frozen=True)
class Estimate:
    """Bytes a device. `parameters`, `optimizer` and `batch` are always there, the rest in one of three `phases`."""

    parameters: int = _part("float32, as the ZeRO stage holds them")
    optimizer: int = _part("the optimizer's moments, float32")  # on the device
    batch: int = _part("tokens, targets, segments, positions of the updates in flight")
    gradients: int = _part("float32 of one micro-batch, and the accumulator")
    activations: int = _part("kept for the backward pass of one micro-batch")
    temporaries: int = _part("16-bit and gathered weights, a block at work, a chunk of the loss")
    update: int = _part("gradients and updates while parameters move; not while the three above are there")
    sampling: int = _part("whole parameters for samples at evaluations; not while the four above are there")
    host: int = _part("optimizer state in host memory; not in the total")

    @property
    def phases(self) -> dict[str, int]:
        """Bytes that come to what is always there: in the passes over a micro-batch, the update, sampling."""
        passes = self.gradients + self.activations + self.temporaries
        return {"passes": passes, "update": self.update, "sampling": self.sampling}

    @property
    def total(self) -> int:
        """The peak: what is always there and the largest phase."""
        return self.parameters + self.optimizer + self.batch + max(self.phases.values())


MADE_OF = {part.name: part.metadata["made_of"] for part in dataclasses.fields(Estimate)}


@dataclasses.dataclass(frozen=True)
class _Sizes:
    """What no batch changes. The first three are bytes a device, all others elements a device."""

    parameters: int
    optimizer: int
    host: int
    whole: int  # all parameters, split over "tensor" only
    shard: int  # as the optimizer sees them
    outside: int  # whole parameters outside of the blocks
    kernels: int  # of all blocks, whole
    largest_kernel: int  # of those, all layers of it
    unsplit: int  # all parameters, on one device


def _resolve(config: Config, n_devices: int) -> Resolved:
    """As `run.setup.resolve`, for devices that are not here."""
    if not 1 <= n_devices <= MOST_DEVICES:
        raise UserError(f"--devices ({n_devices}) must be from 1 to {MOST_DEVICES}")
    wanted = config.training.world_size
    if wanted not in (None, n_devices):
        raise UserError(f"--devices ({n_devices}) differs from training.world_size ({wanted}); give --devices {wanted}")
    return resolve(config, n_devices)


@functools.lru_cache(maxsize=64)
def _sizes(resolved: Resolved) -> _Sizes:
    assembly = assemble(resolved, attention="blockwise")
    layout, state = assembly.layout, assembly.abstract_state

    def elements(sharded: bool = False, start: str = "", end: str = "") -> int:
        total = 0
        for path, split in jax.tree_util.tree_leaves_with_path(layout.splits):
            name = path_name(path)
            if name.startswith(start) and name.endswith(end):
                placed = split.placed(layout.mesh, sharded)
                total += math.prod(placed.sharding.shard_shape(placed.shape))
        return total

    on_device = bytes_a_device(state.opt_state)
    everywhere = sum(
        math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in jax.tree.leaves(state.opt_state)
    )
    return _Sizes(
        parameters=bytes_a_device(state.params),
        optimizer=on_device,
        host=everywhere - on_device,
        whole=elements(),
        shard=elements(sharded=layout.stage > 0),
        outside=elements() - elements(start=STACKED),
        kernels=elements(start=STACKED, end="kernel"),
        largest_kernel=max(elements(start=STACKED, end=end) for end in TENSOR_AXES if end.endswith("kernel")),
        unsplit=sum(math.prod(split.shape) for split in jax.tree.leaves(layout.splits)),
    )


def _tokens(config: Config) -> int:
    return config.training.batch_size * config.data.max_length


def _weight_copies(config: Config, sizes: _Sizes) -> float:
    """Kernels in the compute type; what stage 3 gathers: two blocks, all outside of them; gradients to be stacked."""
    model, c, stage = config.model, compute_dtype(config.training).itemsize, config.training.zero_stage or 0
    cast = c if c < 4 else 0
    embedding = cast * model.vocab_size * model.d_model / config.training.tensor_parallel
    blocks = sizes.whole - sizes.outside
    # Unrolled, the blocks' gradients come one by one, and are copied into one array at the end.
    stacked = 0 if model.scan_layers else 4 * sizes.shard if stage == 3 else c * blocks
    if stage == 3:
        # Whole gradients, of one block and outside of the blocks, are there in float32 before they are scattered.
        return embedding + (2 * c + 4) * blocks / model.n_layers + 2 * 4 * sizes.outside + stacked
    return embedding + cast * sizes.kernels / (model.n_layers if model.gradient_checkpointing else 1) + stacked


def _block_at_work(config: Config, attention: str, recomputed: int) -> float:
    """What the backward pass of one block holds at a time, beside what was kept.

    Args:
      recomputed: bytes of the block's activations, if they are made again.
    """
    model, c, tensor = config.model, compute_dtype(config.training).itemsize, config.training.tensor_parallel
    tokens, d, f = _tokens(config), model.d_model, model.d_ff / tensor
    widths = 3 if model.activation in GATES else 2  # of the feed-forward: the products of up, and the input of down
    streams = 2 * c * d + widths * c * f + 3 * 4 * d  # gradients of the residual stream, feed-forward and a norm
    flash = 4 * c * d / tensor + 8 * d / tensor  # of output, q, k, v, and float32 sums
    if attention == "blockwise":
        length = config.data.max_length
        blocks = -(-length // BLOCK)
        size = -(-length // blocks)
        keys = length if blocks <= UNROLL else size
        scores = config.training.batch_size * model.n_heads / tensor * size * keys * (3 * 4 + c)
    else:
        scores = 0
    return recomputed + tokens * (streams + flash) + scores


def _loss_at_work(config: Config) -> float:
    """One chunk's logits (float32, twice, and their gradient) and the second of the output matrix's gradients.

    With logit_softcap their slopes, too.
    """
    copies: float = 2 if config.model.logit_softcap is None else 3
    rows, vocabulary, tensor = config.training.batch_size, config.model.vocab_size, config.training.tensor_parallel
    copies += compute_dtype(config.training).itemsize / 4
    logits = max(
        min(logits_chunk_bytes(config.training, "gpu"), 4 * _tokens(config) * vocabulary), 4 * rows * vocabulary
    )
    return (logits * copies + 4 * vocabulary * config.model.d_model) / tensor


def _gradient_bytes(config: Config, sizes: _Sizes) -> tuple[int, int]:
    """(while a micro-batch is differentiated, while parameters are updated)."""
    training, stage = config.training, config.training.zero_stage or 0
    live = 4 * (sizes.shard if stage == 3 else sizes.whole)
    held = sizes.shard if stage >= 2 else sizes.whole
    several = training.gradient_accumulation_steps > 1
    width = jnp.dtype(training.accumulator_dtype).itemsize
    accumulator = held * width if several else 0
    in_float32 = accumulator if several and width == 4 else accumulator + 4 * held
    return live + accumulator, in_float32 + (4 * sizes.shard if stage == 1 else 0)


def _estimate(resolved: Resolved) -> Estimate:
    config = resolved.config
    model, training = config.model, config.training
    sizes = _sizes(with_rows(resolved, 1))  # the same for all batches, so that a search over them computes it once
    attention = choose_attention(config, FUSED_FROM)
    gradients, in_update = _gradient_bytes(config, sizes)
    kept = resolved.with_fields({"model.gradient_checkpointing": False})
    recomputed = block_bytes(kept) if model.gradient_checkpointing else 0
    work = _weight_copies(config, sizes) + max(_block_at_work(config, attention, recomputed), _loss_at_work(config))
    # Updates, the moved parameters before they are gathered, and the optimizer state if it comes from the host.
    update = in_update + 4 * sizes.shard * (2 if training.zero_stage else 1) + sizes.host
    if training.optimizer == "muon":  # the matrices that it works on, whole: one, what it becomes, two squares
        update += 4 * 4 * sizes.largest_kernel
    whole_elsewhere = training.zero_stage == 3 or training.tensor_parallel > 1
    rows = training.gradient_accumulation_steps * training.batch_size
    return Estimate(
        parameters=sizes.parameters,
        optimizer=sizes.optimizer,
        batch=BATCHES * 4 * rows * (4 * config.data.max_length + 1),
        gradients=gradients,
        activations=activation_bytes(resolved),
        temporaries=math.ceil(work),
        update=update,
        sampling=4 * sizes.unsplit if training.sample_tokens and whole_elsewhere else 0,
        host=sizes.host,
    )


def estimate(config: Config, n_devices: int) -> Estimate:
    """Bytes that each of `n_devices` GPUs needs for training with `config`.

    Raises:
      UserError: the configuration is not valid, or does not fit the devices.
    """
    return _estimate(_resolve(config, n_devices))


def largest_batch_size(config: Config, n_devices: int, memory: int) -> int:
    """The largest training.batch_size whose estimate fits `usable(memory)`; 0: not even one row does.

    Args:
      memory: bytes of a device, all of it.
    """
    resolved = _resolve(config, n_devices)
    share = usable(memory, config.training.memory_fraction)

    def total(rows: int) -> int:
        return _estimate(resolved.with_fields({"training.batch_size": rows})).total

    return bisect.bisect_right(range(1, MOST_ROWS + 1), share, key=total)


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


def peak_bytes(compiled: jax.stages.Compiled) -> int:
    """Bytes a device at the peak of a program: arguments, results that don't take their place, temporaries."""
    use = compiled.memory_analysis()
    if use is None:
        raise RuntimeError("this backend says nothing about the memory of compiled programs")
    held: int = use.argument_size_in_bytes + use.output_size_in_bytes - use.alias_size_in_bytes
    return held + use.temp_size_in_bytes


def compiled_on_gpus(config: Config, n_devices: int) -> int | None:
    """Bytes a device that the compiler says the update takes, if so many GPUs are here; allocates nothing.

    Only a GPU's figure means something: on CPU it shows neither what 16 bits save nor fused kernels.
    """
    try:
        here = jax.devices("gpu")
    except (RuntimeError, AssertionError):  # none; the latter where JAX_PLATFORMS allows no platform that is here
        here = []
    if n_devices > len(here):
        return None
    return peak_bytes(assemble(resolve(config, here[:n_devices])).lower_step().compile())


def table(result: dict[str, Any]) -> str:
    """Lines for people: the parts, their sum, what fits, the method; below one GiB in MiB.

    Args:
      result: in bytes, the fields of an `Estimate` with `total`, `devices` and `compiled`, and, where the device's
        memory is known, `memory`, `usable`, `fits` and `largest_batch_size`.
    """

    def line(part: str, size: int | None, said: str) -> str:
        unit, name = (2**30, "GiB") if size is None or size >= 2**30 else (2**20, "MiB")
        return f"{part:13}{'none' if size is None else f'{size / unit:.2f} {name}':>12}  {said}"

    lines = [f"{'part':13}{'memory':>12}  each of {result['devices']} device{'s' * (result['devices'] > 1)}"]
    lines += [line(part, result[part], made_of) for part, made_of in MADE_OF.items()]
    lines.append(line("total", result["total"], "at the peak"))
    where = f"needs {result['devices']} GPU(s) here" if result["compiled"] is None else "on the GPUs here"
    lines.append(line("compiled", result["compiled"], f"the compiler's own figure {where}"))
    if "memory" in result:
        share = f"{result['usable'] / result['memory']:.0%} of the device's memory"
        lines.append(line("usable", result["usable"], f"{share}, which JAX takes (training.memory_fraction)"))
        verdict = "fits" if result["fits"] else "does not fit"
        most = result["largest_batch_size"]
        lines.append(f"{verdict}; largest training.batch_size: {most if most else 'none, not even 1'}")
    return "\n".join([*lines, METHOD])

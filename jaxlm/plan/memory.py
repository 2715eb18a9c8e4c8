"""Memory a device of a training run, computed without devices: exact for the state, an analytic model for the rest.

Parameters, optimizer state and gradients are those of `sharding.Layout` over an abstract mesh. Activations are what
JAX keeps for the backward pass (tests/test_memory.py compares, policy by policy); on a GPU the compiler may fuse some
of it away. Temporaries are counted from the code that makes them. The GPU's attention kernel is assumed, and
`model.vocab_size` as asked for. What CUDA, cuDNN and NCCL take for themselves is not counted: it lies outside of JAX's
share of the memory (`usable`). docs/memory.md has the formulas.

Letters: D model width, F feed-forward width, H heads, V vocabulary, L layers; c bytes of the compute type.
"""

import dataclasses
import functools
import math
import os
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import NamedSharding

from jaxlm.config import Config, ModelConfig, resolved, validate
from jaxlm.errors import UserError
from jaxlm.interop import deepspeed
from jaxlm.model import Transformer
from jaxlm.model.layers import GATES
from jaxlm.ops.attention_kernels import FUSED_FROM, choose_attention, compute_capability
from jaxlm.ops.blockwise import BLOCK, UNROLL
from jaxlm.ops.flash import TILES, padded_head_size
from jaxlm.ops.reductions import logits_chunk_bytes
from jaxlm.parallel import sharding
from jaxlm.parallel.gpus import FRACTION_VARIABLES
from jaxlm.parallel.sharding import STACKED, TENSOR_AXES, Layout
from jaxlm.train.optim import build_optimizer, build_schedule, check_optimizer
from jaxlm.train.precision import compute_dtype
from jaxlm.train.step import TrainState, compile_train_step, init_state, make_train_step

BATCHES = 4  # on the device at a time: one computed with, the others sent ahead
MOST_ROWS = 2**20  # where the search for the largest batch_size ends
MOST_DEVICES = 2**20  # of all hosts together
METHOD = (
    "method: state exact; activations are what JAX keeps; temporaries counted from the code (docs/memory.md)\n"
    "expected error: none of the state; the rest may be less: one GPU run took 11.9 GiB of an estimated 18.6"
)


@dataclasses.dataclass(frozen=True)
class Estimate:
    """Bytes a device. `parameters`, `optimizer` and `batch` are always there, the rest in one of three `phases`."""

    parameters: int
    optimizer: int  # on the device
    batch: int
    gradients: int  # of one micro-batch, and the sum over micro-batches if there are several
    activations: int  # of one micro-batch, kept for its backward pass
    temporaries: int  # beside them
    update: int  # gradients and copies alive while parameters are moved
    sampling: int  # whole parameters for the samples that are printed at evaluations, where the layout splits them
    host: int  # optimizer state in host memory, not in `total`

    @property
    def phases(self) -> dict[str, int]:
        """Bytes that come to what is always there: in the passes over a micro-batch, the update, sampling."""
        passes = self.gradients + self.activations + self.temporaries
        return {"passes": passes, "update": self.update, "sampling": self.sampling}

    @property
    def total(self) -> int:
        """The peak: what is always there and the largest phase."""
        return self.parameters + self.optimizer + self.batch + max(self.phases.values())


MADE_OF = {
    "parameters": "float32, as the ZeRO stage holds them",
    "optimizer": "the optimizer's moments, float32",
    "batch": "tokens, targets, segments, positions of the updates in flight",
    "gradients": "float32 of one micro-batch, and the accumulator",
    "activations": "kept for the backward pass of one micro-batch",
    "temporaries": "16-bit and gathered weights, a block at work, a chunk of the loss",
    "update": "gradients and updates while parameters move; not while the three above are there",
    "sampling": "whole parameters for samples at evaluations; not while the four above are there",
    "host": "optimizer state in host memory; not in the total",
}


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


def _resolve(config: Config, n_devices: int) -> tuple[Config, tuple[int, int, int]]:
    """The configuration as the Trainer would use it, and its mesh."""
    validate(config)
    check_optimizer(config.training)
    if not 1 <= n_devices <= MOST_DEVICES:
        raise UserError(f"--devices ({n_devices}) must be from 1 to {MOST_DEVICES}")
    wanted = config.training.world_size
    if wanted not in (None, n_devices):
        raise UserError(f"--devices ({n_devices}) differs from training.world_size ({wanted}); give --devices {wanted}")
    shape = sharding.mesh_shape(config, n_devices)
    config, _ = deepspeed.apply(config, world=shape[0] * shape[1])
    return validate(resolved(config)), shape


def _abstract_run(config: Config, mesh: Any, attention: str) -> tuple[Any, Layout, TrainState]:
    """The model's graph, the layout and the placed abstract state, as Trainer has them."""
    training = config.training

    def make() -> Transformer:
        rngs = nnx.Rngs(training.seed)
        return Transformer(config.model, implementation=attention, dtype=compute_dtype(training), rngs=rngs)

    graphdef, abstract_model = nnx.split(nnx.eval_shape(make))
    layout = Layout(mesh, training.zero_stage or 0, nnx.to_pure_dict(abstract_model), training.offload_optimizer)
    state = jax.eval_shape(lambda: init_state(make(), build_optimizer(training, layout.shapes), config, layout))
    return graphdef, layout, layout.place(state)


@functools.lru_cache(maxsize=64)
def _sizes(config: Config, shape: tuple[int, int, int]) -> _Sizes:
    _, layout, state = _abstract_run(config, sharding.abstract_mesh(shape), "blockwise")

    def elements(sharded: bool = False, start: str = "", end: str = "") -> int:
        total = 0
        for path, split in jax.tree_util.tree_leaves_with_path(layout.splits):
            name = sharding.path_name(path)
            if name.startswith(start) and name.endswith(end):
                spec = split.shard_spec if sharded else split.whole_spec
                of = split.padded_shape if sharded else split.shape
                total += math.prod(NamedSharding(layout.mesh, spec).shard_shape(of))
        return total

    on_device = sharding.bytes_a_device(state.opt_state)
    everywhere = sum(
        math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in jax.tree.leaves(state.opt_state)
    )
    return _Sizes(
        parameters=sharding.bytes_a_device(state.params),
        optimizer=on_device,
        host=everywhere - on_device,
        whole=elements(),
        shard=elements(sharded=layout.stage > 0),
        outside=elements() - elements(start=STACKED),
        kernels=elements(start=STACKED, end="kernel"),
        largest_kernel=max(elements(start=STACKED, end=end) for end in TENSOR_AXES if end.endswith("kernel")),
        unsplit=sum(math.prod(split.shape) for split in jax.tree.leaves(layout.splits)),
    )


def block_bytes(config: Config, attention: str, policy: str = "none") -> float:
    """Bytes a token of the activations that one block keeps for its backward pass, on a device.

    Args:
      config: the run's; `training.tensor_parallel` splits what lies between the matrices that it splits.
      attention: "blockwise", "cudnn" or "pallas".
      policy: "none" (keep all), "full" or "dots".
    """
    model, c, tensor = config.model, _compute_bytes(config), config.training.tensor_parallel
    d, f = model.d_model, model.d_ff / tensor
    kv = d * model.kv_heads / model.n_heads
    if policy == "full":
        return c * d  # the block's input
    if policy == "dots":  # and the products that the rest is made of again: qkv, out, up; down if a norm follows it
        up = 2 * f if model.activation in GATES else f
        return c * (d + (d + 2 * kv) / tensor + d + up + (0 if model.pre_norm else d))
    norms: float = 2 * _norm_keeps(model)
    if model.qk_norm:
        norms += (3 * 4 * (d + kv) + 2 * 4 * (model.n_heads + model.kv_heads)) / tensor
    flash, copied = _flash_keeps(config, attention)
    inputs = c * 2 * d + (c * d / tensor if copied else 0)  # of qkv, up, out (else the kernel's output itself)
    masks = 2 * d if model.dropout else 0  # one byte an element; those of attention are made again
    widths = 3 if model.activation in GATES else 2  # the products of up, and the input of down
    return norms + inputs + flash + masks + widths * c * f


def _flash_keeps(config: Config, attention: str) -> tuple[float, bool]:
    """Bytes a token that the attention kernel keeps, and whether its output is copied before it is used.

    It keeps queries, keys, values and output as it took them, padded, and the log-sum-exp.
    """
    model, c, length = config.model, _compute_bytes(config), config.data.max_length
    head_size = width = model.d_model // model.n_heads
    heads, kv_heads, padded = model.n_heads, model.kv_heads, length
    if attention == "blockwise":
        kv_heads = heads
        blocks = -(-length // BLOCK)
        padded = blocks * -(-length // blocks)
    elif attention == "pallas":
        width = padded_head_size(head_size)
        padded += -length % TILES[width].longest
    kept = padded / length * (2 * c * width * (heads + kv_heads) + 4 * heads)
    return kept / config.training.tensor_parallel, attention == "blockwise" or (padded, width) != (length, head_size)


def _norm_keeps(model: ModelConfig) -> int:
    """Bytes a token that one norm of the residual stream keeps, in float32."""
    return 3 * 4 * model.d_model + (2 if model.norm == "rmsnorm" else 4) * 4


def activation_bytes(config: Config, attention: str) -> float:
    """Bytes of activations that a device keeps for the backward pass of one micro-batch."""
    model, c = config.model, _compute_bytes(config)
    policy = model.remat_policy if model.gradient_checkpointing else "none"
    ends = c * model.d_model + (_norm_keeps(model) if model.pre_norm else 0)  # loss and final norm
    ends += model.d_model if model.dropout else 0
    angles = 4 * 4 * (model.d_model // model.n_heads // 2) if model.positions == "rotary" and policy == "none" else 0
    return _tokens(config) * (model.n_layers * block_bytes(config, attention, policy) + ends + angles)


def _compute_bytes(config: Config) -> int:
    return jnp.dtype(compute_dtype(config.training)).itemsize


def _tokens(config: Config) -> int:
    return config.training.batch_size * config.data.max_length


def _weight_copies(config: Config, sizes: _Sizes) -> float:
    """Kernels in the compute type; what stage 3 gathers: two blocks, all outside of them; gradients to be stacked."""
    model, c, stage = config.model, _compute_bytes(config), config.training.zero_stage or 0
    cast = c if c < 4 else 0
    embedding = cast * model.vocab_size * model.d_model / config.training.tensor_parallel
    blocks = sizes.whole - sizes.outside
    # Unrolled, the blocks' gradients come one by one, and are copied into one array at the end.
    stacked = 0 if model.scan_layers else 4 * sizes.shard if stage == 3 else c * blocks
    if stage == 3:
        # Whole gradients, of one block and outside of the blocks, are there in float32 before they are scattered.
        return embedding + (2 * c + 4) * blocks / model.n_layers + 2 * 4 * sizes.outside + stacked
    return embedding + cast * sizes.kernels / (model.n_layers if model.gradient_checkpointing else 1) + stacked


def _block_at_work(config: Config, attention: str) -> float:
    """What the backward pass of one block holds at a time, beside what was kept."""
    model, c, tensor = config.model, _compute_bytes(config), config.training.tensor_parallel
    tokens, d, f = _tokens(config), model.d_model, model.d_ff / tensor
    again = block_bytes(config, attention) if model.gradient_checkpointing else 0
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
    return tokens * (again + streams + flash) + scores


def _loss_at_work(config: Config) -> float:
    """One chunk's logits (float32, twice, and their gradient) and the second of the output matrix's gradients.

    With logit_softcap their slopes, too.
    """
    copies = 2 if config.model.logit_softcap is None else 3
    rows, vocabulary, tensor = config.training.batch_size, config.model.vocab_size, config.training.tensor_parallel
    logits = max(
        min(logits_chunk_bytes(config.training, "gpu"), 4 * _tokens(config) * vocabulary), 4 * rows * vocabulary
    )
    return (logits * (copies + _compute_bytes(config) / 4) + 4 * vocabulary * config.model.d_model) / tensor


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


def _estimate(config: Config, shape: tuple[int, int, int]) -> Estimate:
    """`config` is resolved."""
    model, training = config.model, config.training
    # What changes no size is left out of the key, so that a search over batch sizes computes the state once.
    key = dataclasses.replace(
        config,
        model=dataclasses.replace(model, gradient_checkpointing=False, remat_policy="full"),
        training=dataclasses.replace(training, batch_size=1, gradient_accumulation_steps=1),
    )
    sizes = _sizes(key, shape)
    attention = choose_attention(config, FUSED_FROM)
    gradients, in_update = _gradient_bytes(config, sizes)
    work = _weight_copies(config, sizes) + max(_block_at_work(config, attention), _loss_at_work(config))
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
        activations=math.ceil(activation_bytes(config, attention)),
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
    return _estimate(*_resolve(config, n_devices))


def largest_batch_size(config: Config, n_devices: int, memory: int) -> int:
    """The largest training.batch_size whose estimate fits `usable(memory)`; 0: not even one row does.

    Args:
      memory: bytes of a device, all of it.
    """
    resolved, shape = _resolve(config, n_devices)
    share = usable(memory, config.training.memory_fraction)

    def fits(rows: int) -> bool:
        training = dataclasses.replace(resolved.training, batch_size=rows)
        return _estimate(dataclasses.replace(resolved, training=training), shape).total <= share

    low, high = 0, 1
    while high <= MOST_ROWS and fits(high):
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


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


def compiled_bytes(config: Config, devices: list[jax.Device]) -> int:
    """Bytes a device that the compiler says the training step takes on `devices`; compiles, and allocates nothing.

    Only a GPU's figure means something: on CPU it shows neither what 16 bits save nor fused kernels.
    """
    config, shape = _resolve(config, len(devices))
    mesh, training = sharding.make_mesh(devices, shape), config.training
    attention = choose_attention(config, compute_capability(devices[0]))
    graphdef, layout, state = _abstract_run(config, mesh, attention)
    placement = sharding.train_batch_sharding(mesh)
    rows = (training.gradient_accumulation_steps, training.batch_size * sharding.row_shards(mesh))
    array = lambda *shape: jax.ShapeDtypeStruct(shape, np.int32, sharding=placement)  # noqa: E731
    names = ("tokens", "targets", "segments", "positions")
    batch = dict.fromkeys(names, array(*rows, config.data.max_length)) | {"rows": array(*rows)}
    step = make_train_step(graphdef, config, build_schedule(training, 1), layout)
    use = compile_train_step(step, state, batch).memory_analysis()
    held = use.argument_size_in_bytes + use.output_size_in_bytes - use.alias_size_in_bytes
    return held + use.temp_size_in_bytes


def compiled_on_gpus(config: Config, n_devices: int) -> int | None:
    """`compiled_bytes` on as many GPUs, if they are here."""
    try:
        here = jax.devices("gpu")
    except (RuntimeError, AssertionError):  # none; the latter where JAX_PLATFORMS allows no platform that is here
        here = []
    return compiled_bytes(config, here[:n_devices]) if n_devices <= len(here) else None


def table(result: dict[str, Any]) -> str:
    """Lines for people: the parts, their sum, what fits, the method; below one GiB in MiB.

    Args:
      result: in bytes, the fields of an `Estimate` with `total`, `devices` and `compiled`, and, where the device's
        memory is known, `memory`, `usable`, `fits` and `largest_batch_size`.
    """

    def line(part: str, size: int | None, said: str) -> str:
        unit, name = (2**30, "GiB") if size is None or size >= 2**30 else (2**20, "MiB")
        return f"{part:13}{'none' if size is None else f'{size / unit:.2f} {name}':>12}  {said}"

    lines = [f"{'part':13}{'memory':>12}  each of {result['devices']} device(s)"]
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


def parameters(config: Config) -> int:
    """How many numbers the model has."""
    return _sizes(*_resolve(config, 1)).unsplit

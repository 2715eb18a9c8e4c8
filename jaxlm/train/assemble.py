"""A run's program, put together once for everyone: the model's graph, the layout, the abstract state, the step.

Nothing is allocated. The devices may be here, be those of a topology that a program is compiled for, or stay abstract.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping
from functools import cached_property, lru_cache
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding

from jaxlm.config import Config, TrainingConfig, replace_fields
from jaxlm.config.batches import Batches, read_schedule
from jaxlm.config.validate import LARGEST_INT
from jaxlm.model import Transformer
from jaxlm.ops.attention_kernels import choose_attention, compute_capability
from jaxlm.ops.compiler import Options, options_of_kernel
from jaxlm.ops.own_kernels import LOWEST_CAPABILITY, choose_kernels
from jaxlm.parallel.layout import Layout
from jaxlm.parallel.mesh import TRAIN_BATCH, AnyMesh, replicated, row_shards
from jaxlm.parallel.processes import say
from jaxlm.parallel.split import Params, path_name
from jaxlm.train.numbers import Numbers, abstract_numbers, program_config, run_numbers
from jaxlm.train.own_loss import OwnLoss, check_own_loss
from jaxlm.train.precision import compute_dtype
from jaxlm.train.step import EvalStep, TrainState, first_state, make_eval_step, make_train_step
from jaxlm.train.trainable import check_trains, divided, is_adapter, joined, part, with_adapters

BATCH_ARRAYS = ("tokens", "targets", "segments", "positions")


@dataclasses.dataclass(frozen=True)
class Resolved:
    """A configuration that is valid and complete, and the devices that it is for."""

    config: Config
    mesh: AnyMesh
    notes: tuple[str, ...] = ()  # lines for the start-up report: what a DeepSpeed file says that is left to XLA
    offset: int = 0  # of `Batches`
    masked: bool = False  # whether batches have a loss_mask
    annealed: int | None = None  # `anneal_row`, once the stream is beyond it: other batches later don't move it

    def with_fields(self, values: Mapping[str, Any]) -> "Resolved":
        """A copy with the configuration's fields named in `values` ("section.field") set."""
        return dataclasses.replace(self, config=replace_fields(self.config, values))

    @property
    def devices(self) -> list[jax.Device]:
        """Of the mesh; none of an abstract one."""
        return list(self.mesh.devices.flat) if isinstance(self.mesh, Mesh) else []

    @property
    def capability(self) -> float | None:
        """Compute capability of the GPUs, None for CPUs; an abstract mesh stands for GPUs with fused attention."""
        return compute_capability(self.devices[0]) if self.devices else LOWEST_CAPABILITY

    @property
    def batches(self) -> Batches:
        """Which rows each update takes."""
        training = self.config.training
        rows, schedule = training.batch_size * row_shards(self.mesh), read_schedule(training.batch_schedule)
        return Batches(rows, training.gradient_accumulation_steps, schedule, self.offset)

    @property
    def global_batch(self) -> int:
        """Rows an update, before training.batch_schedule changes them."""
        return self.batches.rows * self.batches.accumulation

    def at_largest_batch(self) -> "Resolved":
        """A run all of whose updates are as large as the largest that training.batch_schedule gives it."""
        counts = self.batches.counts(range(self.config.training.max_steps or LARGEST_INT))
        return self.with_fields({"training.gradient_accumulation_steps": max(counts), "training.batch_schedule": ()})

    @property
    def anneal_row(self) -> int | None:
        """The row of the stream from which on data.anneal_weights hold; None: they never do."""
        first = self.config.data.anneal_from
        return self.annealed if first is None or self.annealed is not None else self.batches.position(first - 1)


def abstract_model(config: Config, attention: str, model_class: type[Transformer] = Transformer) -> Any:
    """The model that `Assembly.init` makes, without its parameters' values."""
    return nnx.eval_shape(lambda: _new_model(config, attention, model_class, jax.random.key(0)))


def _new_model(config: Config, attention: str, model_class: type[Transformer], key: jax.Array) -> Transformer:
    dtype = compute_dtype(config.training)
    model = model_class(config.model, implementation=attention, dtype=dtype, rngs=nnx.Rngs(key))
    return with_adapters(model, config.training, jax.random.fold_in(key, 1))


class Assembly:
    """The program of all runs that differ in numbers only (`train.numbers`).

    Args:
      config: of the program.
      attention: the kernel.
      own_kernels: of `choose_kernels`.
      options: of XLA, in pairs.
      masked: whether batches have a loss_mask.
      own_loss: None: the cross entropy.

    Raises:
      UserError: the own loss is none.
    """

    def __init__(
        self,
        config: Config,
        mesh: AnyMesh,
        model_class: type[Transformer],
        attention: str,
        own_kernels: frozenset[str],
        options: tuple[tuple[str, str | bool], ...],
        masked: bool,
        own_loss: OwnLoss | None = None,
    ) -> None:
        self.masked, self.own_loss = masked, own_loss
        self.config, self.mesh, self.model_class, self.attention = config, mesh, model_class, attention
        self.own_kernels, self.options = own_kernels, dict(options)
        model = abstract_model(config, attention, model_class)
        model.own_kernels = own_kernels
        self.graphdef, abstract = nnx.split(model)
        training, params = config.training, nnx.to_pure_dict(abstract)
        check_trains(training, [path_name(path) for path, _ in jax.tree_util.tree_leaves_with_path(params)])
        trained, _ = divided(params, training)
        self.layout = Layout(mesh, training.zero_stage or 0, params, training.offload_optimizer, trained)
        if own_loss is not None:
            self._check_own_loss(own_loss, params)

    def with_micro_batches(self, count: int) -> "Assembly":
        """The program of updates of `count` micro-batches of the same run; the state is the same."""
        if count == self.config.training.gradient_accumulation_steps:
            return self
        config = replace_fields(self.config, {"training.gradient_accumulation_steps": count})
        in_pairs, kernels = tuple(sorted(self.options.items())), (self.attention, self.own_kernels)
        return _assembly(config, self.mesh, self.model_class, *kernels, in_pairs, self.masked, self.own_loss)

    def _check_own_loss(self, own_loss: OwnLoss, params: Params) -> None:
        batch = {name: jax.ShapeDtypeStruct(x.shape[1:], x.dtype) for name, x in self.abstract_batch.items()}
        results = jax.eval_shape(
            lambda params, batch: own_loss(nnx.merge(self.graphdef, params), batch, None), params, batch
        )
        check_own_loss(own_loss, self.config.training, results, batch["targets"].shape)

    def _fresh(self, numbers: Numbers) -> Params:
        key = jax.random.wrap_key_data(numbers["key"])
        model = _new_model(self.config, self.attention, self.model_class, key)
        return self.layout.from_whole(nnx.to_pure_dict(nnx.state(model)))

    def _state_with(self, base: Params, numbers: Numbers) -> TrainState:
        adapters = part(self._fresh(numbers), is_adapter)
        return first_state(joined(base, adapters), self.config, self.layout, numbers)

    def _init(self, numbers: Numbers) -> TrainState:
        return first_state(self._fresh(numbers), self.config, self.layout, numbers)

    @property
    def base(self) -> tuple[Params, Params]:
        """Shapes of the parameters that a model without adapters has, whole, and as they are held in the state."""
        is_base = lambda name: not is_adapter(name)  # noqa: E731
        return part(self.layout.shapes, is_base), part(self.abstract_state.params, is_base)

    @cached_property
    def abstract_state(self) -> TrainState:
        """Shapes, dtypes and shardings of the state."""
        state: TrainState = self.layout.place(jax.eval_shape(self._init, self.abstract_numbers))
        return state

    @property
    def abstract_numbers(self) -> dict[str, jax.ShapeDtypeStruct]:
        """Shapes, dtypes and shardings of an update's numbers."""
        everywhere = replicated(self.mesh)
        return jax.tree.map(lambda x: x.update(sharding=everywhere), abstract_numbers(self.config.training))

    @property
    def abstract_batch(self) -> dict[str, jax.ShapeDtypeStruct]:
        """Shapes, dtypes and shardings of an update's batch."""
        training, placement = self.config.training, NamedSharding(self.mesh, TRAIN_BATCH)
        rows = training.gradient_accumulation_steps, training.batch_size * row_shards(self.mesh)
        array = lambda dtype, *shape: jax.ShapeDtypeStruct(shape, dtype, sharding=placement)  # noqa: E731
        mask = {"loss_mask": array(np.bool_, *rows, self.config.data.max_length)} if self.masked else {}
        arrays = dict.fromkeys(BATCH_ARRAYS, array(np.int32, *rows, self.config.data.max_length))
        return arrays | {"rows": array(np.int32, *rows)} | mask

    @property
    def parameters(self) -> int:
        """How many numbers the model has."""
        return sum(math.prod(x.shape) for x in jax.tree.leaves(self.layout.shapes))

    @property
    def frozen(self) -> int:
        """How many of them are not trained."""
        return self.parameters - sum(math.prod(x.shape) for x in jax.tree.leaves(self.layout.trained_shapes))

    def _shardings(self) -> TrainState:
        return jax.tree.map(lambda x: x.sharding, self.abstract_state)

    def numbers(self, training: TrainingConfig) -> Numbers:
        """`run_numbers`, on the devices."""
        return jax.device_put(run_numbers(training), replicated(self.mesh))

    @cached_property
    def init(self) -> Callable[[Numbers], TrainState]:
        """The numbers of a run -> a fresh state, on the devices."""
        return jax.jit(self._init, out_shardings=self._shardings())

    @cached_property
    def state_with(self) -> Callable[[Params, Numbers], TrainState]:
        """The state before the first update with `base` parameters as the layout holds them; they are donated."""
        return jax.jit(self._state_with, out_shardings=self._shardings(), donate_argnums=0)

    def jit_step(self, donate: bool = True) -> jax.stages.Wrapped:
        """The update of `make_train_step`; `donate` lets the new state take the place of the one that is passed in."""
        step = make_train_step(self.graphdef, self.config, self.layout, self.own_loss)
        return jax.jit(step, donate_argnums=0 if donate else (), out_shardings=(self._shardings(), None))

    def lower_step(self) -> jax.stages.Lowered:
        """The update, lowered for the devices."""
        return self.jit_step().lower(self.abstract_state, self.abstract_batch, self.abstract_numbers)

    @cached_property
    def compiled_step(self) -> jax.stages.Compiled:
        """The update, compiled for the devices."""
        return self.lower_step().compile(compiler_options=self.options)

    @cached_property
    def eval_step(self) -> EvalStep:
        """`make_eval_step`, compiled when it is first called."""
        step = make_eval_step(self.graphdef, self.config, self.layout, self.own_loss)
        return jax.jit(step, compiler_options=self.options)

    @property
    def averages(self) -> bool:
        """Whether the state holds an average of the parameters."""
        return self.config.training.ema_decay is not None

    @cached_property
    def average(self) -> Callable[[TrainState], Params]:
        """The average of the parameters in a state, held as they are."""

        def held(state: TrainState) -> Params:
            average = self.layout.to_held(self.layout.on_device(state.opt_state.average))
            return joined(average, divided(state.params, self.config.training)[1])

        return jax.jit(held, out_shardings=self._shardings().params)

    @cached_property
    def to_whole(self) -> Callable[[Params], Params]:
        """Held parameters -> whole ones, on every device."""
        return jax.jit(self.layout.to_whole, out_shardings=replicated(self.mesh))


_assembled = lru_cache(maxsize=8)(Assembly)


def _assembly(*made_from: Any) -> Assembly:
    """One that is there already, but for an own loss (the last argument), which may compute something else by now."""
    return _assembled(*made_from) if made_from[-1] is None else Assembly(*made_from)


def assemble(
    resolved: Resolved,
    model_class: type[Transformer] = Transformer,
    attention: str | None = None,
    own_kernels: frozenset[str] | None = None,
    options: Options | None = None,
    own_loss: OwnLoss | None = None,
) -> Assembly:
    """The program of a run; that of an earlier one in this process, if they differ in numbers only.

    Args:
      attention: the kernel; None: the one that the configuration and the devices ask for.
      own_kernels: of `ops.own_kernels.choose_kernels`; None: those that the configuration and the devices ask for.
      options: of XLA.
      own_loss: None: the cross entropy.

    Raises:
      UserError: the configuration asks for an attention kernel that can't do it on these devices; the own loss is none.
    """
    attention = attention or choose_attention(resolved.config, resolved.capability)
    own_kernels = choose_kernels(resolved.config, resolved.capability) if own_kernels is None else own_kernels
    in_pairs = tuple(sorted((options_of_kernel(attention, say) | (options or {})).items()))
    config = program_config(resolved.config)
    kernels = attention, own_kernels
    return _assembly(config, resolved.mesh, model_class, *kernels, in_pairs, resolved.masked, own_loss)

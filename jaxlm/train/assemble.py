"""A run's program, put together once for everyone: the model's graph, the layout, the abstract state, the step.

Nothing is allocated. The devices may be here, be those of a topology that a program is compiled for, or stay abstract.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping
from functools import cached_property
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding

from jaxlm.config import Config, replace_fields
from jaxlm.model import Transformer
from jaxlm.ops.attention_kernels import FUSED_FROM, choose_attention, compute_capability
from jaxlm.ops.compiler import Options
from jaxlm.parallel.layout import Layout
from jaxlm.parallel.mesh import TRAIN_BATCH, AnyMesh, replicated, row_shards
from jaxlm.parallel.split import Params
from jaxlm.train.precision import compute_dtype
from jaxlm.train.step import TrainState, first_state, make_eval_step, make_train_step

BATCH_ARRAYS = ("tokens", "targets", "segments", "positions")


@dataclasses.dataclass(frozen=True)
class Resolved:
    """A configuration that is valid and complete, and the devices that it is for."""

    config: Config
    mesh: AnyMesh
    notes: tuple[str, ...] = ()  # lines for the start-up report: what a DeepSpeed file says that is left to XLA
    offset: int = 0  # see `position`; not 0 where the rows an update have changed on the way

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
        return compute_capability(self.devices[0]) if self.devices else FUSED_FROM

    @property
    def global_batch(self) -> int:
        """Rows an update."""
        training = self.config.training
        return training.batch_size * row_shards(self.mesh) * training.gradient_accumulation_steps

    def position(self, step: int) -> int:
        """Rows of the stream that come before update `step` (from 0): all that the updates before it took."""
        return self.offset + step * self.global_batch


def abstract_model(config: Config, attention: str, model_class: type[Transformer] = Transformer) -> Any:
    """The model that the function in `Assembly.init` makes, without its numbers."""
    return nnx.eval_shape(lambda: new_model(config, attention, model_class))


def new_model(config: Config, attention: str, model_class: type[Transformer]) -> Transformer:
    """A model with fresh parameters, from training.seed."""
    rngs = nnx.Rngs(config.training.seed)
    return model_class(config.model, implementation=attention, dtype=compute_dtype(config.training), rngs=rngs)


class Assembly:
    """The program of a run.

    Args:
      attention: the kernel; None: the one that the configuration and the devices ask for.

    Raises:
      UserError: the configuration asks for an attention kernel that can't do it on these devices.
    """

    def __init__(
        self, resolved: Resolved, model_class: type[Transformer] = Transformer, attention: str | None = None
    ) -> None:
        self.config, self.mesh, self.model_class = resolved.config, resolved.mesh, model_class
        self.attention = attention or choose_attention(self.config, resolved.capability)
        self.graphdef, abstract = nnx.split(abstract_model(self.config, self.attention, model_class))
        stage, offload = self.config.training.zero_stage or 0, self.config.training.offload_optimizer
        self.layout = Layout(self.mesh, stage, nnx.to_pure_dict(abstract), offload)

    def _state_with(self, params: Params) -> TrainState:
        return first_state(params, self.config, self.layout)

    def _init(self) -> TrainState:
        model = new_model(self.config, self.attention, self.model_class)
        return self._state_with(self.layout.from_whole(nnx.to_pure_dict(nnx.state(model))))

    @cached_property
    def abstract_state(self) -> TrainState:
        """Shapes, dtypes and shardings of the state."""
        state: TrainState = self.layout.place(jax.eval_shape(self._init))
        return state

    @property
    def abstract_batch(self) -> dict[str, jax.ShapeDtypeStruct]:
        """Shapes, dtypes and shardings of an update's batch."""
        training, placement = self.config.training, NamedSharding(self.mesh, TRAIN_BATCH)
        rows = training.gradient_accumulation_steps, training.batch_size * row_shards(self.mesh)
        array = lambda *shape: jax.ShapeDtypeStruct(shape, np.int32, sharding=placement)  # noqa: E731
        return dict.fromkeys(BATCH_ARRAYS, array(*rows, self.config.data.max_length)) | {"rows": array(*rows)}

    @property
    def parameters(self) -> int:
        """How many numbers the model has."""
        return sum(math.prod(x.shape) for x in jax.tree.leaves(self.layout.shapes))

    def _shardings(self) -> TrainState:
        return jax.tree.map(lambda x: x.sharding, self.abstract_state)

    def init(self) -> TrainState:
        """A fresh state, on the devices."""
        return jax.jit(self._init, out_shardings=self._shardings())()

    def state_with(self, params: Params) -> TrainState:
        """The state before the first update with these parameters, as the layout holds them; they are donated."""
        return jax.jit(self._state_with, out_shardings=self._shardings(), donate_argnums=0)(params)

    def jit_step(self, donate: bool = True) -> jax.stages.Wrapped:
        """The update of `make_train_step`; `donate` lets the new state take the place of the one that is passed in."""
        step = make_train_step(self.graphdef, self.config, self.layout)
        return jax.jit(step, donate_argnums=0 if donate else (), out_shardings=(self._shardings(), None))

    def lower_step(self) -> jax.stages.Lowered:
        """The update, lowered for the devices."""
        numbers = {"learning_rate": jax.ShapeDtypeStruct((), jnp.float32, sharding=replicated(self.mesh))}
        return self.jit_step().lower(self.abstract_state, self.abstract_batch, numbers)

    def eval_step(self, options: Options | None = None) -> Callable[..., tuple[jax.Array, jax.Array]]:
        """`make_eval_step`, compiled when it is first called."""
        return jax.jit(make_eval_step(self.graphdef, self.config, self.layout), compiler_options=options)

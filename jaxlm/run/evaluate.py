"""The held-out loss of a saved model."""

import dataclasses
from collections.abc import Callable

import jax
from flax import nnx

from jaxlm.checkpoints.load import LoadedModel
from jaxlm.config import DataConfig, validate
from jaxlm.data.loader import Rows, eval_batches
from jaxlm.data.packing import plan_cached
from jaxlm.data.tokens import prepare
from jaxlm.parallel.layout import Layout
from jaxlm.parallel.mesh import make_mesh
from jaxlm.train.evaluate import evaluate_batches
from jaxlm.train.step import make_eval_step


def evaluate_model(
    loaded: LoadedModel, data: DataConfig, batch_size: int, report: Callable[[str], None]
) -> dict[str, float]:
    """The held-out loss of a saved model on the validation text of `data`.

    Raises:
      UserError: the text is not usable, or `data` does not fit the model.
    """
    config = validate(dataclasses.replace(loaded.config, data=data))
    documents = prepare(data, config.model.vocab_size, loaded.tokenizer, report).validation
    rows = Rows(documents, plan_cached(documents, data, report))
    graphdef, state = nnx.split(loaded.model)
    params = nnx.to_pure_dict(state)
    eval_step = jax.jit(make_eval_step(graphdef, config, Layout(make_mesh(jax.devices()[:1]), 0, params)))
    return evaluate_batches(eval_step, params, eval_batches(rows, batch_size), documents.kept_bytes(data.min_length))

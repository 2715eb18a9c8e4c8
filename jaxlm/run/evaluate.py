"""The held-out loss of a saved model."""

import dataclasses
from collections.abc import Callable

import jax
from flax import nnx

from jaxlm.checkpoints.load import LoadedModel
from jaxlm.config import DataConfig, validate
from jaxlm.data.loader import eval_batches
from jaxlm.data.tokens import prepare
from jaxlm.parallel.layout import Layout
from jaxlm.parallel.mesh import make_mesh
from jaxlm.run.text import rows_of
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
    graphdef, state = nnx.split(loaded.model)
    params = nnx.to_pure_dict(state)
    eval_step = jax.jit(make_eval_step(graphdef, config, Layout(make_mesh(jax.devices()[:1]), 0, params)))
    batches = eval_batches(rows_of(documents, data, report), batch_size)
    return evaluate_batches(eval_step, params, batches, documents.kept_bytes(data.min_length))

"""Held-out loss: one full, deterministic pass, weighted by tokens."""

import math
from collections.abc import Callable, Iterable
from typing import Any

import jax
import numpy as np
from flax import nnx

from jaxlm.checkpoints.checkpoint import LoadedModel
from jaxlm.config import DataConfig, validate
from jaxlm.data.loader import Rows, eval_batches
from jaxlm.data.packing import plan_cached
from jaxlm.data.tokens import prepare
from jaxlm.parallel.sharding import Layout, make_mesh
from jaxlm.train.step import Params, make_eval_step

EvalStep = Callable[[Params, Any], tuple[jax.Array, jax.Array]]
BATCHES_AHEAD = 3  # dispatched at most. Without a bound all batches would be held, and several CPU devices get stuck


def evaluate_rows(eval_step: EvalStep, params: Params, batches: Iterable[Any], utf8_bytes: int) -> dict[str, float]:
    """`loss` (nats a token), `perplexity`, `bits_per_byte` (nats / ln 2 / utf8_bytes) and `tokens` over all batches.

    Batches are summed on the host in float64, in order.
    """
    sums: list[tuple[jax.Array, jax.Array]] = []
    for batch in batches:
        sums.append(eval_step(params, batch))
        jax.block_until_ready(sums[-BATCHES_AHEAD:][0])
    nats, tokens = np.sum(np.array(jax.device_get(sums), np.float64), axis=0)
    loss = float(nats / tokens)
    perplexity = math.exp(loss) if loss < 700 else math.inf
    return {
        "loss": loss,
        "perplexity": perplexity,
        "bits_per_byte": float(nats) / math.log(2) / utf8_bytes,
        "tokens": int(tokens),
    }


def evaluate_model(
    loaded: LoadedModel, data: DataConfig, batch_size: int, report: Callable[[str], None]
) -> dict[str, float]:
    """The held-out loss of a saved model on the validation text of `data`.

    Raises:
      UserError: the text is not usable, or `data` does not fit the model.
    """
    config = loaded.config.__class__(model=loaded.config.model, training=loaded.config.training, data=data)
    validate(config)
    documents = prepare(data, config.model.vocab_size, loaded.tokenizer, report).validation
    plan = plan_cached(documents, data.max_length, data.min_length, data.packing_strategy, data.pack_sequences, report)
    graphdef, state = nnx.split(loaded.model)
    params = nnx.to_pure_dict(state)
    eval_step = jax.jit(make_eval_step(graphdef, config, Layout(make_mesh(jax.devices()[:1]), 0, params)))
    batches = eval_batches(Rows(documents, plan, data.max_length), batch_size)
    return evaluate_rows(eval_step, params, batches, documents.kept_bytes(data.min_length))

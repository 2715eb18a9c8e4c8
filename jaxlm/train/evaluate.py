"""Held-out loss: one full, deterministic pass, weighted by tokens."""

import math
from collections.abc import Iterable, Mapping
from typing import Any

import jax
import numpy as np
from jax.typing import ArrayLike

from jaxlm.parallel.split import Params
from jaxlm.train.step import EvalStep

BATCHES_AHEAD = 3  # dispatched at most. Without a bound all batches would be held, and several CPU devices get stuck


def evaluate_batches(
    eval_step: EvalStep, params: Params, batches: Iterable[Mapping[str, ArrayLike]], utf8_bytes: int
) -> dict[str, float]:
    """`loss` (nats a token), `perplexity`, `bits_per_byte` (nats / ln 2 / utf8_bytes) and `tokens` over all batches.

    Of an own loss (see `make_eval_step`): `loss`, its other metrics and `tokens`.

    Batches are summed on the host in float64, in order.
    """
    sums: list[tuple[Any, ...]] = []
    for batch in batches:
        sums.append(eval_step(params, batch))
        jax.block_until_ready(sums[-BATCHES_AHEAD:][0])
    nats, tokens, *own = jax.tree.map(lambda *each: np.array(each, np.float64).sum(), *jax.device_get(sums))
    loss = float(nats / tokens)
    if own:
        ratios = {name: float(total / count) if count else math.nan for name, (total, count) in own[0].items()}
        return {"loss": loss, **ratios, "tokens": int(tokens)}
    perplexity = math.exp(loss) if loss < 700 else math.inf
    return {
        "loss": loss,
        "perplexity": perplexity,
        "bits_per_byte": float(nats) / math.log(2) / utf8_bytes,
        "tokens": int(tokens),
    }


def describe_evaluation(metrics: Mapping[str, float]) -> str:
    """What `evaluate_batches` returns in a line; with `average_...`, those of an average of the parameters, too."""
    if "perplexity" not in metrics:
        return ", ".join(f"validation {name} {value:.4f}" for name, value in metrics.items() if name != "tokens")
    line = (
        f"validation loss {metrics['loss']:.4f}, perplexity {metrics['perplexity']:.2f}, "
        f"{metrics['bits_per_byte']:.4f} bits per byte"
    )
    if "average_loss" not in metrics:
        return line
    return f"{line}; of the average {metrics['average_loss']:.4f}, {metrics['average_bits_per_byte']:.4f}"

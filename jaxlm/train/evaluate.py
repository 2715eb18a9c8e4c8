"""Held-out loss: one full, deterministic pass, weighted by tokens."""

import math
from collections.abc import Iterable, Mapping

import jax
import numpy as np
from jax.typing import ArrayLike

from jaxlm.parallel.split import Params
from jaxlm.train.step import EvalStep

BATCHES_AHEAD = 3  # dispatched at most. Without a bound all batches would be held, and several CPU devices get stuck


def evaluate_batches(
    eval_step: EvalStep, params: Params, batches: Mapping[str, Iterable[Mapping[str, ArrayLike]]], utf8_bytes: int
) -> dict[str, float]:
    """`loss` (nats a token), `perplexity`, `bits_per_byte` (nats / ln 2 / utf8_bytes) and `tokens` over all batches.

    `batches` are those of each source by its name, whose own loss is added as `NAME/loss`; under "" those of a text
    without a name. They are summed on the host in float64, in order.
    """
    totals: dict[str, np.ndarray] = {}
    for name, of_source in batches.items():
        sums: list[tuple[jax.Array, jax.Array]] = []
        for batch in of_source:
            sums.append(eval_step(params, batch))
            jax.block_until_ready(sums[-BATCHES_AHEAD:][0])
        totals[name] = np.sum(np.array(jax.device_get(sums), np.float64), axis=0)
    nats, tokens = np.sum([*totals.values()], axis=0)
    loss = float(nats / tokens)
    perplexity = math.exp(loss) if loss < 700 else math.inf
    return {
        "loss": loss,
        "perplexity": perplexity,
        "bits_per_byte": float(nats) / math.log(2) / utf8_bytes,
        "tokens": int(tokens),
    } | {f"{name}/loss": float(own / of) for name, (own, of) in totals.items() if name}


def describe_evaluation(metrics: Mapping[str, float]) -> str:
    """What `evaluate_batches` returns in a line; with `average_...`, those of an average of the parameters, too."""
    line = (
        f"validation loss {metrics['loss']:.4f}, perplexity {metrics['perplexity']:.2f}, "
        f"{metrics['bits_per_byte']:.4f} bits per byte"
    )
    line += "".join(f"; {name.removesuffix('/loss')} {x:.4f}" for name, x in metrics.items() if name.endswith("/loss"))
    if "average_loss" not in metrics:
        return line
    return f"{line}; of the average {metrics['average_loss']:.4f}, {metrics['average_bits_per_byte']:.4f}"

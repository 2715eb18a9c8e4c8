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
    eval_step: EvalStep, params: Params, batches: Mapping[str, Iterable[Mapping[str, ArrayLike]]], utf8_bytes: int
) -> dict[str, float]:
    """`loss` (nats a token), `perplexity`, `bits_per_byte` (nats / ln 2 / utf8_bytes) and `tokens` over all batches.

    Of an own loss (see `make_eval_step`): `loss`, its other metrics and `tokens`.

    `batches` are those of each source by its name, whose own loss is added as `NAME/loss`; under "" those of a text
    without a name. They are summed on the host in float64, in order.
    """
    totals = dict[str, tuple[Any, ...]]()
    for name, of_source in batches.items():
        sums: list[tuple[Any, ...]] = []
        for batch in of_source:
            sums.append(eval_step(params, batch))
            jax.block_until_ready(sums[-BATCHES_AHEAD:][0])
        totals[name] = _summed(jax.device_get(sums))
    nats, tokens, *own = _summed([*totals.values()])
    loss = float(nats / tokens)
    of_sources = {f"{name}/loss": float(sums[0] / sums[1]) for name, sums in totals.items() if name}
    if own:
        ratios = {name: float(total / count) if count else math.nan for name, (total, count) in own[0].items()}
        return {"loss": loss, **ratios, **of_sources, "tokens": int(tokens)}
    perplexity = math.inf if loss >= 700 else math.exp(loss)
    return {
        "loss": loss,
        "perplexity": perplexity,
        "bits_per_byte": float(nats) / math.log(2) / utf8_bytes,
        "tokens": int(tokens),
        **of_sources,
    }


def _summed(each: list[tuple[Any, ...]]) -> tuple[Any, ...]:
    """The sum of what `eval_step` has returned so many times, float64."""
    return jax.tree.map(lambda *values: np.array(values, np.float64).sum(), *each)


def describe_evaluation(metrics: Mapping[str, float]) -> str:
    """What `evaluate_batches` returns in a line; with `average_...`, those of an average of the parameters, too."""
    if "perplexity" not in metrics:
        return ", ".join(f"validation {name} {value:.4f}" for name, value in metrics.items() if name != "tokens")
    line = (
        f"validation loss {metrics['loss']:.4f}, perplexity {metrics['perplexity']:.2f}, "
        f"{metrics['bits_per_byte']:.4f} bits per byte"
    )
    line += "".join(f"; {name.removesuffix('/loss')} {x:.4f}" for name, x in metrics.items() if name.endswith("/loss"))
    if "average_loss" not in metrics:
        return line
    return f"{line}; of the average {metrics['average_loss']:.4f}, {metrics['average_bits_per_byte']:.4f}"

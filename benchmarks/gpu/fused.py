"""The kernels for norms and for the loss: what kernels.py checks and times of them, beside plain JAX."""

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxlm.ops.matmul import matmul
from jaxlm.ops.norm_kernels import Factors, Terms, multiply_norm
from jaxlm.ops.norms import normalise_sum
from jaxlm.train.loss import loss_sums

EPSILON = 1e-5


@dataclasses.dataclass(frozen=True)
class Fused:
    """What one of them is given; `width` is the number of channels, or of tokens in the vocabulary."""

    kernel: str  # "norm", "norm and product" or "loss"
    width: int
    tokens: int
    centred: bool = True  # LayerNorm
    capped: bool = False  # logits, with a z-loss beside it


def checked(cut: bool) -> list[Fused]:
    """The cases to check, those that tell most first."""
    if cut:
        return [
            Fused("norm", 48, 70),
            Fused("norm and product", 48, 70, centred=False),
            Fused("loss", 97, 12, capped=True),
        ]
    norms = [Fused(name, width, 4096) for width in (768, 1600, 2048, 8192) for name in ("norm", "norm and product")]
    losses = [Fused("loss", width, 1024, capped=capped) for width in (50304, 32000, 65536) for capped in (False, True)]
    return [*norms, *losses, *(Fused("norm", width, 1001, centred=False) for width in (768, 5120))]


def timed(cut: bool) -> list[Fused]:
    """The cases to time: GPT-2 124M's."""
    if cut:
        return checked(cut)[:1]
    return [Fused("norm", 768, 32768), Fused("norm and product", 768, 32768), Fused("loss", 50304, 4096)]


def arguments(case: Fused, dtype: str) -> tuple[Any, ...]:
    """The same for all dtypes, rounded to bfloat16 once."""
    rng = np.random.default_rng(0)

    def array(*shape: int, rounded: bool = True) -> jax.Array:
        x = jnp.asarray(rng.normal(size=shape), jnp.float32)
        return x.astype(jnp.bfloat16).astype(dtype) if rounded else x

    if case.kernel == "loss":
        hidden, w = array(1, case.tokens, 64), array(case.width, 64).astype(jnp.float32)
        targets = jnp.asarray(rng.integers(0, case.width, (1, case.tokens)), jnp.int32)
        return hidden, w, targets, jnp.full((1, case.tokens), 1 / case.tokens)
    x, update, bias = array(1, case.tokens, case.width), array(1, case.tokens, case.width), array(case.width)
    factors = Factors(1 + array(case.width, rounded=False), array(case.width, rounded=False) if case.centred else None)
    more = (array(case.width, 64),) if case.kernel == "norm and product" else ()
    return Terms(x, update, bias), factors, *more


def function(case: Fused, own: bool) -> Callable[..., Any]:
    """Outputs and gradients of all arguments, by the kernels or by plain JAX."""
    if case.kernel == "loss":

        def loss(hidden: jax.Array, w: jax.Array, targets: jax.Array, weights: jax.Array) -> Any:
            kept_as = jnp.float16 if hidden.dtype == jnp.bfloat16 else jnp.float32
            options = (10.0 if case.capped else None, 1e-3 if case.capped else 0.0, 2**30, kept_as, own)
            return loss_sums(hidden, w, targets, weights, *options)

        return lambda *x: jax.value_and_grad(lambda *y: (lambda s: (s[0], s))(loss(*y)), (0, 1), has_aux=True)(*x)

    def outputs(terms: Terms, factors: Factors, *w: jax.Array) -> tuple[jax.Array, jax.Array]:
        if own and w:
            return multiply_norm(terms, factors, *w, EPSILON, case.centred)
        total, y = normalise_sum(terms, factors, EPSILON, case.centred, by_kernels=own)
        return total, matmul(y, *w) if w else y

    def both(*x: Any) -> Any:
        found, pull = jax.vjp(outputs, *x)
        weights = [jnp.cos(jnp.arange(y.size, dtype=jnp.float32)).reshape(y.shape).astype(y.dtype) for y in found]
        return found, pull(tuple(weights))

    return both


def off(found: Any, exact: Any) -> float:
    """The largest difference of any array, of the largest value there; NaN counts as infinite."""
    pairs = zip(jax.tree.leaves(found), jax.tree.leaves(exact), strict=True)
    wide = [(np.asarray(x, np.float32), np.asarray(y, np.float32)) for x, y in pairs]
    largest = float(np.max([np.abs(x - y).max() / np.abs(y).max() for x, y in wide]))
    return largest if np.isfinite(largest) else 1e30


def check(case: Fused, floor: float) -> dict[str, Any]:
    """How far the kernel is from plain JAX in float32, beside plain JAX in bfloat16, which may be as far off twice."""
    with jax.default_matmul_precision("highest"):
        exact = jax.jit(function(case, own=False))(*arguments(case, "float32"))
    given = arguments(case, "bfloat16")
    plain, program = jax.jit(function(case, own=False))(*given), jax.jit(function(case, own=True))
    first, second = program(*given), program(*given)
    same = all(np.array_equal(x, y) for x, y in zip(jax.tree.leaves(first), jax.tree.leaves(second), strict=True))
    error, limit = off(first, exact), max(2 * off(plain, exact), floor)
    shown = {"errors": {"all": error}, "limits": {"all": limit}, "bit_equal": same}
    return shown | {"passed": error <= limit and same}


def clock(case: Fused, seconds_a_call: Callable[..., float]) -> Iterator[tuple[str, float]]:
    """(name, ms) of outputs and gradients by the kernel and by plain JAX."""
    given = arguments(case, "bfloat16")
    for name, own in (("own_ms", True), ("plain_ms", False)):
        yield name, 1e3 * seconds_a_call(jax.jit(function(case, own)).lower(*given).compile(), given)

"""The machine's best rate of square matrix products, as a yardstick: python benchmarks/peak.py jax|torch

Prints {"float32": FLOP/s, "bf16": FLOP/s}: the best of several sizes and repeats, inputs and result in that precision.
"""

import json
import sys
import time
from collections.abc import Callable

SIZES = (512, 1024, 2048, 4096)
REPEATS = 4


def with_jax(size: int, precision: str) -> Callable[[], None]:
    import jax
    import jax.numpy as jnp

    x = jax.random.normal(jax.random.key(0), (size, size), {"float32": jnp.float32, "bf16": jnp.bfloat16}[precision])
    product = jax.jit(jnp.matmul)
    return lambda: product(x, x).block_until_ready()


def with_torch(size: int, precision: str) -> Callable[[], None]:
    import torch

    x = torch.randn(size, size, dtype={"float32": torch.float32, "bf16": torch.bfloat16}[precision])
    return lambda: torch.matmul(x, x)


def best_rate(make: Callable[[int, str], Callable[[], None]], precision: str) -> float:
    rates = []
    for size in SIZES:
        product = make(size, precision)
        product()
        for _ in range(REPEATS):
            start = time.perf_counter()
            product()
            rates.append(2 * size**3 / (time.perf_counter() - start))
    return max(rates)


if __name__ == "__main__":
    library = {"jax": with_jax, "torch": with_torch}[sys.argv[1]]
    print(json.dumps({precision: best_rate(library, precision) for precision in ("float32", "bf16")}))

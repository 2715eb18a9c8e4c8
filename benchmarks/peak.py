"""The machine's best rate of square matrix products, as a yardstick: python benchmarks/peak.py jax|torch [SIZE ...]

Prints {"float32": FLOP/s, "bf16": FLOP/s}: the best of several sizes and repeats, inputs and result in that precision.
"""

import json
import sys
import time
from collections.abc import Callable, Sequence

SIZES = (512, 1024, 2048, 4096)
REPEATS = 4
SLOW = 1.0  # seconds of one product, after which no larger one is tried: PyTorch's bf16 on a CPU that has none


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


def seconds_of(product: Callable[[], None]) -> float:
    product()
    times = []
    for _ in range(REPEATS):
        start = time.perf_counter()
        product()
        times.append(time.perf_counter() - start)
    return min(times)


def best_rate(make: Callable[[int, str], Callable[[], None]], precision: str, sizes: Sequence[int]) -> float:
    best = 0.0
    for size in sizes:
        seconds = seconds_of(make(size, precision))
        best = max(best, 2 * size**3 / seconds)
        if seconds > SLOW:
            break
    return best


if __name__ == "__main__":
    library = {"jax": with_jax, "torch": with_torch}[sys.argv[1]]
    sizes = [int(size) for size in sys.argv[2:]] or SIZES
    print(json.dumps({precision: best_rate(library, precision, sizes) for precision in ("float32", "bf16")}))

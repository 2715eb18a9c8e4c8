#!/usr/bin/env bash
# On a CPU JAX's top_k of bfloat16, float16 or whole numbers sorts all of them: that takes a hundred times as long as float32's.
#
# jax 0.10.2. One would take the type for a detail: the eight largest of 125,000 logits are found in one pass, and numbers of
# half the size shouldn't take longer. XLA's CPU compiler has its own top-k for float32 alone. For every other type
# lax.top_k compiles to a full stable sort of the values with their indices, of which it then keeps eight: some hundred times
# the time of float32. So the logits of a bfloat16 model are sampled from faster after a cast to float32, which is exact, and
# gives the same values and indices. What helps: astype(float32) first, for whole numbers, too, where they are below 2^24.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3.11 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q jax==0.10.2 numpy==2.4.6
cat >"$folder/top.py" <<'PYTHON'
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np


def measured(function, numbers: jax.Array) -> tuple[bool, float, list[np.ndarray]]:
    """Whether the program has a sort, its seconds (the best of three), and what it gives."""
    compiled = jax.jit(function).lower(numbers).compile()
    times = []
    for _ in range(3):
        start = time.perf_counter()
        found = jax.block_until_ready(compiled(numbers))
        times.append(time.perf_counter() - start)
    return " sort(" in compiled.as_text(), min(times), [np.asarray(each, np.float32) for each in found]


def top(numbers: jax.Array) -> list[jax.Array]:
    return jax.lax.top_k(numbers, 8)


def top_of_float32(numbers: jax.Array) -> list[jax.Array]:
    return jax.lax.top_k(numbers.astype(jnp.float32), 8)


draws = np.random.default_rng(0).normal(size=(8, 125_000)) * 100
as_guessed = False
for dtype in (jnp.float32, jnp.bfloat16, jnp.float16, jnp.int32, jnp.int8):
    numbers = jnp.asarray(draws.clip(-127, 127) if dtype == jnp.int8 else draws).astype(dtype)
    sorts, seconds, found = measured(top, numbers)
    cast_sorts, cast_seconds, cast = measured(top_of_float32, numbers)
    same = all(map(np.array_equal, found, cast))
    print(f"{dtype.__name__}: sorts {sorts}, {seconds * 1000:.1f} ms; cast to float32: sorts {cast_sorts},", end=" ")
    print(f"{cast_seconds * 1000:.1f} ms, the same values and indices: {same}")
    slow = sorts and seconds > 5 * cast_seconds
    as_guessed |= cast_sorts or not same or slow == (dtype == jnp.float32)
sys.exit(as_guessed)
PYTHON
JAX_PLATFORMS=cpu "$folder/venv/bin/python" "$folder/top.py" || {
  echo "this has changed"
  exit 1
}

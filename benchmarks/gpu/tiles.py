"""Which tiles of the fused attention kernels are fastest on this GPU: python benchmarks/gpu/tiles.py [--sizes 64 128]

Each kernel is timed by itself, packed with and without dropout and unpacked, at GPT-2's 32 x 1024 tokens. The tiles in
use stand first. What does not compile is shown as such. For choosing TILES in jaxlm/ops/flash_kernels.py.
"""

import argparse
import functools
import itertools
import json
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # lib

from attention import RATE, Case, inputs
from kernels import reason, seconds_a_call
from lib.report import markdown

from jaxlm.ops import flash
from jaxlm.ops.flash_kernels import TILES, Constants, Inputs, Tile

KERNELS = {"forward": "forward", "keys": "keys_and_values", "queries": "queries"}  # and their fields of Tiles
TRIED = {
    "forward": [(m, n) for m in (64, 128) for n in (32, 64, 128)],
    "keys": [(64, 32), (32, 64), (64, 64), (128, 64), (64, 128)],
    "queries": [(64, 32), (32, 64), (64, 64), (128, 64), (64, 128)],
}
CASES = {
    "packed": {"segments": True},
    "packed, dropout": {"segments": True, "dropout": True},
    "unpacked": {},
}
COMPILERS = 14
ROUNDS, ROUND_SECONDS = 3, 0.02


@functools.cache
def arrays(case: Case) -> tuple[jax.Array, ...]:
    """Queries, keys, values, the output's gradient, segments, dropout keys, and a number a query."""
    return *inputs(case), jnp.zeros((case.rows, case.heads, case.length), jnp.float32)


def tried(kernel: str, size: int) -> list[Tile]:
    """The tile in use, then all others."""
    now = getattr(TILES[size], KERNELS[kernel])
    tiles = (
        Tile(queries, keys, warps, stages)
        for (queries, keys), warps, stages in itertools.product(TRIED[kernel], (4, 8), (2, 3))
        if queries * keys * size <= 64 * 128 * 128
    )
    return list(dict.fromkeys([now, *tiles]))


def program(kernel: str, size: int, tile: Tile, case: Case) -> tuple[Callable[..., Any], tuple[Any, ...]]:
    """A function of one kernel alone, and its arguments."""
    q, k, v, g, segments, key, row = arrays(case)
    tiles = TILES[size]._replace(**{KERNELS[kernel]: tile})
    constants = Constants(size**-0.5, RATE if case.dropout else 0.0, tiles)
    segments, key = segments if case.segments else None, flash.kernel_key(key) if case.dropout else None
    x = Inputs(q, k, v, segments=segments, key=key)
    if kernel == "forward":
        return lambda x: flash.forward(x, constants)[1][-3:], (x,)
    x = x._replace(g=g, lse=row)
    if kernel == "queries":
        return lambda x: flash.query_gradients(x, constants), (x._replace(out=g),)
    return lambda x: flash.key_gradients(x, constants), (x._replace(delta=row),)


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--sizes", nargs="+", type=int, choices=TILES, default=[64, 128], help="head sizes")
    parser.add_argument("--kernels", nargs="+", choices=KERNELS, default=list(KERNELS))
    parser.add_argument("--cut", action="store_true", help="tiny: a test of this program")
    parser.add_argument("--out", type=Path, help="JSON file")
    options = parser.parse_args(arguments)
    rows = []
    with ThreadPoolExecutor(COMPILERS) as pool:
        coming = []
        for size, kernel, (name, about) in itertools.product(options.sizes, options.kernels, CASES.items()):
            shape = {"rows": 1, "heads": 1} if options.cut else {"rows": 32, "heads": 12 * 64 // size}
            case = Case(size, 128 if options.cut else 1024, **about, **shape)
            for tile in tried(kernel, size)[: 2 if options.cut else None]:
                function, given = program(kernel, size, tile, case)
                made = pool.submit(lambda f, x: jax.jit(f).lower(*x).compile(), function, given)
                coming.append((size, kernel, name, tile, made, given))
        wait([made for *_, made, _ in coming])  # compiling slows the host down, which starts what is timed
        for size, kernel, name, tile, made, given in coming:
            failed = made.exception()
            took = None if failed else 1e3 * seconds_a_call(made.result(), given, ROUNDS, ROUND_SECONDS)
            rows.append({"head_size": size, "kernel": kernel, "case": name, **tile._asdict(), "ms": took})
            if failed:
                rows[-1]["error"] = reason(failed)
            if options.out:
                options.out.write_text(json.dumps(rows, indent=1) + "\n")
    heads = [">head size", "kernel", "case", *(f">{name}" for name in Tile._fields), ">ms"]
    shown = [
        [str(row[n]) for n in ("head_size", "kernel", "case", *Tile._fields)]
        + [row.get("error", "")[:60] if row["ms"] is None else f"{row['ms']:.3f}"]
        for row in sorted(rows, key=lambda r: (r["head_size"], r["kernel"], r["case"], r["ms"] or 1e9))
    ]
    print(markdown(heads, shown))


if __name__ == "__main__":
    main(sys.argv[1:])

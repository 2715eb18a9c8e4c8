"""This package's kernels: right to rounding, the same every time, and how fast. A part of suite.py."""

import dataclasses
import itertools
import json
import statistics
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from typing import Any

import fused
import jax
import jax.numpy as jnp
import numpy as np
from attention import Attention, Case, checked, dense, implementations, inputs, kernel, timed, with_gradients
from lib.machine import say, without_paths
from lib.worker import answers

from jaxlm.ops.attention_kernels import causal_attention, compute_capability
from jaxlm.parallel.devices import find_devices

FACTORS = {
    "output": 2.0,
    "dq": 3.0,
    "dk": 3.0,
    "dv": 3.0,
}  # times what the dense computation in its precision is off by;
# gradients more: flash kernels take the output as they wrote it, rounded, and blockwise is up to 1.95 times off on CPU
FLOOR = {"bfloat16": 2**-7, "float16": 2**-10, "float32": 2**-16}  # and always by this, a rounding (float32: some)
COMPILERS = 8  # threads: XLA and Triton compile outside of Python's lock
ROUNDS, ROUND_SECONDS = 5, 0.05  # of timing


def compiled(function: Attention, arguments: Sequence[jax.Array]) -> Attention:
    return jax.jit(function).lower(*arguments).compile()


def programs(
    pool: Executor, case: Case, capability: float | None, attention: Attention = causal_attention
) -> dict[str, Future[Attention]]:
    """The reference, the yardstick and each kernel, all with gradients, as they get compiled."""
    arguments = inputs(case)
    in_float32 = (*(x.astype(jnp.float32) for x in arguments[:4]), *arguments[4:])
    reference, yardstick = dense(case, "float32", "highest"), dense(case, case.dtype, None)
    return {
        "reference": pool.submit(compiled, with_gradients(reference), in_float32),
        "yardstick": pool.submit(compiled, with_gradients(yardstick), arguments),
    } | {
        name: pool.submit(compiled, with_gradients(kernel(case, name, attention)), arguments)
        for name in implementations(case, capability)
    }


def errors(outputs: Sequence[jax.Array], reference: Sequence[jax.Array]) -> dict[str, float]:
    """The largest difference of each output from the reference, of the largest value there; NaN counts as infinite."""
    pairs = [(np.asarray(x, np.float32), np.asarray(y)) for x, y in zip(outputs, reference, strict=True)]
    found = [float(np.abs(x - y).max() / np.abs(y).max()) for x, y in pairs]
    return {name: error if np.isfinite(error) else 1e30 for name, error in zip(FACTORS, found, strict=True)}


def check(case: Case, made: dict[str, Future[Attention]]) -> Iterator[dict[str, Any]]:
    """How far each kernel is from the reference, and whether two calls are equal to the last bit (cuDNN's need not)."""
    arguments = inputs(case)
    in_float32 = (*(x.astype(jnp.float32) for x in arguments[:4]), *arguments[4:])
    reference = made.pop("reference").result()(*in_float32)
    yardstick = errors(made.pop("yardstick").result()(*arguments), reference)
    limits = {name: max(factor * yardstick[name], FLOOR[case.dtype]) for name, factor in FACTORS.items()}
    for name, program in made.items():
        about = {"what": "check", "implementation": name, **dataclasses.asdict(case)}
        if program.exception() is not None:
            yield about | {"error": reason(program.exception())}
            continue
        first, second = (program.result()(*arguments) for _ in range(2))
        same = all(np.array_equal(np.asarray(x), np.asarray(y)) for x, y in zip(first, second, strict=True))
        found = errors(first, reference)
        passed = all(found[what] <= limits[what] for what in FACTORS) and (same or name.startswith("cudnn"))
        yield about | {
            "errors": found, "dense_errors": yardstick, "limits": limits, "bit_equal": same, "passed": passed
        }  # fmt: skip


def reason(error: BaseException) -> str:
    """The first line of what a compiler says."""
    return without_paths(f"{type(error).__name__}: {error}".strip().partition("\n")[0])[:300]


def seconds_a_call(
    function: Attention, arguments: Sequence[jax.Array], rounds: int = ROUNDS, seconds: float = ROUND_SECONDS
) -> float:
    """The median of several rounds, each of as many calls as fill `seconds`."""

    def round_of(calls: int) -> float:
        begin = time.perf_counter()
        for _ in range(calls):
            last = function(*arguments)
        jax.block_until_ready(last)
        return (time.perf_counter() - begin) / calls

    round_of(2)
    calls = max(1, round(seconds / round_of(2)))
    return statistics.median(round_of(calls) for _ in range(rounds))


def clock(pool: Executor, case: Case, capability: float | None) -> Iterator[dict[str, Any]]:
    """Milliseconds and TFLOP/s of each kernel; only what a causal mask leaves is counted, and all of it if packed."""
    q, k, v, g, *rest = inputs(case)
    given = ((q, k, v, *rest), (q, k, v, g, *rest))
    forward_flops = 4 * case.rows * case.heads * case.length**2 * case.head_size / 2
    for name in implementations(case, capability):
        about = {"what": "time", "implementation": name, **dataclasses.asdict(case)}
        attend = kernel(case, name)
        functions = (attend, with_gradients(attend))
        made = [pool.submit(compiled, *pair) for pair in zip(functions, given, strict=True)]
        failed = [program.exception() for program in made if program.exception() is not None]
        if failed:
            yield about | {"error": reason(failed[0])}
            continue
        forward, both = (seconds_a_call(program.result(), x) for program, x in zip(made, given, strict=True))
        times = {"forward_ms": 1e3 * forward, "both_ms": 1e3 * both}
        rates = {"forward_tflops": forward_flops / forward / 1e12, "both_tflops": 3.5 * forward_flops / both / 1e12}
        yield about | times | rates


def fused_results(cut: bool) -> Iterator[dict[str, Any]]:
    """Of the kernels for norms and for the loss, which compile within seconds."""
    check = lambda case: fused.check(case, FLOOR["bfloat16"])  # noqa: E731
    clocked = lambda case: dict(fused.clock(case, seconds_a_call))  # noqa: E731
    checks = [("check", case, check) for case in fused.checked(cut)]
    times = [("beside plain JAX", case, clocked) for case in fused.timed(cut)]
    for what, case, found in (*checks, *times):
        about = {"what": what, "implementation": case.kernel, **dataclasses.asdict(case)}
        try:
            yield about | found(case)
        except Exception as error:  # whatever Pallas, a compiler or a GPU raises; the other cases go on
            yield about | {"error": reason(error)}


def left_out(what: str, cases: Sequence[Case]) -> Iterator[dict[str, Any]]:
    return ({"what": what, **dataclasses.asdict(case), "left_out": "no time"} for case in cases)


def results(spec: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """All that the time allows; a third of it is kept for timing."""
    capability, begin = compute_capability(find_devices()[0]), time.monotonic()
    yield from fused_results(spec["cut"])
    with ThreadPoolExecutor(COMPILERS) as pool:
        cases = checked(spec["cut"])
        coming = [programs(pool, case, capability) for case in cases]
        for i, case in enumerate(cases):
            if time.monotonic() - begin > spec["seconds"] * 2 / 3:
                for future in itertools.chain(*(made.values() for made in coming[i:])):
                    future.cancel()
                yield from left_out("check", cases[i:])
                break
            yield from check(case, coming[i])
            coming[i].clear()
        cases = timed(spec["cut"])
        for i, case in enumerate(cases):
            if time.monotonic() - begin > spec["seconds"]:
                yield from left_out("time", cases[i:])
                break
            yield from clock(pool, case, capability)


def main() -> None:
    answer = answers()
    for result in results(json.loads(sys.argv[1])):
        answer(result)
        name = result.get("implementation", "left out")
        times = [f"{result[what]:.3f} ms" for what in ("both_ms", "own_ms") if what in result]
        shown = "".join(times) or result.get("error", "")
        passed = {None: "", True: "right", False: "WRONG"}[result.get("passed")]
        if "length" in result:
            shape = f"{result['head_size']} x {result['length']} {result['dtype']}"
        else:
            shape = f"{result['width']} x {result['tokens']}"
        say(f"  {name}, {shape}: {passed}{shown}")


if __name__ == "__main__":
    main()

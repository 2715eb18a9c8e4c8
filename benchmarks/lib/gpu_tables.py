"""Markdown tables of gpu/suite.py's result files."""

from typing import Any

from lib.report import markdown

Content = dict[str, Any]
LABELS = {
    "before": "jaxlm, before",
    "ours": "jaxlm",
    "gpt": "plain GPT, torch.compile",
    "compiled": "transformers, torch.compile",
}
GIB = 2**30


def gpu(content: Content) -> str:
    """What was right and what was not, then how fast it was."""
    tables = {"kernels": _kernels, "losses": _losses, "resume": _resume, "speed": _speed}
    blocks = [_head(content)]
    for part, table in tables.items():
        results = [result for result in content["results"] if result["part"] == part]
        ended = [result for result in results if result.keys() <= {"part", "error", "left_out"}]  # of the whole part
        rest = [result for result in results if result not in ended]
        blocks += [table(rest)] if rest else []
        blocks += [f"**{part}**: {instead(result)}." for result in ended]
    return "\n\n".join(blocks)


def _head(content: Content) -> str:
    versions = ", ".join(f"{name} {number}" for name, number in content["versions"].items())
    here = content["gpu"]
    what = "CPU: a test of the suite" if here is None else f"{here['name']} ({here['memory']}), driver {here['driver']}"
    return f"{content['date'][:10]}, {what}; {versions}."


def instead(result: Content) -> str:
    """What there is where nothing was measured."""
    for name, shown in (("error", "FAILED: "), ("out_of_memory", "out of memory"), ("left_out", "left out: ")):
        if name in result:
            return shown if name == "out_of_memory" else shown + result[name]
    return ""


def _kernels(results: list[Content]) -> str:
    """One row a kernel and size (of heads, channels, the vocabulary) for what was checked, then one row a time."""
    checks = [result for result in results if result["what"] == "check" and "implementation" in result]
    groups: dict[tuple[str, int], list[Content]] = {}
    for result in checks:
        size = result["head_size"] if "head_size" in result else result["width"]
        groups.setdefault((result["implementation"], size), []).append(result)
    rows = [[name, str(size), *_checked(found)] for (name, size), found in sorted(groups.items())]
    heads = ["kernel", ">size", ">cases", ">wrong", ">failed", ">largest error, of the limit", ">two calls differ"]
    blocks = [markdown(heads, rows)] if rows else []
    timed = [result for result in results if result["what"] == "time" and "implementation" in result]
    if timed:
        heads = ["kernel", "shape", "", ">forward", ">TFLOP/s", ">forward and backward", ">TFLOP/s"]
        blocks.append(markdown(heads, _times(timed)))
    beside = [result for result in results if result["what"] == "beside plain JAX"]
    if beside:
        blocks.append(markdown(["kernel", "shape", ">with gradients", ">plain JAX", ">time"], _beside(beside)))
    missing = sum("left_out" in result for result in results)
    return "\n\n".join([*blocks, *([f"{missing} cases of kernels were left out: no time."] if missing else [])])


def _checked(results: list[Content]) -> list[str]:
    done = [result for result in results if "errors" in result]
    shares = [result["errors"][name] / limit for result in done for name, limit in result["limits"].items()]
    wrong = [str(sum(not result["passed"] for result in done)), str(sum("error" in result for result in results))]
    differ = str(sum(not result["bit_equal"] for result in done))
    return [str(len(results)), *wrong, f"{max(shares):.2f}" if shares else "", differ]


def _beside(results: list[Content]) -> list[list[str]]:
    rows = []
    for result in results:
        shown = [instead(result), "", ""]
        if "own_ms" in result:
            own, plain = result["own_ms"], result["plain_ms"]
            shown = [f"{own:.3f} ms", f"{plain:.3f} ms", f"{own / plain:.2f} x"]
        rows.append([result["implementation"], f"{result['tokens']} x {result['width']}", *shown])
    return rows


def _times(results: list[Content]) -> list[list[str]]:
    rows = []
    for result in results:
        shape = f"{result['rows']} x {result['length']}, {result['heads']} heads of {result['head_size']}"
        kind = ("packed" if result["segments"] else "unpacked") + ", dropout" * result["dropout"]
        shown = [instead(result), "", "", ""]
        if "both_ms" in result:
            names = ("forward_ms", "both_ms"), ("forward_tflops", "both_tflops")
            pairs = zip([f"{result[n]:.3f} ms" for n in names[0]], [f"{result[n]:.1f}" for n in names[1]], strict=True)
            shown = [cell for pair in pairs for cell in pair]
        rows.append([result["implementation"], shape, kind, *shown])
    return rows


def _losses(results: list[Content]) -> str:
    rows = [
        [
            result["precision"],
            f"{result['largest_difference']:.2g}" if "passed" in result else instead(result),
            f"{result['limit']:g}",
            _verdict(result),
        ]
        for result in results
    ]
    return markdown(["losses here and on the CPU", ">largest relative difference", ">limit", ""], rows)


def _resume(results: list[Content]) -> str:
    rows = [
        [
            result["setting"],
            result.get("what", ""),
            instead(result) or result["difference"] or "nothing",
            _verdict(result),
        ]
        for result in results
    ]
    return markdown(["settings", "a whole run, and", "what differs", ""], rows)


def _verdict(result: Content) -> str:
    return {True: "right", False: "**WRONG**", None: ""}[result.get("passed")]


def speed_setting(result: Content) -> str:
    """A cell in words."""
    overrides = "".join(f", {name}={value}" for name, value in result["overrides"].items())
    recomputed = ", recomputed" * result["remat"]
    packed = "packed" if result["packed"] else "unpacked"
    return f"{result['model']}, {packed}, dropout {result['dropout']:g}{recomputed}{overrides}"


def best_peer(results: list[Content], result: Content) -> float | None:
    """tokens/s of the fastest peer with the same model, rows and dropout, packed or not; None: no such peer."""
    same = [
        other["tokens_per_second"]["median"]
        for other in results
        if other["contender"] not in ("before", "ours")
        and "tokens_per_second" in other
        and all(other[name] == result[name] for name in ("model", "dropout", "rows", "seq_len"))
    ]
    return max(same, default=None)


def _speed(results: list[Content]) -> str:
    heads = ["cell", "rows", "", ">tokens/s", ">min - max", ">of the best PyTorch", ">MFU", ">peak memory"]
    rows = []
    for result in results:
        head = [speed_setting(result), f"{result['rows']} x {result['seq_len']}", LABELS[result["contender"]]]
        if "tokens_per_second" not in result:
            rows.append([*head, instead(result), *[""] * 7])
            continue
        rate, peer, start = result["tokens_per_second"], best_peer(results, result), result["first_update_seconds"]
        row = [f"{rate['median']:,.0f}", f"{rate['min']:,.0f} - {rate['max']:,.0f}"]
        row += ["-" if peer is None else f"{rate['median'] / peer:.2f} x"]
        row += ["-" if result["mfu"] is None else f"{result['mfu']:.1%}", f"{result['peak_bytes'] / GIB:.1f} GiB"]
        row += ["-" if start[name] is None else f"{start[name]:.0f} s" for name in ("cold", "warm")]
        rows.append([*head, *row, f"{result['loss']:.3f}"])
    return markdown([*heads, ">first update, cold", ">warm", ">loss"], rows)

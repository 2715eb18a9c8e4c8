"""Training speed on this machine's CPU, side by side with PyTorch: python benchmarks/cpu.py [--peer-python PYTHON]

Ours is the real train step on packed rows; the peers are transformers' GPT-2 of the same shape, eager and compiled.
README.md, next to this file, has the method. Each contender is a process of its own that answers "run N" on stdin with
a line of JSON on stdout, so that they take turns and each pays for compilation once.

Shapes: N batches, B rows of a batch, T positions.
"""

import argparse
import contextlib
import datetime
import itertools
import json
import os
import platform
import re
import shlex
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

HERE = Path(__file__).resolve().parent
SMALL = HERE.parent / "configs" / "small.py"
CONTENDERS = {"ours": "jaxlm", "eager": "transformers, eager", "compiled": "transformers, torch.compile"}
SHAPE = ("vocab_size", "d_model", "n_heads", "n_layers", "d_ff")
BATCHES = 16  # of real text; the workers go round them
WARM_UP = 3  # updates before a worker says that it is ready, compilation among them
UNTIMED = 1  # updates at the start of each turn, after the others have had the caches
QUIET = 0.05  # share of the CPU that other processes may take in a turn
TRAINING = {"learning_rate": 3e-4, "weight_decay": 0.01, "max_grad_norm": 1.0}  # no warm-up, so a low rate
WORKER_ENVIRONMENT = {"JAX_PLATFORMS": "cpu", "CUDA_VISIBLE_DEVICES": "", "JAX_TRACEBACK_FILTERING": "off"}

Update = Callable[[int], float]  # number of the update -> loss; everything it started is done when it returns


class WorkerFailed(RuntimeError):
    """A worker ended without an answer; the message is the last line it wrote on stderr."""


# -------------------------------------------------------------------------------------------- in a worker


def protocol_stdout() -> Any:
    """The stream for answers; what libraries print goes to stderr from here on."""
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    return answers


def serve(build: Callable[[], tuple[Update, dict[str, Any]]]) -> None:
    """Builds, warms up, says so, and then answers each line "run N" until stdin ends."""
    answers = protocol_stdout()
    update, about = build()
    done = 0

    def timed() -> tuple[float, float]:
        nonlocal done
        start = time.perf_counter()
        loss = update(done)
        done += 1
        return time.perf_counter() - start, loss

    for _ in range(WARM_UP):
        timed()
    answers.write(json.dumps(about) + "\n")
    for line in sys.stdin:
        cpu_before = time.process_time()
        for _ in range(UNTIMED):
            timed()
        seconds, losses = zip(*(timed() for _ in range(int(line.removeprefix("run ")))), strict=True)
        turn = {
            "seconds": seconds,
            "loss": losses[-1],
            "updates": done,
            "cpu_seconds": time.process_time() - cpu_before,
        }
        answers.write(json.dumps(turn) + "\n")


def build_ours(spec: dict[str, Any]) -> tuple[Update, dict[str, Any]]:
    """The train step that `Trainer` compiles, with the state donated and each batch sent from the host."""
    import jax
    from flax import nnx

    from jaxlm.config import Config, DataConfig, ModelConfig, TrainingConfig, validate
    from jaxlm.model import Transformer
    from jaxlm.model.attention import choose_attention
    from jaxlm.optim import build_optimizer, build_schedule
    from jaxlm.precision import compute_dtype
    from jaxlm.step import init_state, make_train_step

    seq_len, dropout = spec["seq_len"], spec["dropout"]
    model = ModelConfig(**spec["shape"], max_seq_len=seq_len, dropout=dropout, attention_dropout=dropout)
    training = TrainingConfig(
        batch_size=spec["batch"],
        gradient_accumulation_steps=1,
        lr_scheduler="constant",
        warmup_steps=0,
        use_amp=spec["precision"] == "bf16",
        **TRAINING,
    )
    config = validate(Config(model=model, training=training, data=DataConfig(max_length=seq_len)))
    attention = choose_attention(model, training, config.data, jax.default_backend())
    dtype = compute_dtype(training)
    make = lambda: Transformer(model, implementation=attention, dtype=dtype, rngs=nnx.Rngs(training.seed))  # noqa: E731
    graphdef = nnx.graphdef(nnx.eval_shape(make))
    state = jax.jit(lambda: init_state(make(), build_optimizer(training)))()
    about = {"parameters": sum(x.size for x in jax.tree.leaves(state.params)), "attention": attention}
    about["versions"] = {name: version(name) for name in ("jax", "jaxlib", "flax", "optax")}

    arrays = np.load(spec["data"])
    batches = [{name: arrays[name][i][None] for name in arrays.files} for i in range(BATCHES)]
    step = jax.jit(make_train_step(graphdef, config, build_schedule(training, 1000)), donate_argnums=0)
    compiled = step.lower(state, batches[0]).compile()

    def update(number: int) -> float:
        nonlocal state
        state, metrics = compiled(state, jax.device_put(batches[number % BATCHES]))
        jax.block_until_ready(state)
        return float(metrics["loss"])

    return update, about


# -------------------------------------------------------------------------------------------- the workers from outside


class Worker:
    """A contender's process."""

    def __init__(self, command: list[str], spec: dict[str, Any], log: Path) -> None:
        self.log = log
        environment = os.environ | WORKER_ENVIRONMENT
        with log.open("w", encoding="utf-8") as errors:
            self.process = subprocess.Popen(
                [*command, json.dumps(spec)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
                env=environment,
            )
        self.about = self._answer()

    def _answer(self) -> dict[str, Any]:
        line = self.process.stdout.readline()
        if not line:
            self.close()
            log = self.log.read_text(encoding="utf-8").strip()
            say(log)
            raise WorkerFailed(without_paths(log.rpartition("\n")[2]) or f"exit code {self.process.returncode}")
        return json.loads(line)

    def run(self, steps: int) -> dict[str, Any]:
        """A turn: `seconds` of each timed update, the last `loss`, the `updates` done since the start, and `others`.

        `others` is the share of the machine's CPU time that other processes took meanwhile; None where it isn't known.
        """
        busy, start = busy_seconds(), time.perf_counter()
        with contextlib.suppress(BrokenPipeError):  # it died; there will be no answer
            self.process.stdin.write(f"run {steps}\n")
            self.process.stdin.flush()
        turn = self._answer()
        if busy is None:
            return turn | {"others": None}
        available = (time.perf_counter() - start) * (os.cpu_count() or 1)
        return turn | {"others": max(0.0, (busy_seconds() - busy - turn["cpu_seconds"]) / available)}

    def close(self) -> None:
        """Ends the process, and waits until it is gone."""
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.close()
        try:
            self.process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()


def measure_cell(
    commands: dict[str, list[str]], spec: dict[str, Any], repeats: int, steps: int, folder: Path
) -> list[dict[str, Any]]:
    """Results of all contenders at one precision and dropout, in turn: one of each, then the next repeat."""
    setting = {"precision": spec["precision"], "dropout": spec["dropout"]}
    results: dict[str, dict[str, Any]] = {}
    workers: dict[str, Worker] = {}
    try:
        for name, command in commands.items():
            say(f"{spec['precision']}, dropout {spec['dropout']}: {CONTENDERS[name]} is compiling and warming up")
            results[name] = {"contender": name, **setting}
            try:
                workers[name] = Worker(command, spec | {"contender": name}, folder / f"{name}.log")
                results[name] |= {"turns": [], "others": [], **workers[name].about}
            except WorkerFailed as failure:
                results[name]["error"] = str(failure)
        for repeat in range(repeats):
            for name in list(workers):
                try:
                    turn = workers[name].run(steps)
                except WorkerFailed as failure:
                    results[name]["error"] = str(failure)
                    del workers[name]
                    continue
                results[name]["turns"].append(turn["seconds"])
                results[name]["others"].append(turn["others"])
                results[name] |= {"loss": turn["loss"], "updates": turn["updates"]}
                rate = spec["batch"] * spec["seq_len"] * steps / sum(turn["seconds"])
                say(f"  repeat {repeat + 1}/{repeats}: {CONTENDERS[name]:<28} {rate:>8,.0f} tokens/s")
    finally:
        for worker in workers.values():
            worker.close()
    return summarize(list(results.values()), spec["batch"] * spec["seq_len"])


def summarize(results: list[dict[str, Any]], tokens: int) -> list[dict[str, Any]]:
    """Adds tokens/s (median and range over the turns) and the ratio to the best PyTorch figure, within one cell."""
    for result in results:
        if "error" not in result:
            rates = [tokens * len(seconds) / sum(seconds) for seconds in result["turns"]]
            median = statistics.median(rates)
            result["tokens_per_second"] = {"median": median, "min": min(rates), "max": max(rates)}
    done = [result for result in results if "tokens_per_second" in result]
    peers = [result["tokens_per_second"]["median"] for result in done if result["contender"] != "ours"]
    for result in done:
        result["ratio_to_best_pytorch"] = result["tokens_per_second"]["median"] / max(peers) if peers else None
    return results


# -------------------------------------------------------------------------------------------- data, machine, report


def dump_data(options: argparse.Namespace, folder: Path) -> tuple[dict[str, Any], Path]:
    """(what the data is, the .npz file): BATCHES batches of the embedded corpus, packed by jaxlm.data, [N, B, T]."""
    from jaxlm.config import DataConfig
    from jaxlm.data.loader import Rows, train_batches
    from jaxlm.data.packing import plan_cached
    from jaxlm.data.tokens import prepare

    data = DataConfig(dataset_name="python-stdlib", dataset_config=None, max_length=options.seq_len)
    prepared = prepare(data, options.vocab_size, None, say)
    plan = plan_cached(
        prepared.train, data.max_length, data.min_length, data.packing_strategy, data.pack_sequences, report=say
    )
    rows = Rows(prepared.train, plan, data.max_length)
    stream = train_batches(rows, seed=42, global_batch=options.batch, accumulation=1, start_step=0)
    with contextlib.closing(stream):
        batches = [{name: array[0] for name, array in batch.items()} for batch in itertools.islice(stream, BATCHES)]
    arrays = {name: np.stack([batch[name] for batch in batches]) for name in batches[0]}
    path = folder / "batches.npz"
    np.savez(path, **arrays)
    filled = float((arrays["segments"] > 0).mean())
    about = {"text": prepared.source_name, "vocab_size": prepared.tokenizer.vocab_size, "rows_filled": filled}
    return about | {"bos_id": prepared.tokenizer.bos_id}, path


def say(text: str) -> None:
    """Progress, on stderr."""
    print(text, file=sys.stderr, flush=True)


def without_paths(text: str) -> str:
    """`text` with the folders of absolute paths left out: results are published."""
    return re.sub(r"(?<![\w.])~?/(?:[^\s'\":/]+/)*", "", text)


def busy_seconds() -> float | None:
    """CPU time used since boot by everything on this machine; None where the system does not say (no Linux)."""
    stat = Path("/proc/stat")
    if not stat.is_file():
        return None
    user, nice, system, _idle, _iowait, irq, softirq, steal = map(int, stat.read_text().split()[1:9])
    return (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK")


def cpu_model() -> str:
    info = Path("/proc/cpuinfo")
    found = re.search(r"^model name\s*:\s*(.+)$", info.read_text(), re.MULTILINE) if info.is_file() else None
    return found[1].strip() if found else platform.processor() or platform.machine()


def cores() -> int:
    """CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def commit() -> str | None:
    """The checkout's commit, marked if files differ from it; None outside of a repository."""
    described = subprocess.run(
        ["git", "describe", "--always", "--dirty", "--abbrev=12"], cwd=HERE, capture_output=True, text=True, check=False
    )
    return described.stdout.strip() or None


def peer_versions(python: str) -> dict[str, str] | None:
    """Versions of torch and transformers in the interpreter `python`; None if one of them is not installed."""
    code = "from importlib.metadata import version as v; print(v('torch'), v('transformers'))"
    asked = subprocess.run([python, "-c", code], capture_output=True, text=True, check=False)
    if asked.returncode:
        return None
    return dict(zip(("torch", "transformers"), asked.stdout.split(), strict=True))


def table(results: list[dict[str, Any]]) -> str:
    """The results as Markdown."""
    lines = [
        "| precision | dropout | | tokens/s, median | min - max | of the best PyTorch | loss |",
        "|---|---|---|---:|---:|---:|---:|",
    ]
    for result in results:
        head = f"| {result['precision']} | {result['dropout']} | {CONTENDERS[result['contender']]} |"
        if "error" in result:
            lines.append(f"{head} failed: {result['error']} | | | |")
            continue
        rate, ratio = result["tokens_per_second"], result["ratio_to_best_pytorch"]
        shown = "-" if ratio is None else f"{ratio:.2f} x"
        spread = f"{rate['min']:,.0f} - {rate['max']:,.0f}"
        lines.append(f"{head} {rate['median']:,.0f} | {spread} | {shown} | {result['loss']:.3f} |")
    return "\n".join(lines)


def parse(arguments: list[str]) -> argparse.Namespace:
    from jaxlm.cli import load_config

    model, training = load_config(str(SMALL)).model, load_config(str(SMALL)).training
    parser = argparse.ArgumentParser(
        description=__doc__.partition("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--peer-python", default=sys.executable, help="interpreter with torch and transformers")
    parser.add_argument("--only", nargs="+", choices=CONTENDERS, default=list(CONTENDERS), help="contenders to run")
    parser.add_argument("--repeats", type=int, default=5, help="turns of each contender")
    parser.add_argument("--steps", type=int, default=4, help="timed updates a turn")
    parser.add_argument("--precision", nargs="+", choices=["float32", "bf16"], default=["float32", "bf16"], help=" ")
    parser.add_argument("--dropout", nargs="+", type=float, default=[0.1, 0.0], help="of everything that has dropout")
    parser.add_argument("--seq_len", type=int, default=model.max_seq_len, help="tokens a row")
    parser.add_argument("--batch", type=int, default=training.batch_size, help="rows of an update")
    for name in SHAPE:
        parser.add_argument(f"--{name}", type=int, default=getattr(model, name), help="of the model")
    parser.add_argument("--out", type=Path, default=HERE / "results", help="folder of the JSON file")
    options = parser.parse_args(arguments)
    if min(options.repeats, options.steps) < 1:
        parser.error("--repeats and --steps must be at least 1")
    if shutil.which(options.peer_python) is None:
        parser.error(f"--peer-python ({options.peer_python}): no such program")
    return options


def contender_commands(options: argparse.Namespace, versions: dict[str, str]) -> Iterator[tuple[str, list[str]]]:
    """The contenders that can run here, with their commands; adds the peers' versions."""
    wanted = [name for name in CONTENDERS if name in options.only]
    if "ours" in wanted:
        yield "ours", [sys.executable, str(HERE / "cpu.py"), "--worker"]
    peers = [name for name in wanted if name != "ours"]
    if peers and (found := peer_versions(options.peer_python)) is not None:
        versions |= found
        yield from ((name, [options.peer_python, str(HERE / "peer_torch.py")]) for name in peers)


def main(arguments: list[str]) -> int:
    """Measures and reports; 0 if all that was asked for and is installed ran, 1 if a contender failed."""
    options = parse(arguments)
    now = datetime.datetime.now(datetime.UTC)
    versions = {"python": platform.python_version(), "jaxlm": version("jaxlm")}
    commands = dict(contender_commands(options, versions))
    missing = [name for name in options.only if name not in commands]
    absent = f"PyTorch and transformers are not installed in {without_paths(options.peer_python)}: left out"
    if missing:
        say(f"{absent} ({', '.join(missing)}); name an interpreter that has them with --peer-python")
    if not commands:
        return 1

    cpu, results, failed = cpu_model(), [], False
    slug = re.sub(r"[^a-z0-9]+", "-", cpu.lower()).strip("-")
    options.out.mkdir(parents=True, exist_ok=True)
    path = options.out / f"cpu_{now:%Y-%m-%dT%H%M}_{slug}_{cores()}cores.json"
    with tempfile.TemporaryDirectory() as temporary:
        data, arrays = dump_data(options, Path(temporary))
        shape = {name: getattr(options, name) for name in SHAPE} | {"vocab_size": data["vocab_size"]}
        spec = {"shape": shape, "seq_len": options.seq_len, "batch": options.batch}
        for precision, dropout in itertools.product(options.precision, options.dropout):
            cell = spec | {"precision": precision, "dropout": dropout, "data": str(arrays), "bos_id": data["bos_id"]}
            results += measure_cell(commands, cell, options.repeats, options.steps, Path(temporary))
            for result in results:
                versions |= result.pop("versions", {})
                failed |= "error" in result
            report = {
                "benchmark": "cpu",
                "date": now.isoformat(timespec="seconds"),
                "command": without_paths(shlex.join(["python", "benchmarks/cpu.py", *arguments])),
                "commit": commit(),
                "machine": {"cpu": cpu, "cores": cores(), "system": platform.system()},
                "versions": versions,
                "setup": spec | TRAINING | data,
                "method": {"repeats": options.repeats, "steps": options.steps, "untimed": UNTIMED, "warm_up": WARM_UP},
                "left_out": missing,
                "results": results,
            }
            path.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    used = ", ".join(f"{name} {number}" for name, number in versions.items())
    print(f"{cpu}, {cores()} cores; {shape}, {options.batch} x {options.seq_len} tokens an update; {used}\n")
    print(table(results))
    if missing:
        print(f"\n{absent}. No comparison was made with: {'; '.join(CONTENDERS[name] for name in missing)}.")
    disturbed = max((share for result in results for share in result.get("others", []) if share), default=0.0)
    if disturbed > QUIET:
        print(f"\nNot quiet: other processes took up to {disturbed:.0%} of the CPU in a turn. Measure again.")
    say(f"written: {os.path.relpath(path)}")
    return int(failed)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--worker"]:
        serve(lambda: build_ours(json.loads(sys.argv[2])))
    else:
        sys.exit(main(sys.argv[1:]))

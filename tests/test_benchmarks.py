"""The benchmarks, cut down, so that a change of the program can't break them unseen."""

import importlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
SMALLEST = ["--d_model=32", "--n_heads=2", "--n_layers=1", "--d_ff=64", "--vocab_size=300", "--seq_len=32"]


def run(tmp_path: Path, program: str, *options: str, after: Sequence[str] = ()) -> tuple[str, dict[str, Any]]:
    """What `program` prints, and the result file that it writes; `after` are the arguments behind --."""
    command = [sys.executable, str(BENCHMARKS / program), *options, "--out", str(tmp_path / "out")]
    command += ["--", *after] if after else []
    environment = {**os.environ, "JAX_NUM_CPU_DEVICES": "1", "TMPDIR": str(tmp_path)}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    (written,) = (tmp_path / "out").iterdir()
    return done.stdout, json.loads(written.read_text())


def test_speed_side_by_side(tmp_path: Path, corpus: Path) -> None:
    peers = ["eager"] if find_spec("torch") and find_spec("transformers") else []
    text = ["--text", str(corpus / "train.jsonl"), "--cache_dir", str(corpus / "cache")]
    measured = ["--repeats=2", "--laps=2", "--updates_a_lap=2", "--tokens=64", "--precision=float32", "--dropout=0"]
    options = ["--only", "ours", *peers, "--no-peak", *text, *measured, *SMALLEST]
    shown, report = run(tmp_path, "cpu.py", *options)
    assert [result["contender"] for result in report["results"]] == ["ours", *peers]
    for result in report["results"]:
        assert [len(turn) for turn in result["turns"]] == [2, 2] and 3 < result["loss"] < 8
        rates = [2 * 2 * 64 / sum(turn) for turn in result["turns"]]
        assert result["tokens_per_second"]["min"] == pytest.approx(min(rates))
        assert result["peak_bytes"] > 50 * 2**20
    assert "| 2 x 32 | float32 | 0 | jaxlm |" in shown


def test_a_turn_is_kept_when_the_command_is_cut(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(BENCHMARKS)
    cpu = importlib.import_module("cpu")

    def cut_short(*_: Any) -> Any:
        yield "ours", {"parameters": 1000}
        yield "ours", {"seconds": [1.0, 3.0], "others": 0.0, "loss": 5.0, "peak_bytes": 2**20}
        raise KeyboardInterrupt

    monkeypatch.setattr(cpu, "take_turns", cut_short)
    cell = {"seq_len": 32, "batch": 2, "precision": "bf16", "dropout": 0.0, "updates_a_lap": 5, "folder": str(tmp_path)}
    options = cpu.parse(["--preset", "tiny", "--peer-python", sys.executable])
    report = cpu.Report("cpu-tiny", [], tmp_path, versions={}, setup={}, peak_flops={}, left_out={})
    with pytest.raises(KeyboardInterrupt):
        cpu.measure_cell({"ours": [], "eager": []}, cell | {"shape": options.shape}, options, None, report)
    (written,) = tmp_path.iterdir()
    content = json.loads(written.read_text())
    ours, eager = content["results"]
    assert ours["tokens_per_second"]["median"] == 2 * 5 * 2 * 32 / 4 and not eager["turns"]
    content["setup"] = {"preset": "tiny", "shape": options.shape, "tokens": 64}
    assert "not measured" in cpu.table(content)


def test_peers_that_would_take_hours_are_left_out(
    tmp_path: Path, corpus: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.syspath_prepend(BENCHMARKS)
    cpu = importlib.import_module("cpu")
    measured: list[list[str]] = []

    def take_turns(commands: dict[str, list[str]], *_: Any) -> Any:
        measured.append(list(commands))
        return ((name, {"seconds": [1.0], "others": 0.0, "loss": 5.0, "peak_bytes": 2**20}) for name in commands)

    monkeypatch.setattr(cpu, "take_turns", take_turns)
    monkeypatch.setattr(cpu, "versions_in", lambda *_: {"torch": "2", "transformers": "5"})
    monkeypatch.setattr(cpu, "measure_peaks", lambda *_: {"torch": {"float32": 1e11, "bf16": 5e8}})  # as on a Zen 3
    text = ["--text", str(corpus / "train.jsonl"), "--cache_dir", str(corpus / "cache"), "--out", str(tmp_path)]
    assert cpu.main(["--preset=small", "--only", "ours", "eager", "--dropout=0", "--seq_len=32", *text]) == 0
    assert measured == [["ours", "eager"], ["ours"]]
    shown = capsys.readouterr().out
    assert "| transformers, eager | left out: at 0.5 GFLOP/s, a lap's updates take" in shown


def test_data_pipeline(tmp_path: Path, corpus: Path) -> None:
    text = ["--text", str(corpus / "train.jsonl"), "--vocab_size=300", "--repeats=1"]
    sizes = ["--documents=3000", "--seconds=0.2", f"--size={80 * 2**20}", f"--limit={64 * 2**20}", "--mean_length=100"]
    shown, report = run(tmp_path, "data.py", *text, *sizes)
    results = {(result["part"], result["what"]): result for result in report["results"]}
    for what in ("jaxlm", "tokenizers library"):
        measured = results["tokenizing", what]
        assert measured["documents"] == 120 and measured["tokens"] > 1000 and min(measured["seconds"]) > 0
    for strategy in ("greedy", "first_fit", "best_fit", "concat"):
        measured = results["packing", strategy]
        tokens = measured["rows"] * measured["max_length"] * measured["full"]
        assert measured["documents"] == 3000 and tokens / 3000 == pytest.approx(100, rel=0.1)
    for kind in (("loading", "embedded corpus"), ("larger", "random tokens")):
        assert results[kind]["tokens"] % (32 * 512) == 0 and 1e4 < results[kind]["tokens_per_second"] < 1e9
    assert results["larger", "random tokens"]["own_bytes"] < results["larger", "random tokens"]["limit_bytes"]
    assert 1e4 < results["mixing", "three sources"]["tokens_per_second"] < 1e9
    assert shown.count("\n| ") == 2 + 2 + 4 + 1 + 1 + 1  # two of them the table's head


def test_preparation(tmp_path: Path) -> None:
    options = ["--kills=1", "--size=500000", "--limit=1000000000", "--vocab_size=300", "--threads=2"]
    _, report = run(tmp_path, "prepare.py", *options, "--shared=500000", "--repeats=1")
    killed, small, alone, shared, all_first, streamed = report["results"]
    assert (alone["processes"], shared["byte_equal"]) == (1, 2) and min(*alone["seconds"], *shared["seconds"]) > 0
    assert (all_first["streaming"], streamed["streaming"]) == (False, True) and min(streamed["seconds"]) > 0
    assert killed["byte_equal"] == killed["rounds"] >= 1 and killed["kills"] == 1
    assert small["file_bytes"] > 500_000 and small["tokens"] > 100_000 and small["peak_bytes"] < small["limit_bytes"]


def test_start(tmp_path: Path, corpus: Path) -> None:
    sizes = [option.replace("--", "--model.") for option in SMALLEST if "seq_len" not in option]
    sizes += ["--model.max_seq_len=32", "--data.max_length=32", "--training.batch_size=2"]
    text = [f"--data.train_files={corpus / 'train.jsonl'}", "--data.min_length=2"]
    shown, report = run(tmp_path, "start.py", "--repeats=1", after=[*sizes, *text])
    cold, warm, *answers = report["results"]
    for result in (cold, warm):
        stages = {stage: seconds for stage, seconds in result["seconds"].items() if stage != "total"}
        assert len(stages) == 7 and min(stages.values()) > 0
        assert sum(stages.values()) == pytest.approx(result["seconds"]["total"])
    assert [answer["what"] for answer in answers] == ["--help", "unknown option", "value out of bounds"]
    assert "| compiling the step |" in shown


def test_sweep(tmp_path: Path, corpus: Path) -> None:
    sizes = [option.replace("--", "--model.") for option in SMALLEST if "seq_len" not in option]
    text = [f"--data.train_files={corpus / 'train.jsonl'}", "--data.validation_fraction=0.1"]
    shown, report = run(tmp_path, "sweep.py", "--points=2", "--updates=2", after=[*sizes, *text])
    starts, one = report["results"]
    assert len(starts["runs"]) == len(one["runs"]) == 2 and sum(one["runs"]) < one["seconds"]
    assert starts["seconds"] == sum(starts["runs"]) and "| 2 runs, sweep.py |" in shown


def test_flat(tmp_path: Path) -> None:
    _, report = run(tmp_path, "flat.py", "--updates=40")
    (found,) = report["results"]
    assert found["updates"] == 40 and [step for step, _ in found["seen"]] == [*range(1, 41)]
    assert found["last_quarter_bytes"] > 50 * 2**20


def test_growth(tmp_path: Path) -> None:
    shown, report = run(
        tmp_path, "growth.py", "--only", "layers", "documents", "--layers=1", "--documents", "64", "256"
    )
    layers, few, many = report["results"]
    assert layers["parameters"] > 128 * 512 and len(layers["updates"]) >= 3 and layers["temporary_bytes"] > 2**20
    assert few["value"] == 64 and many["value"] == 256 and few["seconds"] > 0
    assert "| **documents** | grows as their power |" in shown


def test_gpu_suite_from_end_to_end(tmp_path: Path) -> None:
    shown, report = run(tmp_path, "gpu/suite.py", "--cut")
    parts: dict[str, list[dict[str, Any]]] = {}
    for result in report["results"]:
        parts.setdefault(result["part"], []).append(result)
    checks = [result for result in parts["kernels"] if result["what"] == "check"]
    of_attention = [result for result in checks if result["implementation"] in ("blockwise", "pallas")]
    fused = {result["implementation"] for result in checks if result not in of_attention}
    assert fused == {"norm", "norm and product", "loss"}
    assert {(result["head_size"], result["dtype"]) for result in of_attention} == {
        (64, "bfloat16"),
        (80, "float16"),
        (64, "float32"),
    }
    assert all(result["passed"] and result["bit_equal"] for result in checks)
    assert all(result["errors"].keys() == FOUR for result in of_attention)
    (beside,) = (result for result in parts["kernels"] if result["what"] == "beside plain JAX")
    assert beside["own_ms"] > 0 and beside["plain_ms"] > 0
    assert all(result["both_ms"] > 0 for result in parts["kernels"] if result["what"] == "time")
    losses = {result["precision"]: result for result in parts["losses"]}
    assert losses.keys() == {"float32", "bfloat16 with dropout"}
    for result in losses.values():
        assert result["passed"] and len(result["losses"]) == 20 and 3 < result["losses"][0] < 8
    resumed = [(result["setting"], result["what"], result["difference"]) for result in parts["resume"]]
    assert resumed == [("default", what, None) for what in ("again", "compiled anew", "killed")]
    assert [result.get("passed") for result in parts["resume"]] == [True, None, True]
    peers = ["gpt", "compiled"] if find_spec("torch") and find_spec("transformers") else []
    measured = [result for result in parts["speed"] if "tokens_per_second" in result]
    assert [result["contender"] for result in measured] == ["ours", *peers, "ours"]
    for result in measured:
        median = [2 * 32 / seconds for (seconds,) in result["turns"]]
        assert result["tokens_per_second"]["median"] == pytest.approx(sum(median) / 2)
        assert 3 < result["loss"] < 8 and result["mfu"] is None and result["peak_bytes"] > 50 * 2**20
    assert measured[0]["first_update_seconds"]["warm"] > 0 and report["seconds"].keys() == parts.keys()
    assert "| 124m, unpacked, dropout 0.1, recomputed | 2 x 32 | jaxlm |" in shown and "WRONG" not in shown


FOUR = {"output", "dq", "dk", "dv"}


@pytest.fixture
def gpu_modules(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Any]:
    """Imports a module of benchmarks/gpu."""
    monkeypatch.syspath_prepend(BENCHMARKS)
    monkeypatch.syspath_prepend(BENCHMARKS / "gpu")
    return importlib.import_module


def test_a_kernel_that_is_wrong_is_found(gpu_modules: Callable[[str], Any]) -> None:
    attention, kernels = gpu_modules("attention"), gpu_modules("kernels")
    case = attention.Case(16, 24, segments=True, dropout=True, grouped=True, rows=2, heads=2)

    def leaks(q: Any, k: Any, v: Any, segments: Any, **rest: Any) -> Any:
        return kernels.causal_attention(q, k, v, segments // 2, **rest)

    def drops_others(q: Any, k: Any, v: Any, segments: Any, key_B2: Any, **rest: Any) -> Any:
        return kernels.causal_attention(q, k, v, segments, key_B2=key_B2 + 1, **rest)

    with ThreadPoolExecutor() as pool:
        for called, passed in ((kernels.causal_attention, True), (leaks, False), (drops_others, False)):
            made = kernels.programs(pool, case, None, called)
            found = {result["implementation"]: result["passed"] for result in kernels.check(case, made)}
            assert found == {"pallas": passed, "blockwise": passed}


def test_a_part_that_fails_is_noted_and_is_an_error(tmp_path: Path) -> None:
    command = [sys.executable, str(BENCHMARKS / "gpu/suite.py"), "--cut", "--only", "losses"]
    command += ["--text", str(tmp_path / "nothing.jsonl"), "--out", str(tmp_path / "out")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 1, done.stderr
    (written,) = (tmp_path / "out").iterdir()
    results = json.loads(written.read_text())["results"]
    assert len(results) == 2 and all("data.train_files" in result["error"] for result in results)
    assert "FAILED: error: data.train_files" in done.stdout


def running(pid: int) -> bool:
    """Whether a process is there and is not just waiting for its parent to look."""
    try:
        return "zombie" not in Path(f"/proc/{pid}/status").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return False


def test_a_part_ends_with_all_it_started(gpu_modules: Callable[[str], Any], capfd: Any) -> None:
    workers = gpu_modules("lib.workers")
    child = "import subprocess as s, sys; print(s.Popen(['sleep', '60']).pid, flush=True); {}"
    answers = workers.stream([sys.executable, "-c", child.format("import time; time.sleep(60)")], {}, 3)
    pid = next(answers)
    assert Path(f"/proc/{pid}").exists()
    with pytest.raises(workers.OutOfTime):
        next(answers)
    deadline = time.monotonic() + 30  # a killed process takes a moment to go
    while running(pid):
        assert time.monotonic() < deadline, "the process that it started goes on"
        time.sleep(0.05)
    with pytest.raises(workers.WorkerFailed, match="^no such thing$"):
        list(workers.stream([sys.executable, "-c", child.format("sys.exit('no such thing')")], {}, 60))


def test_options_of_the_gpu_suite(gpu_modules: Callable[[str], Any], capsys: pytest.CaptureFixture[str]) -> None:
    suite, speed = gpu_modules("suite"), gpu_modules("speed")
    options = suite.parse(["--ab", "model.scan_layers=true,none", "--set", "model.dropout=0.1", "--rows", "124m=4"])
    assert options.only == ["speed"] and options.rows == speed.ROWS | {"124m": 4}
    cells = speed.cells(options.models, options.ab, options.fixed, False, None)
    assert [dict(cell.overrides) for cell in cells] == [
        {"model.dropout": 0.1, "model.scan_layers": True},
        {"model.dropout": 0.1, "model.scan_layers": None},
    ]
    options = suite.parse(["--before", str(BENCHMARKS.parent), "--models", "124m", "--set", "model.dropout=0.1"])
    first, *others = speed.cells(options.models, options.ab, options.fixed, False, options.before)
    assert first.contenders == ("before", *speed.ALL) and all("before" not in cell.contenders for cell in others)
    own = speed.environment({"cut": True, "platform": "cpu", "before": options.before}, "before", Path())
    assert own["PYTHONPATH"] == str(BENCHMARKS.parent)
    assert {"model.dropout": 0.1, "model.scan_layers": True} in [dict(cell.overrides) for cell in others]
    for arguments, named in (
        (["--before", "nowhere"], "git archive"),
        (["--ab", "model.atention=blockwise"], "model.atention"),
        (["--ab", "model.attention"], "NAME=VALUE"),
        (["--set", "model.attention=fast"], "model.attention"),
        (["--set", "training.batch_size=4"], "--rows"),
        (["--rows", "7b=1"], "124m"),
    ):
        with pytest.raises(SystemExit, match="2"):
            suite.parse(arguments)
        assert named in capsys.readouterr().err


def test_full_memory_is_a_result(gpu_modules: Callable[[str], Any], tmp_path: Path) -> None:
    speed, log = gpu_modules("speed"), tmp_path / "log"
    failure = gpu_modules("lib.workers").WorkerFailed("it ended")
    assert speed.why(failure, log, late=True).keys() == {"left_out"}
    for text, what in (
        ("jax.errors.JaxRuntimeError: RESOURCE_EXHAUSTED: Out of memory while trying to allocate", "out_of_memory"),
        ("torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB", "out_of_memory"),
        ("ValueError: no", "error"),
    ):
        log.write_text(text)
        assert speed.why(failure, log, late=False).keys() == {what}
    about = {"model": "124m", "rows": 32, "seq_len": 1024, "dropout": 0.0}
    results = [about | {"contender": name, "tokens_per_second": {"median": rate}} for name, rate in PEERS.items()]
    best_peer = gpu_modules("lib.gpu_tables").best_peer
    assert best_peer(results, about | {"packed": False}) == 3.0 and best_peer(results, about | {"dropout": 0.1}) is None


def test_what_a_cell_says(gpu_modules: Callable[[str], Any]) -> None:
    speed, tables = gpu_modules("speed"), gpu_modules("lib.tables")
    spec = {"batch": 32, "seq_len": 1024, "updates_a_lap": 10, "shape": {"n_layers": 12, "d_model": 768}}
    measured = {"turns": [[1.0, 1.0], [0.5]], "parameters": 124475904, "loss": 4.0, "peak_bytes": 2**30}
    measured |= {"first_update_seconds": {"cold": 40.0, "warm": None}}
    result = speed.summarized(measured, spec, "NVIDIA H100 80GB HBM3")
    assert result["tokens_per_second"] == {"median": 1.5 * 327680, "min": 327680, "max": 2 * 327680}
    assert result["mfu"] == pytest.approx(1.5 * 327680 * 860101632 / 989e12)
    assert speed.summarized(measured, spec, None)["mfu"] is None
    assert speed.summarized(measured | {"loss": float("nan")}, spec, None) == {"error": "the loss is nan"}

    about = {"part": "speed", "contender": "ours", "model": "124m", "packed": True, "dropout": 0.0, "remat": False}
    about |= {"overrides": {"model.scan_layers": True}, "rows": 32, "seq_len": 1024}
    others = [
        about | {"left_out": "no time"},
        about | {"out_of_memory": "it ended"},
        {"part": "resume", "error": "why"},
    ]
    content = {"benchmark": "gpu", "date": "2026-11-25T00:00:00", "gpu": None, "versions": {}, "results": others}
    shown = tables.table(content | {"results": [about | result, *others]})
    cell = "| 124m, packed, dropout 0, model.scan_layers=True | 32 x 1024 | jaxlm |"
    assert f"{cell} 491,520 | 327,680 - 655,360 | - | 42.7% | 1.0 GiB | 40 s | - | 4.000 |" in shown
    assert f"{cell} left out: no time |" in shown and f"{cell} out of memory |" in shown
    assert "**resume**: FAILED: why." in shown


PEERS = {"ours": 4.0, "gpt": 3.0, "compiled": 2.0}


def test_pictures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib")
    monkeypatch.syspath_prepend(BENCHMARKS)
    plot = importlib.import_module("plot")
    picture = tmp_path / "picture.svg"
    kept = sorted((BENCHMARKS / "results").glob("*_*.json"))
    assert kept
    for result in kept:
        kind = json.loads(result.read_text())["benchmark"].partition("-")[0]
        drawn = ["--out", str(picture)] if kind in plot.PLOTS else []
        monkeypatch.setattr(sys, "argv", ["plot.py", str(result), *drawn])
        if kind not in plot.TABLES:
            with pytest.raises(SystemExit):
                plot.main()
            assert f"{result}: has no table" in capsys.readouterr().err
            continue
        plot.main()
        assert "| ---" in capsys.readouterr().out
        if drawn:
            assert "</svg>" in picture.read_text()
            picture.unlink()
    small = next(result for result in kept if result.name.startswith("cpu-small"))
    monkeypatch.setattr(sys, "argv", ["plot.py", "--short", str(small)])
    plot.main()
    lines = capsys.readouterr().out.splitlines()
    content = json.loads(small.read_text())
    best = [r["ratio_to_best_pytorch"] for r in content["results"] if r["contender"] == "ours"]
    assert [line.split(" | ")[-1] for line in lines[2:]] == [f"{ratio:.2f} x |" for ratio in best]


def test_the_kernels_compile_for_gpus() -> None:
    """Down to what NVIDIA's assembler says of them, for A100s and H100s."""
    pytest.importorskip("triton")
    command = [sys.executable, str(BENCHMARKS / "gpu" / "sass.py"), "--sizes", "64", "--widths", "768"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    for kernel in ("forward_kernel", "keys_kernel", "queries_kernel"):
        (for_80, for_90) = (line for line in done.stdout.splitlines() if f"| {kernel} |" in line)
        assert for_80.endswith("| mma |") and for_90.endswith("| wgmma |")
    assert {"norm_forward_kernel", "norm_backward_kernel", "loss_kernel"} <= set(done.stdout.split())


UPDATES = """
import sys
from lib.worker import peak_bytes
from jaxlm import Trainer
from jaxlm.config import load_config, replace_fields

peaks = []

class Measured(Trainer):
    def _log_metrics(self, loss):
        super()._log_metrics(loss)
        peaks.append(peak_bytes())

sizes = {"model.d_model": 128, "model.d_ff": 512, "model.n_layers": 2, "training.gradient_accumulation_steps": 1}
updates = {"training.max_steps": 4, "training.logging_steps": 4, "training.sample_tokens": 0}
files = {"training.checkpoint_dir": sys.argv[1], "data.train_files": (sys.argv[2],), "data.cache_dir": sys.argv[3]}
trainer = Measured(replace_fields(load_config("small"), sizes | updates | files))
trainer.train()
print(peaks[0], peaks[-1], trainer.train_step.memory_analysis().temp_size_in_bytes)
"""


def test_updates_do_not_hold_their_temporary_memory_twice(tmp_path: Path, corpus: Path) -> None:
    """Freed memory stays with the process, so what two updates held at once would be there for good."""
    words = json.loads((corpus / "train.jsonl").read_text().splitlines()[0])["text"]
    (tmp_path / "text.txt").write_text(words * 20_000)
    arguments = [str(tmp_path / "run"), str(tmp_path / "text.txt"), str(tmp_path / "cache")]
    environment = {**os.environ, "JAX_NUM_CPU_DEVICES": "1", "PYTHONPATH": f"{BENCHMARKS.parent}:{BENCHMARKS}"}
    command = [sys.executable, "-c", UPDATES, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    first, last, temporary = map(int, done.stdout.split())
    assert temporary > 50 * 2**20 and last - first < temporary / 2

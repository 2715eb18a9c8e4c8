"""The benchmarks, cut down, so that a change of the program can't break them unseen."""

import importlib
import json
import os
import subprocess
import sys
from collections.abc import Sequence
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


@pytest.mark.xdist_group("processes")
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


@pytest.mark.xdist_group("processes")
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
    assert shown.count("\n| ") == 2 + 2 + 4 + 1 + 1  # two of them the table's head


@pytest.mark.xdist_group("processes")
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


@pytest.mark.xdist_group("processes")
def test_growth(tmp_path: Path) -> None:
    shown, report = run(
        tmp_path, "growth.py", "--only", "layers", "documents", "--layers=1", "--documents", "64", "256"
    )
    layers, few, many = report["results"]
    assert layers["parameters"] > 128 * 512 and len(layers["updates"]) >= 3 and layers["temporary_bytes"] > 2**20
    assert few["value"] == 64 and many["value"] == 256 and few["seconds"] > 0
    assert "| **documents** | grows as their power |" in shown


def test_pictures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib")
    monkeypatch.syspath_prepend(BENCHMARKS)
    plot = importlib.import_module("plot")
    picture = tmp_path / "picture.svg"
    kept = sorted((BENCHMARKS / "results").glob("*_*.json"))
    assert kept
    for result in kept:
        if result.name.startswith("data"):
            continue
        monkeypatch.setattr(sys, "argv", ["plot.py", str(result), "--out", str(picture)])
        plot.main()
        assert "</svg>" in picture.read_text()
        picture.unlink()
    assert capsys.readouterr().out.count("| ---") >= len(kept)


def test_the_attention_kernels_compile_for_gpus() -> None:
    """Down to what NVIDIA's assembler says of them, for A100s and H100s."""
    pytest.importorskip("triton")
    command = [sys.executable, str(BENCHMARKS / "gpu" / "sass.py"), "--sizes", "64"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    for kernel in ("forward_kernel", "keys_kernel", "queries_kernel"):
        (for_80, for_90) = (line for line in done.stdout.splitlines() if f"| {kernel} |" in line)
        assert for_80.endswith("| mma |") and for_90.endswith("| wgmma |")

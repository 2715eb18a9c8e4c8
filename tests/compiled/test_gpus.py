"""Programs that are really compiled for GPUs, on a machine without one: needs the extra "plan", which .ci/run installs.

pytest -o addopts= tests/compiled
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import pytest

from jaxlm.__main__ import run
from jaxlm.config import Config, load_config, replace_fields
from jaxlm.errors import UserError
from jaxlm.plan import memory
from jaxlm.plan.plan import Plan, plan
from jaxlm.plan.targets import TARGETS, plugin

try:
    plugin()
except UserError as error:
    pytest.skip(str(error), allow_module_level=True)

os.environ["JAX_TRACEBACK_IN_LOCATIONS_LIMIT"] = "10"  # JAX's default again: a plan looks at the lines of the model
jax.config.update("jax_traceback_in_locations_limit", 10)

SMALL = {"model.n_layers": 2, "model.d_model": 128, "model.n_heads": 2, "model.d_ff": 256, "model.vocab_size": 512}
SMALL |= {"training.batch_size": 4, "training.gradient_accumulation_steps": 2, "data.max_length": 256}


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))


def small(**more: object) -> Config:
    return replace_fields(load_config("gpt2_124m"), SMALL | {name.replace("__", "."): x for name, x in more.items()})


@pytest.mark.parametrize("gpu", TARGETS)
def test_each_gpu(gpu: str) -> None:
    found = plan(small(), gpu)
    assert found.attention == "pallas" and found.fits and found.kernels > 50
    assert found.memory_bytes > found.memory.parameters + found.memory.optimizer
    assert 0 < found.mfu < 1 and found.parts["attention"].seconds > 0


def test_several_hosts_and_the_cache(capsys: pytest.CaptureFixture[str]) -> None:
    config = small(training__zero_stage=3)
    found = plan(config, "H100", 16, 2)
    assert found.collectives["all-gather"] > 0 and found.collectives["reduce-scatter"] > 0
    alone = plan(small(), "H100")
    assert found.memory.parameters < alone.memory.parameters / 8
    assert found.seconds_per_update > alone.seconds_per_update
    assert "compiling" in capsys.readouterr().err
    assert plan(config, "H100", 16, 2) == found and "compiling" not in capsys.readouterr().err


def test_tensor_parallel_heads_have_fused_kernels() -> None:
    """For each device's own heads, with hardly anything gathered for them."""
    alone, split = plan(small(), "H100"), plan(small(training__tensor_parallel=2), "H100", 2)
    assert split.attention == "pallas"
    assert split.parts["attention"].flops * 2 == alone.parts["attention"].flops > 0
    assert split.collectives.get("all-gather", 0) < 1e5 and "all-to-all" not in split.collectives


def test_what_lies_beside_the_program() -> None:
    """Optimizer state in host memory is counted, and so are whole parameters for samples."""
    config = small(training__offload_optimizer=True)
    found, here = plan(config, "H100"), memory.estimate(config, 1)
    assert found.memory.host == here.host > 0 and found.memory.optimizer == here.optimizer
    assert found.memory.temporaries > found.memory.host  # where it visits
    split = plan(small(training__zero_stage=3, training__sample_tokens=5), "H100", 8)
    assert split.memory.sampling > 7 * split.memory.parameters


def test_predicted_beside_measured_is_a_command(tmp_path: Path) -> None:
    cell = {"contender": "ours", "model": "124m", "packed": True, "dropout": 0.0, "remat": False, "rows": 1}
    cell |= {"overrides": {"model.n_layers": 1}, "vocab_size": 512, "tokens_per_second": {"median": 1000.0}}
    content = {
        "benchmark": "gpu",
        "date": "2026-01-02T0304",
        "gpu": {"name": "NVIDIA H100 80GB HBM3"},
        "results": [cell],
    }
    (tmp_path / "measured.json").write_text(json.dumps(content))
    command = [sys.executable, "benchmarks/gpu/predicted.py", str(tmp_path / "measured.json")]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    row = done.stdout.splitlines()[-1]
    assert row.startswith("| 2026-01-02 | NVIDIA H100 80GB HBM3 | 124m, packed, dropout 0, model.n_layers=1 | 1,000 | ")
    assert float(row.split("|")[5].replace(",", "")) > 100_000


def test_attention_that_cannot_be_compiled_here_is_said() -> None:
    found = plan(small(data__pack_sequences=False), "H100")
    assert found.attention == "cudnn" or any("cuDNN" in note for note in found.notes)
    found = plan(small(training__use_amp=False), "H100")
    assert found.attention == "blockwise" and any("blockwise" in line for line in found.warnings)


def test_the_commands(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "small.json").write_text(json.dumps({"model": {}}))
    options = [f"--{name}={value}" for name, value in SMALL.items()]
    arguments = ["--config", "gpt2_124m", *options, "--hlo", str(tmp_path / "x.hlo"), "--json"]
    run("plan", arguments)
    found = json.loads(capsys.readouterr().out)
    assert found["gpu"] == "H100" and (tmp_path / "x.hlo").read_text().startswith("HloModule")
    run("estimate_memory", ["--config", "gpt2_124m", *options, "--json"])
    assert json.loads(capsys.readouterr().out)["total"] == found["memory_bytes"]


def test_a_machine_without_a_gpu_trains_without_a_warning(tmp_path: Path) -> None:
    environment = {name: value for name, value in os.environ.items() if name not in ("JAX_PLATFORMS", "XLA_FLAGS")}
    options = {"model.n_layers": 1, "model.d_model": 32, "model.n_heads": 2, "model.d_ff": 64, "training.max_steps": 1}
    options |= {"training.checkpoint_dir": tmp_path / "run", "training.sample_tokens": 0, "data.max_length": 64}
    options |= {"training.batch_size": 2, "training.gradient_accumulation_steps": 1, "model.vocab_size": 300}
    text = tmp_path / "text.txt"
    text.write_text("\n\n".join(f"Line {i} of a text that is long enough to be held out." for i in range(99)))
    options["data.train_files"] = text
    command = [sys.executable, "-m", "jaxlm", "train", "--config", "small"]
    command += [f"--{name}={value}" for name, value in options.items() if name != "data.dataset_name"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr and "plugin" not in done.stderr and "cudart" not in done.stderr


def test_a_plan_is_what_python_gets() -> None:
    assert isinstance(plan(small(), "h200"), Plan)

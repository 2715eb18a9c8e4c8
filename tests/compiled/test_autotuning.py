"""Results of autotuning, as XLA writes them on a GPU, in a compiler without one: needs the extra "plan", as test_gpus.

What XLA looks for in them its own log tells. The results are made up: tiles that it would not choose by itself.
"""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import jax
import pytest
from test_gpus import SMALL, small

from jaxlm.errors import UserError
from jaxlm.plan.program import AS_TUNED, compile_update, resolve_for
from jaxlm.plan.targets import TARGETS, device_line
from jaxlm.run.autotuning import FILE

if jax.__version_info__ >= (0, 11):
    pytest.skip("JAX 0.11 takes results only beside the GPU's libraries", allow_module_level=True)

CHILD = """
import sys
import jax, jax.numpy as jnp
from jax.sharding import SingleDeviceSharding
from jaxlm.config import load_config, replace_fields
from jaxlm.plan.plan import plan
from jaxlm.plan.targets import TARGETS, topology
plan(replace_fields(load_config("gpt2_124m"), eval(sys.argv[1])), "H100")
for gpu in TARGETS:
    print(f"== {gpu} ==", file=sys.stderr, flush=True)
    x = jax.ShapeDtypeStruct((512, 512), jnp.bfloat16, sharding=SingleDeviceSharding(topology(gpu, 1, 1)[0]))
    jax.jit(jnp.matmul).lower(x, x).compile()
"""
LOOKED_FOR = re.compile(r"key = <key model='([^']*)', hlo='(.*?)', version=(\d+)>", re.DOTALL)
LIKE_IT = (
    "CUDA: 9.0, Cores: 132, GPU clock: 1.755 GHz, Memory bandwidth: 4917 GB/s, L2 cache: 60 MB, DNN version: 9.10.2"
)
CHOSEN = "block_m: 32 block_n: 32 block_k: 32 num_stages: 3 num_warps: 4 num_ctas: 1"


@pytest.fixture(scope="module")
def log(tmp_path_factory: pytest.TempPathFactory) -> str:
    """What XLA says while it compiles a small update, and then a product for each GPU."""
    looks = {"TF_CPP_MIN_LOG_LEVEL": "0", "TF_CPP_VMODULE": "autotuner_cache=3", "JAX_PLATFORMS": "cpu"}
    looks["XDG_CACHE_HOME"] = str(tmp_path_factory.mktemp("cache"))
    command = [sys.executable, "-c", CHILD, repr(SMALL)]
    return subprocess.run(command, env=os.environ | looks, capture_output=True, text=True, check=True).stderr


def results(path: Path, keys: list[tuple[str, str, str]], device: str = LIKE_IT) -> Path:
    """A file as a run with training.keep_autotuning leaves it."""
    lines = ["version: 3"]
    for _, hlo, version in keys:
        escaped = hlo.replace("\n", "\\n")
        lines += ["results {", f'  device: "{device}"', f'  hlo: "{escaped}"']
        lines += ["  result {", f"    triton {{ {CHOSEN} }}", "  }", f"  version: {version}", "}"]
    path.write_text("\n".join(lines) + "\n")
    return path


def test_each_gpu_is_found_under_the_line_that_xla_writes(log: str) -> None:
    parts = re.split(r"== (.*) ==\n", log)[1:]
    lines = {
        gpu: {model for model, *_ in LOOKED_FOR.findall(text)} for gpu, text in zip(*[iter(parts)] * 2, strict=True)
    }
    assert lines == {gpu: {device_line(gpu)} for gpu in TARGETS}


def test_products_are_those_of_the_results(log: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    keys = LOOKED_FOR.findall(log.split("== ")[0])
    tiles = re.compile(r'"num_warps":"4","output_tiles":.."sizes":.(?:"1",)?"32","32".*?"num_ctas":1,"num_stages":3')
    options = [f"--{name}={value}" for name, value in SMALL.items()]
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))

    def planned(results: Path) -> tuple[int, list[str]]:
        """How many products have such tiles, and the notes."""
        command = [sys.executable, "-m", "jaxlm", "plan", "--config", "gpt2_124m", *options, "--json"]
        command += ["--autotuning", str(results), "--hlo", str(tmp_path / "program")]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        return len(tiles.findall((tmp_path / "program").read_text())), json.loads(done.stdout)["notes"]

    all_of_them, notes = planned(results(tmp_path / FILE, keys))
    assert all_of_them >= len(keys) > 5 and notes == [AS_TUNED]
    some, notes = planned(results(tmp_path / FILE, keys[:1]))
    assert 0 < some < all_of_them
    assert notes[0] == AS_TUNED and notes[1].startswith("--autotuning lacks some products")


def test_results_that_are_not_usable_are_refused(tmp_path: Path) -> None:
    resolved = resolve_for(small(), "H100", 1, 1)
    file = results(tmp_path / FILE, [("", "x", "1")], device_line("A100-80GB"))
    with pytest.raises(
        UserError, match=r"^--autotuning \(.*\) is of a GPU with CUDA: 8.0, Cores: 108; H100 has CUDA: 9.0"
    ):
        compile_update(resolved, "H100", 1, autotuning=file)
    file.write_text(file.read_text()[:-5])
    with pytest.raises(UserError, match=r"^autotuning results \(.*\): not what XLA writes, or cut short; delete"):
        compile_update(resolved, "H100", 1, autotuning=file)

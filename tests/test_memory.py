"""Memory before a run: its state is what arrays take; the command. What compiled programs take: test_plan.py."""

import dataclasses
import itertools
import json
import platform
import re
from pathlib import Path

import jax
import pytest
from conftest import slow
from forked import Server

from jaxlm.__main__ import run
from jaxlm.config import Config, DataConfig, ModelConfig, TrainingConfig, load_config, replace_fields
from jaxlm.errors import UserError
from jaxlm.parallel import gpus
from jaxlm.parallel.layout import HOST_MEMORY
from jaxlm.plan import memory
from jaxlm.plan.memory import estimate
from jaxlm.run.setup import resolve
from jaxlm.train.assemble import assemble

ROOT = Path(__file__).parents[1]
DOCUMENT = ROOT / "docs" / "memory.md"
GPT2 = {name: ROOT / "configs" / f"gpt2_{name}.py" for name in ("124m", "350m", "1300m", "6700m")}
GIB = 2**30

MODEL = ModelConfig(
    vocab_size=300, d_model=64, n_heads=4, n_layers=2, d_ff=264, max_seq_len=64, dropout=0.0, attention_dropout=0.0
)
CONFIG = Config(model=MODEL, training=TrainingConfig(batch_size=2), data=DataConfig(max_length=64))


def gpt2(name="124m", **dotted):
    return replace_fields(load_config(str(GPT2[name])), dotted)


# ------------------------------------------------------------ state


@pytest.mark.parametrize(
    ("stage", "options"),
    [
        *(slow(stage, {}) for stage in range(3)),
        (3, {}),
        slow(1, {"training.zero_group_size": 2}),
        (2, {"training.zero_group_size": 2}),
        (1, {"training.offload_optimizer": True}),
        slow(2, {"training.offload_optimizer": True}),
    ],
)
def test_state_is_what_the_arrays_take(stage, options):
    """The state as the Trainer makes it, on 4 fake devices; 300 rows of embedding don't divide evenly by all axes."""
    config = replace_fields(CONFIG, {"training.zero_stage": stage, "model.d_model": 60, **options})
    assembly = assemble(resolve(config, jax.devices()[:4]))
    state = assembly.init(assembly.numbers(config.training))

    def held(tree, host=False):
        shards = [s.data for x in jax.tree.leaves(tree) for s in x.addressable_shards if s.device == jax.devices()[0]]
        return sum(s.nbytes for s in shards if (s.sharding.memory_kind == HOST_MEMORY) == host)

    found = estimate(config, 4)
    assert found.parameters == held(state.params)
    assert found.optimizer == held(state.opt_state)
    assert found.host == held(state.opt_state, host=True)
    assert (found.host > 0) == config.training.offload_optimizer


@pytest.mark.parametrize(
    ("stage", "parameters", "optimizer"), [(0, 4, 8), (1, 4, 8 / 8), (2, 4, 8 / 8), (3, 4 / 8, 8 / 8)]
)
def test_state_is_as_in_the_zero_paper(stage, parameters, optimizer):
    """Bytes a parameter of GPT-2 124M on 8 devices with AdamW in float32."""
    p = 124_475_904
    found = estimate(gpt2(**{"training.zero_stage": stage}), 8)
    assert found.parameters == pytest.approx(parameters * p, rel=0.02)
    assert found.optimizer == pytest.approx(optimizer * p, rel=0.02)


def test_the_batch_is_what_its_arrays_take():
    """Four int32 arrays of tokens and the rows' indices, a few batches deep; of this device's rows only."""
    rows = 16 * 4
    one = 4 * (4 * rows * 1024 + rows)
    assert estimate(gpt2(), 8).batch == (1 + memory.BATCHES_AHEAD) * one == estimate(gpt2(), 1).batch


# ------------------------------------------------------------ what has to hold between estimates


def test_the_largest_update_of_a_schedule_counts():
    schedule = {"training.gradient_accumulation_steps": 1, "training.batch_schedule": ("5:2", "9:6", "13:3")}
    largest = {"training.gradient_accumulation_steps": 6}
    assert estimate(replace_fields(CONFIG, schedule), 2) == estimate(replace_fields(CONFIG, largest), 2)
    ends_before, twice = {"training.max_steps": 8}, {"training.gradient_accumulation_steps": 2}
    assert estimate(replace_fields(CONFIG, schedule | ends_before), 2) == estimate(replace_fields(CONFIG, twice), 2)


@pytest.mark.parametrize("stage", range(1, 4))
def test_more_devices_never_hold_more_state(stage):
    found = [estimate(gpt2(**{"training.zero_stage": stage}), n) for n in (1, 4, 16)]
    for few, many in itertools.pairwise(found):
        assert many.parameters <= few.parameters and many.optimizer <= few.optimizer
        assert many.temporaries <= few.temporaries


def test_what_changes_the_temporaries():
    base = estimate(gpt2(), 8).temporaries
    for fields, more in [
        ({"training.batch_size": 17}, True),
        ({"training.use_amp": False}, True),
        ({"model.activation": "swiglu"}, True),
        ({"model.scan_layers": True}, False),
        ({"model.gradient_checkpointing": True}, False),
        ({"training.tensor_parallel": 2}, False),
        ({"training.gradient_accumulation_steps": 1}, False),
        ({"training.zero_stage": 2}, False),
    ]:
        assert (estimate(gpt2(**fields), 8).temporaries > base) == more, fields
    full, dots = (
        estimate(gpt2(**{"model.gradient_checkpointing": True, "model.remat_policy": policy}), 8).temporaries
        for policy in ("full", "dots")
    )
    assert full < dots < base


def test_whole_parameters_for_samples():
    split = estimate(gpt2(**{"training.zero_stage": 3}), 8)
    assert split.sampling == 4 * assemble(resolve(gpt2(), 1)).parameters
    assert not estimate(gpt2(**{"training.zero_stage": 3, "training.sample_tokens": 0}), 8).sampling
    assert not estimate(gpt2(), 8).sampling


def test_optimizers_take_what_their_state_takes():
    found = {name: estimate(gpt2(**{"training.optimizer": name}), 1) for name in ("adamw", "muon", "adafactor")}
    assert found["adafactor"].optimizer < 0.01 * found["adamw"].optimizer
    outside = 4 * 50304 * 768 / found["adamw"].parameters
    assert found["muon"].optimizer / found["adamw"].optimizer == pytest.approx((1 + outside) / 2, rel=0.02)


def test_a_deepspeed_file_is_applied_for_these_devices(tmp_path):
    """Its total batch, over the devices that rows are split over, gives the micro-batch."""
    path = tmp_path / "deepspeed.json"
    path.write_text(json.dumps({"train_batch_size": 32, "gradient_accumulation_steps": 2}), encoding="utf-8")
    fields = {"training.use_deepspeed": True, "training.deepspeed_config": str(path)}
    config = dataclasses.replace(CONFIG, training=TrainingConfig())
    asked = replace_fields(config, {"training.batch_size": 4, "training.gradient_accumulation_steps": 2})
    assert estimate(replace_fields(config, fields), 4).batch == estimate(asked, 4).batch


# ------------------------------------------------------------ errors


def test_the_configuration_is_validated():
    for fields, devices, message in [
        ({"data.max_length": 2000}, 1, "exceeds model.max_seq_len"),
        ({"training.tensor_parallel": 2}, 3, "must divide 3, the number"),
        ({"training.world_size": 2}, 4, r"--devices \(4\) differs from training.world_size \(2\); give --devices 2"),
        ({"training.deepspeed_config": "nowhere.json", "training.use_deepspeed": True}, 1, "nowhere.json"),
        ({}, 0, r"--devices \(0\) must be from 1"),
        ({}, 10**11, r"--devices \(100000000000\) must be from 1"),
    ]:
        with pytest.raises(UserError, match=message):
            estimate(replace_fields(CONFIG, fields), devices)


def test_shares(monkeypatch):
    monkeypatch.delenv(gpus.FRACTION_VARIABLES[0], raising=False)
    monkeypatch.setenv(gpus.FRACTION_VARIABLES[1], ".9")
    assert memory.usable(100, 0.75) == 90
    monkeypatch.setenv(gpus.FRACTION_VARIABLES[0], "much")
    with pytest.raises(UserError, match=gpus.FRACTION_VARIABLES[0]):
        memory.usable(1, 0.75)


# ------------------------------------------------------------ the script, without the compiler for GPUs


@pytest.fixture
def script(capsys, monkeypatch):
    monkeypatch.setattr("jaxlm.plan.targets.importlib.util.find_spec", lambda name: None)

    def call(*arguments):
        run("estimate_memory", ["--config", str(GPT2["124m"]), *arguments])
        return capsys.readouterr().out

    return call


def test_the_scripts_table(script):
    out = script("--devices", "8", "--zero_stage", "2", "--gpu", "a100-80gb")
    total = estimate(gpt2(**{"training.zero_stage": 2}), 8).total
    assert re.search(rf"^total +{total / GIB:.2f} ", out, re.M)
    assert re.search(r"^fits into .* 75% of the device's memory", out, re.M)
    assert re.search(r"^largest training.batch_size: \d+$", out, re.M)
    assert re.search(r"^batch +4\.00 MiB ", out, re.M) and 'pip install -e ".[plan]"' in out
    assert "does not fit" in script("--memory", "2GB")
    out = script("--training.world_size", "8", "--zero_stage", "2", "--training.zero_stage", "2")
    assert "fits" not in out and "8 devices, each" in out and f"{total / GIB:.2f} GiB" in out


def test_the_scripts_help_lists_the_gpus(monkeypatch, capsys, script):
    monkeypatch.setenv("COLUMNS", "1000")  # no line breaks inside names
    with pytest.raises(SystemExit):
        script("--help")
    shown = " ".join(capsys.readouterr().out.split())
    assert ", ".join(gpus.GPUS) in shown and "default: training.world_size, or 1" in shown


def test_the_scripts_json(script):
    found = json.loads(script("--json", "--memory", "24GiB", "--training.batch_size", "4"))
    expected = estimate(gpt2(**{"training.batch_size": 4}), 1)
    assert found | dataclasses.asdict(expected) | {"total": expected.total} == found
    assert found["memory"] == 24 * GIB and found["fits"] and found["largest_batch_size"] >= 4
    assert found["compiled"] is False


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--gpu", "A100-90GB"], r"A100-90GB.*did you mean A100-80GB"),
        (["--gpu", "a100"], r"\(a100\) is unknown \(did you mean A100-40GB or A100-80GB\?\)"),
        (["--gpu", "H100-80GB"], r"did you mean H100\?"),
        (["--zero_stage", "1", "--training.zero_stage", "3"], r"--zero_stage \(1\) and --training.zero_stage \(3\)"),
        (["--devices", "4", "--training.world_size", "8"], "give --devices 8"),
        (["--gpu", "A10", "--memory", "1GB"], "give one"),
        (["--memory", "lots"], "must be a number"),
        (["--gpu", ""], "known: T4"),
        (["--zero_stage", "4"], "at most 3"),
        (["--zero_stage", "x"], r"training\.zero_stage \('x'\) must be int or none"),
        (["--devices", "3", "--training.zero_group_size", "2"], "must divide 3, the number"),
    ],
)
def test_the_scripts_errors(script, arguments, message):
    with pytest.raises(UserError, match=message):
        script(*arguments)


# ------------------------------------------------------------ configurations and documentation


def planned():
    """{(configuration, GPUs, ZeRO stage): GiB} of the table in docs/memory.md."""
    rows = re.findall(
        r"^\| (\w+) \| (\d+) \| (\d) \| [\d.]+ \| ([\d.]+) \|", DOCUMENT.read_text(encoding="utf-8"), re.M
    )
    return {(name, int(devices), int(stage)): gib for name, devices, stage, gib in rows}


@pytest.mark.parametrize("name", ["speedrun_124m", "speedrun_350m"])
def test_recipes_for_one_gpu_say_their_size(name):
    path = ROOT / "configs" / f"{name}.py"
    config, text = load_config(str(path)), path.read_text(encoding="utf-8")
    training = config.training
    assert training.batch_size * training.gradient_accumulation_steps * config.data.max_length == 2**19
    assert f"configs/{name}.py" in text and f"{assemble(resolve(config, 1)).parameters:,} parameters" in text


@pytest.mark.parametrize(
    "name", ["gpt2_124m", "gpt2_350m", "gpt2_1300m", "gpt2_6700m", "llama_125m", "large", "medium"]
)
def test_the_configurations_say_what_they_need(name):
    path = ROOT / "configs" / f"{name}.py"
    config, text = load_config(str(path)), path.read_text(encoding="utf-8")
    training, stage = config.training, resolve(config, 8).config.training.zero_stage or 0
    if "gpt2" in name or "llama" in name:
        assert training.batch_size * training.gradient_accumulation_steps * config.data.max_length * 8 == 2**19
    assert f"configs/{name}.py" in text and f"{assemble(resolve(config, 1)).parameters:,} parameters" in text
    figures = [gib for (of, _, at), gib in planned().items() if (of, at) == (name, stage)]
    assert figures and any(f"{gib} GiB" in text for gib in figures), f"its docstring names none of {figures}"


MALLOC = """
import ctypes, resource, threading
from jaxlm.config import TrainingConfig
from jaxlm.parallel.devices import start_backend

start_backend(TrainingConfig())
library = ctypes.CDLL(None)
library.malloc.restype, library.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
library.free.argtypes = [ctypes.c_void_p]


def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    address = library.malloc(2**28)
    ctypes.memset(address, 1, 2**28)
    library.free(address)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before


def own_arena():
    size = ctypes.c_size_t.from_address(library.malloc(2**20) - ctypes.sizeof(ctypes.c_size_t)).value
    print("an arena of its own" if size & 4 else "that of the main thread")  # glibc's NON_MAIN_ARENA


first, second = faults(), faults()
assert second < first / 100, (first, second)
thread = threading.Thread(target=own_arena)
thread.start()
thread.join()
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="it is for glibc's malloc")
def test_freed_memory_is_kept_and_threads_do_not_share_it(tmp_path: Path, server: Server) -> None:
    """An update finds the pages of the one before. With one arena for all, tokenizing took four times as long."""
    out, errors = tmp_path / "out", tmp_path / "errors"
    code = server.start(["-c", MALLOC], tmp_path, out, errors, devices=1).wait()
    assert (code, out.read_text()) == (0, "an arena of its own\n"), errors.read_text()

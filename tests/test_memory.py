"""The memory estimate: its state is what arrays take, its activations are what JAX keeps.

python tests/test_memory.py rewrites the table in docs/memory.md (test_docs.py looks whether it is current).
"""

import dataclasses
import itertools
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import jax
import pytest

from jaxlm.__main__ import run
from jaxlm.config import Config, DataConfig, ModelConfig, TrainingConfig, load_config, replace_fields
from jaxlm.errors import UserError
from jaxlm.parallel import gpus
from jaxlm.parallel.layout import HOST_MEMORY
from jaxlm.plan import memory
from jaxlm.plan.memory import estimate, largest_batch_size
from jaxlm.run.setup import resolve
from jaxlm.train.assemble import assemble

ROOT = Path(__file__).parents[1]
DOCUMENT = ROOT / "docs" / "memory.md"
GPT2 = {name: ROOT / "configs" / f"gpt2_{name}.py" for name in ("124m", "350m", "1300m", "6700m")}
GIB = 2**30

T = 199  # two blocks of attention, padded to 200
MODEL = ModelConfig(
    vocab_size=300, d_model=64, n_heads=4, n_layers=6, d_ff=264, max_seq_len=T, dropout=0.0, attention_dropout=0.0
)
CONFIG = Config(model=MODEL, training=TrainingConfig(batch_size=2), data=DataConfig(max_length=T))
REMAT = {
    "none": {},
    "full": {"model.gradient_checkpointing": True},
    "dots": {"model.gradient_checkpointing": True, "model.remat_policy": "dots"},
}


def gpt2(name="124m", **dotted):
    return replace_fields(load_config(str(GPT2[name])), dotted)


# ------------------------------------------------------------ state


@pytest.mark.parametrize("stage", range(4))
@pytest.mark.parametrize("options", [{}, {"training.zero_group_size": 2}, {"training.offload_optimizer": True}])
def test_state_is_what_the_arrays_take(stage, options):
    """The state as the Trainer makes it, on 4 fake devices; 300 rows of embedding don't divide evenly by all axes."""
    if options and stage in (0, 3):
        pytest.skip("two stages are enough")
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
    ("stage", "parameters", "optimizer", "gradients"),
    [(0, 4, 8, 4 + 4), (1, 4, 8 / 8, 4 + 4), (2, 4, 8 / 8, 4 + 4 / 8), (3, 4 / 8, 8 / 8, 4 / 8 + 4 / 8)],
)
def test_state_is_as_in_the_zero_paper(stage, parameters, optimizer, gradients):
    """Bytes a parameter of GPT-2 124M on 8 devices with AdamW in float32, one micro-batch's gradient and the sum."""
    p = 124_475_904
    found = estimate(gpt2(**{"training.zero_stage": stage}), 8)
    assert found.parameters == pytest.approx(parameters * p, rel=0.02)
    assert found.optimizer == pytest.approx(optimizer * p, rel=0.02)
    assert found.gradients == pytest.approx(gradients * p, rel=0.02)


def test_the_batch_is_what_its_arrays_take():
    """Four int32 arrays of tokens and the rows' indices, a few batches deep; of this device's rows only."""
    rows = 16 * 4
    assert estimate(gpt2(), 8).batch == memory.BATCHES * 4 * (4 * rows * 1024 + rows) == estimate(gpt2(), 1).batch


def test_accumulation_costs_what_its_type_takes():
    one = estimate(gpt2(**{"training.gradient_accumulation_steps": 1}), 1)
    wide = estimate(gpt2(), 1)
    narrow = estimate(gpt2(**{"training.accumulator_dtype": "bfloat16"}), 1)
    assert wide.gradients == 2 * one.gradients
    assert narrow.gradients == 1.5 * one.gradients
    assert narrow.update > wide.update  # the sum is widened to float32 there


# ------------------------------------------------------------ activations


def formula(config, policy):
    """Activations by docs/memory.md, bytes a token: GPT-2's block, in bfloat16, with the fused kernel, no dropout."""
    d, f, layers, c = config.model.d_model, config.model.d_ff, config.model.n_layers, 2
    norm = 3 * 4 * d + 4 * 4  # of the residual stream, float32
    attention = 2 * c * 2 * d + 4 * config.model.n_heads  # q, k, v, output, log-sum-exp
    block = {"none": 2 * norm + attention + c * 2 * d + 2 * c * f, "full": c * d, "dots": c * (5 * d + f)}[policy]
    return layers * block + norm + c * d


@pytest.mark.parametrize("policy", ["none", "full", "dots"])
def test_activations_are_those_of_the_formula(policy):
    config = gpt2(**{"training.batch_size": 5} | REMAT[policy])
    expected = formula(config, policy) * 5 * 1024
    assert estimate(config, 1).activations == pytest.approx(expected, rel=1e-2)
    assert estimate(config, 8).activations == estimate(config, 1).activations


@pytest.mark.parametrize(
    ("fields", "sign"),
    [
        ({"training.use_amp": False}, 1),
        ({"model.scan_layers": True}, 0),
        ({"model.activation": "swiglu"}, 1),
        ({"model.norm": "rmsnorm", "model.use_bias": False}, 0),
        ({"model.dropout": 0.1}, 1),
        ({"training.zero_stage": 3}, 0),
        ({"training.tensor_parallel": 2}, -1),
    ],
)
def test_what_changes_the_activations(fields, sign):
    before, after = (estimate(gpt2(**more), 8).activations for more in ({}, fields))
    assert (abs(after - before) < 1e-3 * before) if sign == 0 else (sign * (after - before) > 0.01 * before)


# ------------------------------------------------------------ what has to hold between estimates


def test_policies_come_in_order():
    found = {policy: estimate(gpt2(**fields), 8) for policy, fields in REMAT.items()}
    assert found["full"].activations < found["dots"].activations < found["none"].activations
    assert found["full"].total < found["dots"].total < found["none"].total


@pytest.mark.parametrize("stage", range(1, 4))
def test_more_devices_never_hold_more_state(stage):
    found = [estimate(gpt2(**{"training.zero_stage": stage}), n) for n in (1, 4, 16)]
    for few, many in itertools.pairwise(found):
        for part in ("parameters", "optimizer", "gradients"):
            assert getattr(many, part) <= getattr(few, part)


@pytest.mark.parametrize("policy", REMAT)
def test_larger_batches_take_more(policy):
    totals = [estimate(gpt2(**{"training.batch_size": n} | REMAT[policy]), 1).total for n in (1, 2, 3, 7, 8, 50, 500)]
    assert totals == sorted(set(totals))


def test_other_options_count():
    base = gpt2(**{"training.zero_stage": 1})
    split = estimate(replace_fields(base, {"training.tensor_parallel": 2}), 8)
    offloaded = estimate(replace_fields(base, {"training.offload_optimizer": True}), 8)
    blockwise = estimate(replace_fields(base, {"model.attention": "blockwise"}), 8)
    whole = estimate(base, 8)
    assert split.activations < whole.activations and split.parameters < 0.6 * whole.parameters
    assert offloaded.host > 0.99 * whole.optimizer and offloaded.total < whole.total
    assert whole.activations < blockwise.activations
    whole_for_samples = estimate(replace_fields(base, {"training.zero_stage": 3}), 8).sampling
    assert whole_for_samples == 4 * assemble(resolve(base, 1)).parameters and not whole.sampling
    deepspeed = replace_fields(CONFIG, {"training.use_deepspeed": True})
    assert estimate(deepspeed, 4) == estimate(replace_fields(CONFIG, {"training.zero_stage": 2}), 4)


def test_optimizers_take_what_their_state_takes():
    found = {name: estimate(gpt2(**{"training.optimizer": name}), 1) for name in ("adamw", "muon", "adafactor")}
    assert found["adafactor"].optimizer < 0.01 * found["adamw"].optimizer
    outside = 4 * 50304 * 768 / found["adamw"].parameters
    assert found["muon"].optimizer / found["adamw"].optimizer == pytest.approx((1 + outside) / 2, rel=0.02)
    assert found["muon"].update > found["adamw"].update


def test_a_deepspeed_file_is_applied_for_these_devices(tmp_path):
    """Its total batch, over the devices that rows are split over, gives the micro-batch."""
    path = tmp_path / "deepspeed.json"
    path.write_text(json.dumps({"train_batch_size": 32, "gradient_accumulation_steps": 2}), encoding="utf-8")
    fields = {"training.use_deepspeed": True, "training.deepspeed_config": str(path)}
    config = dataclasses.replace(CONFIG, training=TrainingConfig())
    asked = replace_fields(config, {"training.batch_size": 4, "training.gradient_accumulation_steps": 2})
    assert estimate(replace_fields(config, fields), 4).activations == estimate(asked, 4).activations


@pytest.mark.parametrize("share", [None, ".9"])
def test_the_largest_batch_fits_and_a_larger_one_does_not(monkeypatch, share):
    for variable in gpus.FRACTION_VARIABLES:
        monkeypatch.delenv(variable, raising=False)
    if share is not None:
        monkeypatch.setenv(gpus.FRACTION_VARIABLES[1], share)
    size = gpus.memory_of("a10")
    most = largest_batch_size(gpt2(), 2, size)
    totals = [estimate(gpt2(**{"training.batch_size": n}), 2).total for n in (most, most + 1)]
    assert totals[0] <= size * float(share or 0.75) < totals[1]
    assert largest_batch_size(gpt2(), 2, 10**9) == 0


def test_the_compiled_figure_of_a_small_step():
    """On CPU, in float32 and scanned, where the compiler's figure means something: the same order of magnitude."""
    config = replace_fields(CONFIG, {"training.use_amp": False, "model.scan_layers": True, "model.n_layers": 2})
    compiled = assemble(resolve(config, jax.devices()[:1])).lower_step().compile()
    assert 0.5 < estimate(config, 1).total / memory.peak_bytes(compiled) < 2
    assert memory.compiled_on_gpus(config, 1) is None


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
    monkeypatch.setenv(gpus.FRACTION_VARIABLES[0], "much")
    with pytest.raises(UserError, match=gpus.FRACTION_VARIABLES[0]):
        memory.usable(1, 0.75)


# ------------------------------------------------------------ the script


def script(capsys, *arguments):
    run("estimate_memory", ["--config", str(GPT2["124m"]), *arguments])
    return capsys.readouterr().out


def test_the_scripts_table(capsys):
    out = script(capsys, "--devices", "8", "--zero_stage", "2", "--gpu", "a100-80gb")
    total = estimate(gpt2(**{"training.zero_stage": 2}), 8).total
    assert re.search(rf"^total +{total / GIB:.2f} ", out, re.M)
    assert re.search(r"^compiled +none .*needs 8 GPU", out, re.M)
    assert re.search(r"^fits; largest training.batch_size: \d+$", out, re.M)
    assert all(re.search(rf"^{part} +\d", out, re.M) for part in memory.MADE_OF)
    assert re.search(r"^batch +4\.00 MiB ", out, re.M)
    assert out.count("%") == 1  # JAX's share
    assert "does not fit" in script(capsys, "--memory", "2GB")
    out = script(capsys, "--training.world_size", "8", "--zero_stage", "2", "--training.zero_stage", "2")
    assert "fit" not in out and "each of 8 devices" in out and f"{total / GIB:.2f} GiB" in out


def test_the_scripts_help_lists_the_gpus(monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "1000")  # no line breaks inside names
    with pytest.raises(SystemExit):
        script(capsys, "--help")
    shown = " ".join(capsys.readouterr().out.split())
    assert ", ".join(gpus.GPUS) in shown and "default: training.world_size, or 1" in shown


def test_the_scripts_json(capsys):
    found = json.loads(script(capsys, "--json", "--memory", "24GiB", "--training.batch_size", "4"))
    expected = estimate(gpt2(**{"training.batch_size": 4}), 1)
    assert found | dataclasses.asdict(expected) | {"total": expected.total} == found
    assert found["memory"] == 24 * GIB and found["fits"] and found["largest_batch_size"] >= 4


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
def test_the_scripts_errors(capsys, arguments, message):
    with pytest.raises(UserError, match=message):
        script(capsys, *arguments)


def test_an_estimate_starts_no_backend():
    """So that it can be made where the GPUs are busy, or JAX can't use them, and of models that fit nowhere."""
    program = f"""if True:
        from jaxlm.config import load_config
        from jaxlm.plan import memory
        from jax._src import xla_bridge
        config = load_config({str(GPT2["6700m"])!r})
        assert memory.largest_batch_size(config, 64, 2**36) > 0
        assert not xla_bridge._backends, xla_bridge._backends
        assert memory.compiled_on_gpus(config, 64) is None"""
    environment = os.environ | {"JAX_PLATFORMS": "cuda"}
    subprocess.run([sys.executable, "-c", program], check=True, timeout=120, env=environment)


# ------------------------------------------------------------ configurations and documentation


@pytest.mark.parametrize("name", GPT2)
def test_the_configurations_say_what_they_need(name):
    config = gpt2(name)
    training, text = config.training, GPT2[name].read_text(encoding="utf-8")
    assert training.batch_size * training.gradient_accumulation_steps * config.data.max_length * 8 == 2**19
    assert f"configs/{GPT2[name].name}" in text
    assert f"{assemble(resolve(config, 1)).parameters:,} parameters" in text
    assert f"{estimate(config, 8).total / GIB:.1f} GiB" in text


def test_the_llama_configuration_says_what_it_needs():
    path = ROOT / "configs" / "llama_125m.py"
    config, text = load_config(str(path)), path.read_text(encoding="utf-8")
    training = config.training
    assert training.batch_size * training.gradient_accumulation_steps * config.data.max_length * 8 == 2**19
    assert f"{assemble(resolve(config, 1)).parameters:,} parameters" in text
    assert f"estimated {estimate(config, 8).total / GIB:.1f} GiB a GPU on 8" in text


def test_the_large_configuration_says_what_it_needs():
    path = ROOT / "configs" / "large.py"
    config, text = load_config(str(path)), path.read_text(encoding="utf-8")
    assert f"{assemble(resolve(config, 1)).parameters:,} parameters" in text
    on_8, on_1 = (estimate(config, n).total / GIB for n in (8, 1))
    assert f"estimated {on_8:.1f} GiB a GPU on 8, {on_1:.1f} GiB on one" in text


def table():
    """Lines of the table in docs/memory.md."""
    policies = {"kept": False, "recomputed": True}
    head = ["configuration", "devices", "`zero_stage`", "state", "1 row, kept", "recomputed", "all rows, kept"]
    yield "| " + " | ".join([*head, "recomputed"]) + " |"
    yield "|---|" + "--:|" * 7
    for name in GPT2:
        config = gpt2(name)
        rows = config.training.batch_size
        for devices, stage in [(1, 0), *((8, stage) for stage in range(4))]:
            cells = [f"{GPT2[name].stem}, {rows} rows", str(devices), str(stage)]
            base = replace_fields(config, {"training.zero_stage": stage})
            found = estimate(base, devices)
            cells.append(f"{(found.parameters + found.optimizer + found.gradients) / GIB:.1f}")
            for batch_size in (1, rows):
                for again in policies.values():
                    fields = {"training.batch_size": batch_size, "model.gradient_checkpointing": again}
                    cells.append(f"{estimate(replace_fields(base, fields), devices).total / GIB:.1f}")
            yield "| " + " | ".join(cells) + " |"


def with_table(text):
    """`text` with what stands between its two markers replaced."""
    start, end = "<!-- table: python tests/test_memory.py rewrites it -->\n", "<!-- end of the table -->"
    before, rest = text.split(start)
    return before + start + "\n".join(table()) + "\n" + end + rest.split(end)[1]


if __name__ == "__main__":
    DOCUMENT.write_text(with_table(DOCUMENT.read_text(encoding="utf-8")), encoding="utf-8")

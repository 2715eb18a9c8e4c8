"""The memory estimate: its state is what arrays take, its activations are what JAX keeps, its table is current.

python tests/test_memory.py rewrites the table in docs/memory.md.
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
import jax.numpy as jnp
import pytest
from flax import nnx

from jaxlm.__main__ import run
from jaxlm.config import Config, DataConfig, ModelConfig, TrainingConfig, load_config, replace_fields
from jaxlm.errors import UserError
from jaxlm.model import Transformer
from jaxlm.model.dropout import row_keys
from jaxlm.ops.attention_kernels import FUSED_FROM, choose_attention
from jaxlm.parallel import gpus, sharding
from jaxlm.parallel.sharding import Layout
from jaxlm.plan import memory
from jaxlm.plan.memory import estimate, largest_batch_size
from jaxlm.train.optim import build_optimizer
from jaxlm.train.precision import compute_dtype
from jaxlm.train.step import batch_loss, init_state

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
    mesh = sharding.make_mesh(jax.devices()[:4], sharding.mesh_shape(config, 4))
    make = lambda: Transformer(config.model, dtype=compute_dtype(config.training), rngs=nnx.Rngs(0))  # noqa: E731
    params = nnx.to_pure_dict(nnx.split(nnx.eval_shape(make))[1])
    layout = Layout(mesh, stage, params, config.training.offload_optimizer)
    init = lambda: init_state(make(), build_optimizer(config.training, layout.shapes), config, layout)  # noqa: E731
    abstract = layout.place(jax.eval_shape(init))
    state = jax.jit(init, out_shardings=jax.tree.map(lambda x: x.sharding, abstract))()

    def held(tree, host=False):
        shards = [s.data for x in jax.tree.leaves(tree) for s in x.addressable_shards if s.device == jax.devices()[0]]
        return sum(s.nbytes for s in shards if (s.sharding.memory_kind == sharding.HOST_MEMORY) == host)

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


def kept_by_jax(config, devices):
    """Bytes that one device keeps from the loss's forward to its backward pass: the arrays with a position axis.

    Weights are counted elsewhere, token ids with the batch.
    """
    dtype, training, length = compute_dtype(config.training), config.training, config.data.max_length
    mesh = sharding.abstract_mesh(sharding.mesh_shape(config, devices))
    implementation = choose_attention(config, FUSED_FROM)
    make = lambda: Transformer(config.model, implementation=implementation, dtype=dtype, rngs=nnx.Rngs(0))  # noqa: E731
    abstract = nnx.eval_shape(make)
    graphdef, params = nnx.split(abstract)
    params = nnx.to_pure_dict(params)
    layout = Layout(mesh, training.zero_stage or 0, params)
    rows = training.batch_size * devices
    batch = dict.fromkeys(("tokens", "targets", "segments", "positions"), jax.ShapeDtypeStruct((rows, length), "int32"))
    batch["rows"] = jax.ShapeDtypeStruct((rows,), "int32")
    kept = []

    def on_device(params, batch):
        keys = row_keys(jax.random.key(0), batch["rows"], config.model.n_layers) if config.model.dropout else None

        def loss(held):
            whole, fetch = layout.gather(held, dtype)
            return batch_loss(graphdef, whole, batch, keys, config.data.pack_sequences, fetch=fetch)[0]

        out, backward = jax.vjp(loss, params)
        kept.extend(jax.tree.leaves(backward))
        return out

    rows_spec = jax.sharding.PartitionSpec(sharding.ROWS)
    specs = (layout.held_specs(), dict.fromkeys(batch, rows_spec))
    everywhere = jax.sharding.PartitionSpec()
    loss = jax.shard_map(
        on_device, mesh=mesh, in_specs=specs, out_specs=everywhere, axis_names=set(sharding.ROWS), check_vma=False
    )
    jax.eval_shape(loss, jax.eval_shape(layout.from_whole, params), batch)
    blocks = -(-length // 128)
    padded = 128 * blocks if implementation == "pallas" else -(-length // blocks) * blocks
    lengths = {length, padded, training.batch_size * length}  # the last: norms have the tokens of all rows on one axis
    of_tokens = [x for x in kept if lengths & set(x.shape) and x.dtype != jnp.int32]
    return sum(x.size * x.dtype.itemsize for x in of_tokens)


def error(config, devices=1):
    """Of the analytic activations, relative to JAX's."""
    return estimate(config, devices).activations / kept_by_jax(config, devices) - 1


CASES = {
    "plain": {},
    "float32": {"training.use_amp": False},
    "unpacked": {"data.pack_sequences": False, "model.attention": "blockwise"},
    "scanned": {"model.scan_layers": True},
    "post-norm": {"model.pre_norm": False},
    "relu": {"model.activation": "relu"},
    "swish": {"model.activation": "swish"},
    "rotary": {"model.positions": "rotary"},
    "gelu_exact": {"model.activation": "gelu_exact"},
    "geglu": {"model.activation": "geglu"},
    "llama": {
        "model.norm": "rmsnorm",
        "model.activation": "swiglu",
        "model.use_bias": False,
        "model.positions": "rotary",
        "model.n_kv_heads": 2,
        "model.qk_norm": True,
        "model.logit_softcap": 30.0,
        "training.z_loss": 1e-4,
    },
    "dropout": {"model.dropout": 0.1, "model.attention_dropout": 0.1},
    "blockwise": {"model.attention": "blockwise", "model.attention_dropout": 0.1},
    "wide heads": {"model.n_heads": 2, "model.d_model": 48},
}


# JAX also lists arrays of zeros, and each layer's angles, which are those of the first: they take nothing once
# compiled. Channels of them, activations kept and recomputed.
ANGLES = 4 * (MODEL.n_layers - 1) * MODEL.d_model // MODEL.n_heads
LISTED = {
    "rotary": (ANGLES, 0),
    "llama": (ANGLES, 0),
    "dropout": ((2 * MODEL.n_layers + 1) * MODEL.d_model, MODEL.d_model),
}


@pytest.mark.parametrize("policy", ["none", "full", "dots"])
@pytest.mark.parametrize("case", CASES)
def test_activations_are_what_jax_keeps(case, policy):
    config = replace_fields(CONFIG, CASES[case] | REMAT[policy])
    channels = LISTED.get(case, (0, 0))[policy != "none"]
    zeros = compute_dtype(config.training).itemsize * config.training.batch_size * T * channels
    assert estimate(config, 1).activations == pytest.approx(kept_by_jax(config, 1) - zeros, rel=1e-4)


@pytest.mark.parametrize("policy", ["none", "full"])
def test_stage_3_keeps_the_same_activations(policy):
    assert abs(error(replace_fields(CONFIG, {"training.zero_stage": 3} | REMAT[policy]), 4)) < 0.001


def test_activations_of_the_real_model_are_what_jax_keeps():
    config = gpt2(**{"training.batch_size": 5})  # 3 rows have as many tokens as the feed-forward layer has channels
    twice = 5 * 1024 * 12 * 768 * 2  # the kernel's output is listed as [B, T, H, K] and as [B, T, D], one array
    assert estimate(config, 1).activations == pytest.approx(kept_by_jax(config, 1) - twice, rel=1e-3)


# ------------------------------------------------------------ what has to hold between estimates


def test_policies_come_in_order():
    found = {policy: estimate(gpt2(**fields), 8) for policy, fields in REMAT.items()}
    assert found["full"].activations < found["dots"].activations < found["none"].activations
    assert found["full"].total < found["dots"].total < found["none"].total


@pytest.mark.parametrize("stage", range(4))
def test_more_devices_never_hold_more_state(stage):
    found = [estimate(gpt2(**{"training.zero_stage": stage}), n) for n in (1, 2, 4, 8, 16)]
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
    assert whole_for_samples == 4 * memory.parameters(base) and not whole.sampling
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
    assert 0.5 < estimate(config, 1).total / memory.compiled_bytes(config, jax.devices()[:1]) < 2
    assert memory.compiled_on_gpus(config, 1) is None


# ------------------------------------------------------------ errors


def test_the_configuration_is_validated():
    for fields, devices, message in [
        ({"data.max_length": 2000}, 1, "exceeds model.max_seq_len"),
        ({"training.tensor_parallel": 2}, 3, "must divide the 3 device"),
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
    assert "fit" not in out and "each of 8 device(s)" in out and f"{total / GIB:.2f} GiB" in out


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
        (["--zero_stage", "x"], "--zero_stage"),
        (["--devices", "3", "--training.zero_group_size", "2"], "must divide the 3 device"),
    ],
)
def test_the_scripts_errors(capsys, arguments, message):
    with pytest.raises(UserError, match=message):
        script(capsys, *arguments)


def test_an_estimate_starts_no_backend():
    """So that it can be made where the GPUs are busy, or JAX can't use them, and of models that fit nowhere."""
    program = f"""if True:
        from jaxlm.commands import cli
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
    assert f"{memory.parameters(config):,} parameters" in text
    assert f"{estimate(config, 8).total / GIB:.1f} GiB" in text


def test_the_llama_configuration_says_what_it_needs():
    path = ROOT / "configs" / "llama_125m.py"
    config, text = load_config(str(path)), path.read_text(encoding="utf-8")
    training = config.training
    assert training.batch_size * training.gradient_accumulation_steps * config.data.max_length * 8 == 2**19
    assert f"{memory.parameters(config):,} parameters" in text
    assert f"estimated {estimate(config, 8).total / GIB:.1f} GiB a GPU on 8" in text


def test_the_large_configuration_says_what_it_needs():
    path = ROOT / "configs" / "large.py"
    config, text = load_config(str(path)), path.read_text(encoding="utf-8")
    assert f"{memory.parameters(config):,} parameters" in text
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


def test_the_documents_table_is_current():
    text = DOCUMENT.read_text(encoding="utf-8")
    assert with_table(text) == text, "python tests/test_memory.py rewrites it"


if __name__ == "__main__":
    DOCUMENT.write_text(with_table(DOCUMENT.read_text(encoding="utf-8")), encoding="utf-8")

"""The plan: what is read of a compiled program's text, what is predicted from it, and the search.

No compiler for GPUs is needed; tests/compiled has the tests that need it.
"""

import dataclasses
import json
import lzma
from collections import Counter
from pathlib import Path

import pytest

from jaxlm.__main__ import run
from jaxlm.config import load_config, replace_fields
from jaxlm.errors import UserError
from jaxlm.plan import hlo, memory, search, show, targets
from jaxlm.plan import plan as plans
from jaxlm.plan.kernels import kernel_of
from jaxlm.plan.predict import Cluster, collective_seconds, group_of, kernel_seconds, predict
from jaxlm.plan.program import CompiledUpdate
from jaxlm.run.setup import resolve

# GPT-2 124M, 32 rows of 1,024 packed tokens, at commit 5c1e888, compiled for an H200 by jax 0.11.2 without tuning.
# Paths are shortened, its Triton kernels' bytes left out. Measured: benchmarks/results/gpu_2026-11-26T1910_*.json.
MEASURED = json.loads(lzma.decompress((Path(__file__).parent / "golden/gpt2_124m_h200.xz").read_bytes()))
SECONDS, PEAK_BYTES = 32 * 1024 / 468666.354, 12_736_791_040
FIELDS = {"training.batch_size": 32, "training.gradient_accumulation_steps": 1}
H100 = Cluster("H100", 1, 1)
EIGHT = Cluster("H100", 8, 1)

PROGRAM = """HloModule jit_step, is_scheduled=true

FileNames
1 "/x/site-packages/jaxlm/model/layers.py"
2 "/x/train.py"

FunctionNames
1 "Mlp.__call__"
2 "main"

FileLocations
1 {file_name_id=2 function_name_id=2 line=7 end_line=7 column=1 end_column=2}
2 {file_name_id=1 function_name_id=1 line=41 end_line=41 column=1 end_column=2}

StackFrames
1 {file_location_id=1 parent_frame_id=1}
2 {file_location_id=2 parent_frame_id=2}

%sliced (p.0: f32[10,1000]) -> f32[1,1000] {
  %p.0 = f32[10,1000]{1,0} parameter(0)
  %p.1 = s32[] parameter(1)
  %zero = s32[] constant(0)
  %converted = bf16[10,1000]{1,0} convert(%p.0)
  ROOT %one = bf16[1,1000]{1,0} dynamic-slice(%converted, %p.1, %zero), dynamic_slice_sizes={1,1000}
}

%updated (q.0: f32[10,1000], q.1: f32[1,1000]) -> f32[10,1000] {
  %q.0 = f32[10,1000]{1,0} parameter(0)
  %q.1 = f32[1,1000]{1,0} parameter(1)
  %q.2 = s32[] parameter(2)
  %null = s32[] constant(0)
  ROOT %put = f32[10,1000]{1,0} dynamic-update-slice(%q.0, %q.1, %q.2, %null)
}

%product (a: bf16[256,512], b: bf16[512,128]) -> bf16[256,128] {
  %a = bf16[256,512]{1,0} parameter(0)
  %b = bf16[512,128]{1,0} parameter(1)
  ROOT %dot.1 = bf16[256,128]{1,0} dot(%a, %b), lhs_contracting_dims={1}, rhs_contracting_dims={0}
}

%body (state: (s32[], f32[10,1000])) -> (s32[], f32[10,1000]) {
  %state = (s32[], f32[10,1000]{1,0}) parameter(0)
  %i = s32[] get-tuple-element(%state), index=0
  %array = f32[10,1000]{1,0} get-tuple-element(%state), index=1
  %row = bf16[1,1000]{1,0} fusion(%array, %i), kind=kLoop, calls=%sliced, metadata={stack_frame_id=2}
  ROOT %next = (s32[], f32[10,1000]{1,0}) tuple(%i, %array)
}

ENTRY %main (x: f32[10,1000], y: f32[1,1000]) -> f32[10,1000] {
  %x = f32[10,1000]{1,0} parameter(0)
  %y = f32[1,1000]{1,0} parameter(1)
  %k = s32[] parameter(2)
  %l = bf16[256,512]{1,0} parameter(3)
  %r = bf16[512,128]{1,0} parameter(4)
  %start = (f32[1,1000]{1,0}, f32[8,1000]{1,0}) all-gather-start(%y), replica_groups={{0,1,2,3,4,5,6,7}}, dimensions={0}
  %put.1 = f32[10,1000]{1,0} fusion(%x, %y, %k), kind=kLoop, calls=%updated
  %gemm = bf16[256,128]{1,0} fusion(%l, %r), kind=kCustom, calls=%product
  %done = f32[8,1000]{1,0} all-gather-done(%start)
  ROOT %loop = (s32[], f32[10,1000]{1,0}) while(%init), condition=%c, body=%body, TRIPS
}
""".replace("TRIPS", 'backend_config={"known_trip_count":{"n":"5"}}')


@pytest.fixture(scope="module")
def measured() -> CompiledUpdate:
    return CompiledUpdate(**MEASURED | {"own_kernels": (), "notes": ()})


def measured_plan() -> plans.Plan:
    """The plan of the update that was measured, for 10,000 of them."""
    config = replace_fields(load_config("gpt2_124m"), FIELDS | {"training.max_steps": 10_000})
    found = CompiledUpdate(**MEASURED | {"own_kernels": (), "notes": ()})
    return plans.plan_of(resolve(config, 1), found, Cluster("H200", 1, 1))[0]


def test_the_measured_update_is_predicted_within_a_tenth(measured: CompiledUpdate) -> None:
    found = predict(hlo.parse(measured.text), Cluster("H200", 1, 1))
    assert found.seconds == pytest.approx(SECONDS, rel=0.1)
    attention = found.parts["attention"].seconds
    assert attention == pytest.approx(9.4e-3, rel=0.1), "benchmarks/LOG.md has it of a trace"


def test_the_measured_update_takes_the_memory_of_its_program(measured: CompiledUpdate) -> None:
    resolved = resolve(replace_fields(load_config("gpt2_124m"), FIELDS), 1)
    assert memory.of_program(resolved, measured).total == pytest.approx(PEAK_BYTES, rel=0.02)


def test_what_a_kernel_reads_writes_and_multiplies() -> None:
    """A slice counts as the slice, what is updated in place as the update."""
    program = hlo.parse(PROGRAM)
    kernels = {}
    for x, computation, times in program.run():
        kernel = kernel_of(x, computation, program)
        if kernel is not None:
            kernels[kernel.name] = (kernel.bytes, kernel.flops, times)
    assert kernels == {
        "row": (4 + 1000 * 4 + 1000 * 2, 0, 5),
        "put.1": (4 + 1000 * 4 + 1000 * 4, 0, 1),
        "gemm": ((256 * 512 + 512 * 128 + 256 * 128) * 2, 2 * 256 * 512 * 128, 1),
    }


def test_kernels_know_their_line() -> None:
    program = hlo.parse(PROGRAM)
    row = program.computations["body"].instructions["row"]
    assert program.stack(row) == [
        ("/x/site-packages/jaxlm/model/layers.py", "Mlp.__call__", 41),
        ("/x/train.py", "main", 7),
    ]
    kernel = kernel_of(row, program.computations["body"], program)
    assert kernel and kernel.source == "model/layers.py:41 Mlp.__call__" and kernel.part == "activations"


def test_communication_hides_behind_kernels() -> None:
    found = predict(hlo.parse(PROGRAM), EIGHT)
    assert found.collectives == {"all-gather": 32000} and found.beside == {"all-gather": 2}
    kernels = found.total.seconds
    assert found.seconds == pytest.approx(kernels + found.exposed) and found.exposed < found.communication
    slow = PROGRAM.replace("f32[8,1000]", "f32[8,100000000]")
    found = predict(hlo.parse(slow), EIGHT)
    assert found.exposed == pytest.approx(found.communication, rel=1e-3)
    assert found.seconds > 3.2e9 * 7 / 8 / targets.TARGETS["H100"].link


@pytest.mark.parametrize(
    ("groups", "expected"),
    [
        ("{{0,4},{1,5},{2,6},{3,7}}", [0, 4]),
        ("[2,4]<=[8]", [0, 1, 2, 3]),
        ("[4,2]<=[2,4]T(1,0)", [0, 4]),
        ("mesh['replica'=2,'data'=4] {'replica'}", [0, 4]),
        ("mesh['replica'=2,'data'=4] {'replica', 'data'}", list(range(8))),
    ],
)
def test_groups(groups: str, expected: list[int]) -> None:
    text = PROGRAM.replace("{{0,1,2,3,4,5,6,7}}", groups)
    start = hlo.parse(text).computations["main"].instructions["start"]
    assert group_of(start, EIGHT) == expected


def test_what_links_between_hosts_cost() -> None:
    two = Cluster("H100", 16, 2)
    inside, across = (collective_seconds("all-gather", 10**9, group, two) for group in ([0, 1, 2, 3], [0, 8]))
    whole = collective_seconds("all-gather", 10**9, list(range(16)), two)
    assert across / 0.5 > whole / (15 / 16) > inside / 0.75
    assert collective_seconds("all-reduce", 10**9, [0, 1, 2, 3], two) == 2 * inside
    assert collective_seconds("all-gather", 10**9, [0], two) == 0


def test_cudnns_attention_counts_its_products() -> None:
    call = '%l), custom_call_target="__cudnn$fmhaSoftmaxBackward"'
    text = PROGRAM.replace("%l, %r), kind=kCustom, calls=%product", call).replace(" fusion(%l)", " custom-call(%l)")
    text = text.replace("= bf16[256,128]{1,0} fusion(%l", "= bf16[2,1024,12,64]{3,2,1,0} custom-call(%l")
    program = hlo.parse(text.replace("%l = bf16[256,512]{1,0}", "%l = bf16[2,1024,12,64]{3,2,1,0}"))
    kernel = kernel_of(program.computations["main"].instructions["gemm"], program.computations["main"], program)
    assert kernel and (kernel.part, kernel.attention) == ("attention", "cudnn backward")
    assert kernel.flops == 5 * 2 * 64 * 2 * 12 * 1024**2 / 2


def test_hosts_always_divide_the_devices() -> None:
    assert [targets.usual_hosts(n) for n in (1, 8, 12, 28, 64)] == [1, 1, 1, 1, 8]


def test_float32_products_take_twice_as_long() -> None:
    program = hlo.parse(
        PROGRAM.replace("[256,512]", "[4096,4096]")
        .replace("[512,128]", "[4096,4096]")
        .replace("[256,128]", "[4096,4096]")
    )
    kernel = kernel_of(program.computations["main"].instructions["gemm"], program.computations["main"], program)
    assert kernel is not None
    whole = dataclasses.replace(kernel, flops_16=0, flops_32=kernel.flops_16)
    gap = targets.KERNEL_GAP
    assert kernel_seconds(whole, "H100") - gap == pytest.approx(2 * (kernel_seconds(kernel, "H100") - gap))


# ------------------------------------------------------------ memory

TWO_ROWS = {"training.batch_size": 2, "training.gradient_accumulation_steps": 16}
COMPILED = [  # by jax 0.10.2 for H100s, GiB: docs/memory.md
    ("gpt2_124m", 1, FIELDS, 11.45),
    ("gpt2_124m", 1, FIELDS | {"model.scan_layers": True}, 12.21),
    ("gpt2_124m", 1, FIELDS | {"model.gradient_checkpointing": True}, 3.42),
    ("gpt2_124m", 1, {}, 7.36),
    ("medium", 1, {}, 2.89),
    ("gpt2_124m", 8, {"training.zero_stage": 2}, 6.14),
    ("gpt2_124m", 8, {"training.zero_stage": 3}, 5.91),
    ("gpt2_350m", 8, {}, 12.80),
    ("gpt2_1300m", 8, {}, 34.6),
    ("gpt2_1300m", 8, {"training.zero_stage": 1}, 38.9),
    ("gpt2_1300m", 8, {"training.zero_stage": 3}, 31.3),
    ("gpt2_1300m", 8, TWO_ROWS | {"training.zero_stage": 1}, 19.97),
    ("gpt2_1300m", 8, TWO_ROWS | {"training.zero_stage": 3}, 10.77),
    ("large", 8, {}, 4.10),
    ("llama_125m", 8, {}, 7.41),
    ("gpt2_6700m", 8, {"training.zero_stage": 3}, 22.81),
]


@pytest.mark.parametrize(("name", "devices", "fields", "gib"), COMPILED)
def test_the_approximation_is_within_a_quarter(name: str, devices: int, fields: dict, gib: float) -> None:
    found = memory.estimate(replace_fields(load_config(name), fields), devices)
    assert found.total / 2**30 == pytest.approx(gib, rel=0.25)


def test_the_largest_batch_is_found_in_a_few_calls() -> None:
    config, calls = load_config("gpt2_124m"), Counter()

    def total(larger) -> int:
        rows = larger.training.batch_size
        calls[rows] += 1
        return 1000 + 37 * rows + rows % 3

    assert memory.largest_batch_size(config, 1000 + 37 * 123 + 2, total) == 123
    assert len(calls) < 9 and set(calls.values()) == {1}
    assert memory.largest_batch_size(config, 10, total) == 0


# ------------------------------------------------------------ the search and the command


def fake_plan(resolved, compiled, cluster):
    """Larger micro-batches are faster and take more; recomputing is slower and takes less."""
    training, model = resolved.config.training, resolved.config.model
    again = model.gradient_checkpointing
    taken = (2 if again else 8) * training.batch_size * 2**30
    speed = 1e5 * training.batch_size / (training.batch_size + 2) * (0.6 if again else 1)
    values = {field.name: 0 for field in dataclasses.fields(plans.Plan)}
    fits = taken <= memory.usable(80 * 2**30, training.memory_fraction)
    made = plans.Plan(**values | {"memory_bytes": taken, "tokens_per_second": speed, "fits": fits, "mfu": 0.4})
    return made, None


@pytest.fixture
def without_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(search, "plan_of", fake_plan)
    monkeypatch.setattr(search, "compile_update", lambda *_: None)
    monkeypatch.setattr(search, "resolve_for", lambda config, gpu, devices, hosts: resolve(config, devices))


def test_the_search_keeps_the_rows_and_finds_the_fastest_that_fits(without_compiler: None, tmp_path: Path) -> None:
    config = load_config("gpt2_350m")
    found = search.search(config, EIGHT, 20)
    rows = {t.fields["training.batch_size"] * t.fields["training.gradient_accumulation_steps"] for t in found}
    assert rows == {64} and all(trial.plan.fits for trial in found)
    assert found[0].fields["training.batch_size"] == 4 and not found[0].fields["model.gradient_checkpointing"]
    assert [t.plan.tokens_per_second for t in found] == sorted((t.plan.tokens_per_second for t in found), reverse=True)
    assert "--training.batch_size 4" in show.trials(found).splitlines()[-1]
    search.write_config(config, found[0], tmp_path / "best.json")
    assert load_config(str(tmp_path / "best.json")).training.batch_size == 4
    assert len(search.search(config, EIGHT, 2)) <= 2


def test_nothing_fits(without_compiler: None) -> None:
    with pytest.raises(UserError, match="nothing that was tried fits 1 x RTX 4090"):
        search.search(load_config("gpt2_6700m"), Cluster("RTX 4090", 1, 1), 9)


def test_the_plan_as_people_and_programs_read_it(measured: CompiledUpdate) -> None:
    config = replace_fields(load_config("gpt2_124m"), FIELDS | {"training.max_steps": 10_000})
    made, prediction = plans.plan_of(resolve(config, 1), measured, Cluster("H200", 1, 1))
    found = json.loads(json.dumps(made.to_json()))
    expected = {"gpu", "devices", "hosts", "attention", "memory_bytes", "overhead_bytes", "fits", "hbm_bytes", "flops"}
    expected |= {"kernels", "collectives", "seconds_per_update", "tokens_per_second", "mfu", "jax"}
    assert (
        expected <= set(found) and found["fits"] and found["hours"] == pytest.approx(found["seconds_per_update"] / 0.36)
    )
    assert sum(share["seconds"] for share in found["parts"].values()) == pytest.approx(found["seconds_per_update"])
    text = show.plan(made, price=2.0)
    assert "1 x H200, pallas attention" in text and "tokens/s; MFU 4" in text
    assert "all updates (training.max_steps): 0.18 hours, at a cost of 0.35" in text and "fits into" in text
    assert "step.py" not in show.slowest(prediction).split("gemm_fusion_dot")[0] and "layers.py" in show.slowest(
        prediction
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--gpu", "H1000"], r"--gpu \(H1000\) is unknown \(did you mean H100\?\)"),
        (["--gpu", "V100-16GB"], "can't be compiled for here"),
        (["--devices", "6", "--hosts", "4"], r"--hosts \(4\) must divide --devices \(6\)"),
        (["--devices", "0"], r"--devices \(0\)"),
        (["--devices", "2", "--training.world_size", "4"], "give --devices 4"),
        (["--write", "x.json"], "--write is for --search"),
        (["--search", "--trials", "0"], r"--trials \(0\)"),
        (["--search", "--price_per_gpu_hour", "2"], "--price_per_gpu_hour is for the tables of one plan"),
        (["--json", "--per_kernel"], "--per_kernel is for the tables of one plan"),
        (["--save", "there", "--training.batch_schedule", "5:2"], "--save is of an update of one size"),
        ([], r"compiler for GPUs is not installed: pip install -e \"\.\[plan\]\""),
    ],
)
def test_mistakes_are_one_line(monkeypatch: pytest.MonkeyPatch, arguments: list[str], message: str) -> None:
    monkeypatch.setattr(targets.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=message):
        run("plan", ["--config", "gpt2_124m", *arguments])


def test_a_plugin_of_another_version_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(targets.importlib.util, "find_spec", lambda name: object() if "cuda13" in name else None)
    monkeypatch.setattr("importlib.metadata.version", lambda name: "0.10.2" if name == "jaxlib" else "0.10.1")
    with pytest.raises(UserError, match=r"jax-cuda13-plugin \(0\.10\.1\) must be of jaxlib's version, 0\.10\.2"):
        targets.plugin()

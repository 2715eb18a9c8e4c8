"""jaxlm/plan/hlo.py and kernels.py: what moves, however XLA writes the rest of an instruction."""

import pytest

from jaxlm.plan import hlo
from jaxlm.plan.kernels import kernel_of

PROGRAM = """HloModule jit_step, is_scheduled=true

%add.1 (x.1: f32[], y.1: f32[]) -> f32[] {
  ROOT %sum.1 = f32[] add(%x.1, %y.1)
}

%body.2 (state.1: (s32[], f32[8,4])) -> (s32[], f32[8,4]) {
  %part.1 = f32[8,4]{1,0} get-tuple-element(%state.1), index=1
  %shard.1 = f32[2,4]{1,0} reduce-scatter(%part.1), channel_id=1, replica_groups=GROUPS, dimensions={0}, to_apply=%add.1
  ROOT %all.1 = f32[8,4]{1,0} all-gather(%shard.1), channel_id=2, replica_groups=GROUPS, dimensions={0}
}

ENTRY %main.3 (in.1: f32[8,4], small.1: f32[]) -> f32[8,4] {
  %in.1 = f32[8,4]{1,0} parameter(0)
  %small.1 = f32[] parameter(1)
  %loss.1 = f32[] all-reduce(%small.1), replica_groups=GROUPS, to_apply=%add.1
  %two.1 = (bf16[8,4]{1,0}, /*index=1*/bf16[3]{0}) all-reduce(%a.1, %b.1), replica_groups=GROUPS, to_apply=%add.1
  %a.1 = bf16[8,4]{1,0} convert(%in.1)
  %b.1 = bf16[3]{0} constant({1, 2, 3})
  %start.1 = (f32[2,4]{1,0}, f32[8,4]{1,0}) all-gather-start(%quarter.1), replica_groups=GROUPS, dimensions={0}
  %quarter.1 = f32[2,4]{1,0} slice(%in.1), slice={[0:2], [0:4]}
  %done.1 = f32[8,4]{1,0} all-gather-done(%start.1)
  ROOT %loop.1 = (s32[], f32[8,4]) while(%init.1), condition=%cond.1, body=%body.2, TRIPS
}
""".replace("TRIPS", 'backend_config={"known_trip_count":{"n":"5"}}')
GROUPS = ["{{0,1,2,3}}", "[1,4]<=[4]", "mesh['replica'=1,'data'=4] {'data'}"]  # the last: jax 0.11


@pytest.mark.parametrize("groups", GROUPS)
def test_bytes_moved(groups: str) -> None:
    """Whole arrays, loops times their trips, an all-reduce twice, and single numbers left out."""
    whole, two = 8 * 4 * 4, (8 * 4 + 3) * 2
    expected = {"all-reduce": 2 * two, "reduce-scatter": 5 * whole, "all-gather": (1 + 5) * whole}
    text = PROGRAM.replace("GROUPS", groups)
    assert hlo.bytes_moved(hlo.parse(text), at_least=5) == expected
    assert hlo.bytes_moved(hlo.parse(text)) == expected | {"all-reduce": 2 * (two + 4)}


def test_what_is_no_program_is_refused() -> None:
    with pytest.raises(ValueError, match="entry"):
        hlo.parse("HloModule jit_step")


SCANNED = """HloModule jit_step, is_scheduled=true

%slice_of.1 (all.1: f32[12,64,8], i.1: s32[]) -> f32[1,64,8] {
  %all.1 = f32[12,64,8]{2,1,0} parameter(0)
  %i.1 = s32[] parameter(1)
  %zero.1 = s32[] constant(0)
  ROOT %one.1 = f32[1,64,8]{2,1,0} dynamic-slice(%all.1, %i.1, %zero.1, %zero.1), dynamic_slice_sizes={1,64,8}
}

ENTRY %main.3 (layers.1: f32[12,64,8], layer.1: s32[]) -> f32[1,64,8] {
  %layers.1 = f32[12,64,8]{2,1,0} parameter(0)
  %layer.1 = s32[] parameter(1)
  START
}
"""
ALONE = "ROOT %f.1 = f32[1,64,8]{2,1,0} fusion(%layers.1, %layer.1), kind=kLoop, calls=%slice_of.1"
BESIDE = """%f.1 = ((f32[12,64,8]{2,1,0}, s32[]), f32[1,64,8]{2,1,0}, u32[]) fusion-start(%layers.1, %layer.1), \
kind=kLoop, calls=%slice_of.1
  ROOT %d.1 = f32[1,64,8]{2,1,0} fusion-done(%f.1)"""


@pytest.mark.parametrize("start", [ALONE, BESIDE])
def test_a_fusion_that_runs_beside_others_moves_what_one_alone_does(start: str) -> None:
    """The slice, read and written, and its index; JAX 0.11 has such fusions in scanned layers."""
    program = hlo.parse(SCANNED.replace("START", start))
    found = [kernel_of(x, computation, program) for x, computation, _ in program.run()]
    assert [kernel.bytes for kernel in found if kernel is not None] == [2 * 64 * 8 * 4 + 4]


IN_PLACE = """HloModule jit_step, is_scheduled=true

%call_with_slice.1 (all.1: bf16[12,64,64], x.1: bf16[32,64]) -> bf16[32,64] {
  %all.1 = bf16[12,64,64]{2,1,0} parameter(0)
  %x.1 = bf16[32,64]{1,0} parameter(1)
  %layer.1 = bf16[1,64,64]{2,1,0} slice(%all.1), slice={[3:4], [0:64], [0:64]}
  %matrix.1 = bf16[64,64]{1,0} bitcast(%layer.1)
  ROOT %y.1 = bf16[32,64]{1,0} custom-call(%x.1, %matrix.1), custom_call_target="__cublas$gemm", \
backend_config={"gemm_backend_config":{"dot_dimension_numbers":{"lhs_contracting_dimensions":["1"]}}}
}

ENTRY %main.3 (layers.1: bf16[12,64,64], x.2: bf16[32,64]) -> bf16[32,64] {
  %layers.1 = bf16[12,64,64]{2,1,0} parameter(0)
  %x.2 = bf16[32,64]{1,0} parameter(1)
  %room.1 = bf16[32,64]{1,0} custom-call(), custom_call_target="AllocateBuffer"
  ROOT %f.1 = bf16[32,64]{1,0} fusion(%layers.1, %x.2), kind=kCustom, calls=%call_with_slice.1
}
"""


def test_a_librarys_kernel_that_reads_a_slice_where_it_stands() -> None:
    """Its products count, and the slice alone; room for a result is no kernel."""
    program = hlo.parse(IN_PLACE)
    found = [kernel_of(x, computation, program) for x, computation, _ in program.run()]
    (kernel,) = (x for x in found if x is not None)
    assert kernel.name == "f.1" and kernel.flops == 2 * 32 * 64 * 64
    assert kernel.bytes == 2 * (2 * 32 * 64 + 64 * 64)

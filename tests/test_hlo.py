"""jaxlm/plan/hlo.py: the bytes of collectives, however XLA writes the rest of an instruction."""

import pytest

from jaxlm.plan import hlo

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

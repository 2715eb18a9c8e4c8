"""float16's loss scale, update by update."""

import dataclasses

import jax.numpy as jnp
import pytest

from jaxlm.config import TrainingConfig
from jaxlm.train.precision import MAX_LOSS_SCALE, first_loss_scale, initial_loss_scale, next_loss_scale

FLOAT16 = TrainingConfig(amp_dtype="float16", loss_scale_window=3, loss_scale_hysteresis=2, min_loss_scale=4.0)


def scales(config, finite, start=None):
    """The scale after each update; `finite` has a "." for one without an overflow, an "x" for one with."""
    now = first_loss_scale(config, initial_loss_scale(config))
    if start is not None:
        now = dataclasses.replace(now, scale=jnp.float32(start))
    seen = []
    for update in finite:
        now = next_loss_scale(now, jnp.asarray(update == "."), config)
        seen.append(float(now.scale))
    return seen, int(now.exhausted)


@pytest.mark.parametrize(
    ("updates", "expected", "exhausted"),
    [
        ("......", [64, 64, 128, 128, 128, 256], 0),  # doubled after each window
        ("x", [64], 0),  # forgiven once
        ("xx", [64, 32], 0),
        ("xxx", [64, 32, 16], 0),  # not forgiven again
        ("x.x", [64, 64, 32], 0),  # a good update does not renew the tolerance
        ("x...x", [64, 64, 64, 128, 128], 0),  # growth does
        ("..x...", [64, 64, 64, 64, 64, 128], 0),  # an overflow starts the window anew
        ("xxxxxx", [64, 32, 16, 8, 4, 4], 1),  # the floor, and an overflow there
        ("xxxxxxx", [64, 32, 16, 8, 4, 4, 4], 2),
    ],
)
def test_the_dynamic_scale(updates, expected, exhausted):
    assert scales(FLOAT16, updates, start=64) == (expected, exhausted)


def test_the_scale_stops_growing():
    assert scales(FLOAT16, "...", start=MAX_LOSS_SCALE)[0][-1] == MAX_LOSS_SCALE


def test_a_fixed_scale_stays():
    assert scales(dataclasses.replace(FLOAT16, loss_scale=128.0), "..xx....") == ([128] * 8, 0)


@pytest.mark.parametrize("options", [{"amp_dtype": "bfloat16"}, {"use_amp": False}])
def test_other_types_have_no_scale(options):
    assert scales(dataclasses.replace(FLOAT16, **options), "...xxxxxx") == ([1] * 9, 0)

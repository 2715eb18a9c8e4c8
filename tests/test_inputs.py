"""Numbers as inputs: one program for runs that differ in nothing else, and each number reaches it."""

import dataclasses

import jax
import numpy as np
import pytest
from test_step import MODEL, assembled, config_of, make_batch, step_of

from jaxlm.config import replace_fields
from jaxlm.train import assemble
from jaxlm.train.numbers import INPUTS

OTHER = {
    "weight_decay": 0.3, "beta1": 0.5, "beta2": 0.7, "eps": 0.1, "muon_momentum": 0.5, "max_grad_norm": 0.01,
    "embedding_lr_ratio": 3.0, "ema_decay": 0.05, "min_loss_scale": 2.0**31,
    "loss_scale_window": 1, "loss_scale_hysteresis": 1, "seed": 7,
}  # fmt: skip
BASE = config_of(dataclasses.replace(MODEL, n_layers=1, dropout=0.1), optimizer="muon", weight_decay=0.1)
BASE = replace_fields(BASE, {"training.embedding_lr_ratio": 2.0, "training.ema_decay": 0.5})
FLOAT16 = {"training.use_amp": True, "training.amp_dtype": "float16", "training.initial_loss_scale_power": 10}
OVERFLOWS = replace_fields(BASE, FLOAT16 | {"training.initial_loss_scale_power": 31})  # at its first update


def after_updates(config, count=2):
    """The program, and the state and loss after `count` updates at a rate of 0.01."""
    program = assembled(config)
    numbers = program.numbers(config.training)
    state, metrics = program.init(numbers), None
    for _ in range(count):
        state, metrics = step_of(program)(state, make_batch(), {**numbers, "learning_rate": np.float32(0.01)})
    return program, jax.device_get((state, metrics["loss"]))


def differ(a, b):
    return not all(np.array_equal(x, y) for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True))


@pytest.mark.parametrize("name", OTHER)
def test_each_number_reaches_the_one_program(name):
    """Other numbers, the same program, another result; one that is built in would raise: it is a text there."""
    scale = name.startswith(("min_loss", "loss_scale"))
    base = OVERFLOWS if scale and name != "loss_scale_window" else replace_fields(BASE, FLOAT16 if scale else {})
    program, expected = after_updates(base)
    other_program, found = after_updates(replace_fields(base, {f"training.{name}": OTHER[name]}))
    assert other_program is program and differ(found, expected)
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(found[0]))


def test_a_program_that_is_shared_gives_the_bits_of_one_of_its_own():
    config = replace_fields(BASE, {"training.beta2": 0.9, "training.seed": 3, "training.learning_rate": 1.0})
    after_updates(BASE)
    _, shared = after_updates(config)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(assemble, "_assembled", assemble.Assembly)
        assert not differ(shared, after_updates(config)[1])


@pytest.mark.parametrize("fields", [{"training.weight_decay": 0.0}, {"training.max_grad_norm": None}])
def test_none_and_zero_are_another_program(fields):
    assert assembled(replace_fields(BASE, fields)) is not assembled(BASE)


def test_every_input_is_tried():
    assert set(OTHER) == {*INPUTS, "seed"}

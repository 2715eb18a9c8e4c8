"""Optimizers and schedules: against optax where it has them, against their papers where it hasn't."""

import dataclasses
import math
import operator

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from jaxlm.config import ModelConfig, TrainingConfig
from jaxlm.model import Transformer
from jaxlm.optim import SCHEDULES, build_optimizer, build_schedule, decay_mask, effective_warmup

MODEL = ModelConfig(vocab_size=61, d_model=32, n_heads=2, n_layers=2, d_ff=64, max_seq_len=24)
TRAINING = TrainingConfig(learning_rate=1e-2, warmup_steps=0, eps=1e-4)


def make_params():
    return nnx.to_pure_dict(nnx.state(Transformer(MODEL, rngs=nnx.Rngs(0))))


def rates_of(config, steps):
    schedule = jax.jit(build_schedule(config, steps))
    return np.array([float(schedule(jnp.asarray(s))) for s in range(steps)])


def assert_close(a, b, tolerance):
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_allclose(x, y, rtol=tolerance, atol=tolerance)


def test_adamw_is_optax_adamw():
    config = dataclasses.replace(TRAINING, weight_decay=0.1, max_grad_norm=None, decay_embeddings=True)
    params = make_params()
    grads = jax.tree.map(lambda p: jnp.cos(7 * p), params)
    theirs = optax.adamw(1e-2, 0.9, 0.999, 1e-4, weight_decay=0.1, mask=decay_mask(params, True))
    expected, _ = theirs.update(grads, theirs.init(params), params)
    ours = build_optimizer(config)
    updates, _ = ours.update(grads, ours.init(params), params)
    assert_close(jax.tree.map(lambda u: -1e-2 * u, updates), expected, 1e-7)


def test_decay_leaves_out_biases_and_norms():
    params = make_params()
    flat = {
        jax.tree_util.keystr(path): value
        for path, value in jax.tree_util.tree_leaves_with_path(decay_mask(params, True))
    }
    assert {name for name, decays in flat.items() if decays} == {
        "['blocks']['attention']['qkv']['kernel']",
        "['blocks']['attention']['out']['kernel']",
        "['blocks']['mlp']['up']['kernel']",
        "['blocks']['mlp']['down']['kernel']",
        "['token_embedding']",
        "['position_embedding']",
    }
    assert not decay_mask(params, False)["token_embedding"]


@pytest.mark.parametrize("name", sorted(SCHEDULES))
def test_schedule_shape(name):
    config = dataclasses.replace(TRAINING, lr_scheduler=name, warmup_steps=10, learning_rate=2.0, min_lr_ratio=0.1)
    rates = rates_of(config, 200)
    assert np.all(np.diff(rates[:10]) > 0) and rates[0] > 0
    assert rates[10] == pytest.approx(2.0)
    assert np.all(np.diff(rates[10:]) <= 1e-7)
    assert rates[-1] == pytest.approx(2.0 if name == "constant" else 0.2)
    if name == "cosine":
        assert rates[10 + 189 // 2] == pytest.approx(1.1, abs=0.02)


@pytest.mark.parametrize(("asked", "steps", "warmup"), [(2000, 100, 10), (5, 100, 5), (10, 1, 0), (0, 50, 0)])
def test_warmup_is_at_most_a_tenth(asked, steps, warmup):
    config = dataclasses.replace(TRAINING, warmup_steps=asked)
    assert effective_warmup(config, steps) == warmup
    rates = rates_of(config, steps)
    assert max(rates) == pytest.approx(TRAINING.learning_rate)


def test_lamb_is_optax_lamb_of_each_layer():
    """optax takes a leaf for one parameter: given the layers apart, it must say what ours says of them stacked."""
    config = dataclasses.replace(TRAINING, optimizer="lamb", weight_decay=0.1, max_grad_norm=None)
    params = make_params()
    params["blocks"] = jax.tree.map(  # or the layers' norms would be alike
        lambda x: x * jnp.arange(1.0, 3.0).reshape(2, *[1] * (x.ndim - 1)), params["blocks"]
    )
    grads = jax.tree.map(lambda p: jnp.cos(7 * p), params)

    def apart(tree):
        layers = [jax.tree.map(operator.itemgetter(layer), tree["blocks"]) for layer in range(MODEL.n_layers)]
        return {**tree, "blocks": layers}

    theirs = optax.lamb(1.0, 0.9, 0.999, 1e-4, weight_decay=0.1, mask=lambda tree: decay_mask(tree, True))
    expected, _ = theirs.update(apart(grads), theirs.init(apart(params)), apart(params))
    ours = build_optimizer(dataclasses.replace(config, decay_embeddings=True))
    updates, _ = ours.update(grads, ours.init(params), params)
    assert_close(apart(jax.tree.map(jnp.negative, updates)), expected, 1e-6)


def test_warmup_from_a_fraction_and_by_the_logarithm():
    config = dataclasses.replace(TRAINING, warmup_steps=10, learning_rate=1.0, warmup_min_ratio=0.5)
    linear = rates_of(config, 100)[:11]
    np.testing.assert_allclose(linear, 0.5 + 0.5 * np.arange(1, 12) / 11, rtol=1e-6)
    log = rates_of(dataclasses.replace(config, warmup_shape="log"), 100)[:11]
    np.testing.assert_allclose(log, 0.5 + 0.5 * np.log(np.arange(2, 13)) / math.log(12), rtol=1e-6)


@pytest.mark.parametrize("end", [50, 400])
def test_the_schedule_may_end_elsewhere_than_the_run(end):
    config = dataclasses.replace(TRAINING, schedule_steps=end, lr_scheduler="linear", min_lr_ratio=0.1)
    rates = rates_of(config, 100) / TRAINING.learning_rate
    expected = 1 - 0.9 * np.minimum(np.arange(100) / (end - 1), 1)
    np.testing.assert_allclose(rates, expected, rtol=1e-5)

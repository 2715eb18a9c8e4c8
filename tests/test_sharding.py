"""ZeRO, hybrid and tensor layouts: the same training, the bytes that theory says, and what planted faults do to it."""

import argparse
import dataclasses
import importlib
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import slow
from jax.sharding import NamedSharding
from test_step import (
    MODEL,
    STILL,
    assembled,
    assert_close,
    config_of,
    make_batch,
    masked,
    regroup,
    run,
    start,
    step_with,
)

from jaxlm.errors import UserError
from jaxlm.parallel.layout import HOST_MEMORY, Layout
from jaxlm.parallel.mesh import TRAIN_BATCH, abstract_mesh, make_mesh, replicated
from jaxlm.parallel.split import Split, split_parameter

ROOT = Path(__file__).parents[1]
UNEVEN = dataclasses.replace(MODEL, d_model=36, d_ff=50, n_heads=2)  # 4 divides few of its axes
MODERN = dataclasses.replace(
    STILL,
    n_heads=4,
    n_kv_heads=2,
    norm="rmsnorm",
    activation="swiglu",
    use_bias=False,
    positions="rotary",
    qk_norm=True,
    logit_softcap=5.0,
    value_embedding=True,
    tie_embeddings=False,
)
SPEEDRUN = dataclasses.replace(MODERN, activation="relu2", norm_scale=False, zero_init_outputs=True)
# 4 divides none; adafactor factors from 128 on, and would enlarge what rounding makes of the keys' biases' gradient, 0.
WIDE = dataclasses.replace(STILL, d_model=130, d_ff=150, use_bias=False)
BATCHES = [regroup(make_batch(seed=s), 2) for s in range(3)]
LAYOUTS = [
    *(slow(MODEL, ((1, 4, 1), stage)) for stage in range(3)),
    (MODEL, ((1, 4, 1), 3)),
    (MODEL, ((2, 2, 1), 2, True)),  # optimizer state in host memory
    (UNEVEN, ((2, 2, 1), 3)),
]


def on_mesh(batches, shape):
    placement = NamedSharding(make_mesh(jax.devices()[:4], shape), TRAIN_BATCH)
    return [jax.device_put(batch, placement) for batch in batches]


def whole(params, shape, stage, config):
    """Parameters with their own shapes, on the host: no program is compiled to cut the padding off."""
    crop = lambda x, whole: x[tuple(map(slice, whole.shape))]  # noqa: E731
    return jax.tree.map(crop, jax.device_get(params), assembled(config, shape, stage).layout.shapes)


@pytest.mark.parametrize(("model", "layout"), LAYOUTS)
def test_layouts_do_not_change_the_update(model, layout):
    """Losses and parameters of one device, to float32 rounding, dropout and accumulation on."""
    config = config_of(model)
    expected, expected_losses, expected_metrics = run(config, BATCHES)
    state, losses, metrics = run(config, on_mesh(BATCHES, layout[0]), *layout)
    np.testing.assert_allclose(losses, expected_losses, rtol=1e-5)
    assert float(metrics["grad_norm"]) == pytest.approx(float(expected_metrics["grad_norm"]), rel=1e-3)
    assert_close(whole(state.params, *layout[:2], config), jax.device_get(expected.params), 1e-5)


@pytest.mark.slow
def test_what_is_learned_is_the_same_in_any_layout():
    """As above, with a loss_mask, over "data" and "tensor"."""
    config, layout = config_of(MODEL), ((1, 2, 2), 3)
    batches = [regroup(masked(make_batch(seed=s), s), 2) for s in range(3)]
    expected, expected_losses, expected_metrics = run(config, batches)
    state, losses, metrics = run(config, on_mesh(batches, layout[0]), *layout)
    np.testing.assert_allclose(losses, expected_losses, rtol=1e-5)
    assert float(metrics["grad_norm"]) == pytest.approx(float(expected_metrics["grad_norm"]), rel=1e-3)
    assert_close(whole(state.params, *layout[:2], config), jax.device_get(expected.params), 1e-5)


@pytest.mark.parametrize(
    ("optimizer", "model", "layout"),
    [
        slow("normuon", SPEEDRUN, ((1, 2, 2), 3)),
        slow("adafactor", WIDE, ((1, 4, 1), 1)),
    ],
)
def test_optimizers_of_whole_matrices_know_them_in_any_layout(optimizer, model, layout):
    config = config_of(model, optimizer=optimizer, z_loss=1e-3, ema_decay=0.9, muon_coefficients="polar_express")
    expected, expected_losses, _ = run(config, BATCHES)
    state, losses, _ = run(config, on_mesh(BATCHES, layout[0]), *layout)
    np.testing.assert_allclose(losses, expected_losses, rtol=1e-5)
    assert_close(whole(state.params, *layout, config), jax.device_get(expected.params), 2e-5)
    averages = [s.opt_state.average for s in (state, expected)]
    assert_close(whole(averages[0], *layout, config), jax.device_get(averages[1]), 2e-5)


@pytest.mark.parametrize(
    ("stage", "fault"),
    [
        slow(0, ("reduce_update", lambda self, gradients: gradients)),
        slow(1, ("reduce_update", lambda self, g: self._map(lambda s, x: own_part(s, x), g))),
        slow(2, ("reduce_micro_batch", lambda self, g: self._map(lambda s, x: own_part(s, x), g))),
        (3, ("sum_over", lambda self, axes, tree: tree)),
    ],
)
def test_a_missing_reduction_is_noticed(monkeypatch, stage, fault):
    """The fault that the test above is for: each device going on with the gradients of its own rows."""
    model, shape = (UNEVEN, (2, 2, 1)) if stage == 3 else (MODEL, (1, 4, 1))  # whose states and losses are there
    config = config_of(model)
    (_, expected, _), (_, state) = run(config, BATCHES), start(config, shape, stage)
    monkeypatch.setattr(Layout, *fault)
    step = step_with(config, assembled(config, shape, stage).jit_step(donate=False))  # nobody else may get this one
    losses = []
    for batch in on_mesh(BATCHES, shape):
        state, metrics = step(state, batch)
        losses.append(float(metrics["loss"]))
    monkeypatch.undo()
    with pytest.raises(AssertionError):
        np.testing.assert_allclose(losses, expected, rtol=1e-5)


def own_part(split: Split, gradient: jax.Array) -> jax.Array:
    index = jax.lax.axis_index("data") * (split.padded_size // split.shards)
    return jax.lax.dynamic_slice_in_dim(split.pad(gradient), index, split.padded_size // split.shards, split.axis)


def bytes_on_first_device(tree):
    first = jax.devices()[0]
    return sum(s.data.nbytes for x in jax.tree.leaves(tree) for s in x.addressable_shards if s.device == first)


@pytest.mark.parametrize(("stage", "parts"), [slow(0, (1, 1)), slow(1, (1, 4)), (2, (1, 4)), (3, (4, 4))])
def test_bytes_a_device_are_those_of_theory(stage, parts):
    state = start(config_of(MODEL), (1, 4, 1), stage)[1]
    parameters = sum(x.size for x in jax.tree.leaves(start(config_of(MODEL))[1].params))
    assert bytes_on_first_device(state.params) == pytest.approx(4 * parameters / parts[0], rel=0.02)
    assert bytes_on_first_device(state.opt_state) == pytest.approx(8 * parameters / parts[1], rel=0.02)
    after, _, _ = run(config_of(MODEL), on_mesh(BATCHES[:1], (1, 4, 1)), (1, 4, 1), stage)
    for held, moved in zip(jax.tree.leaves(state), jax.tree.leaves(after), strict=True):
        assert moved.sharding.is_equivalent_to(held.sharding, held.ndim), "the layout is that of the next update"


def test_an_unsharded_leaf_is_noticed(monkeypatch):
    """The fault that the test above is for."""
    place = Layout.place

    def forgetful(self, abstract):
        spread = replicated(self.mesh)
        forget = lambda path, x: x.update(sharding=spread) if "token" in str(path) else x  # noqa: E731
        return jax.tree_util.tree_map_with_path(forget, place(self, abstract))

    monkeypatch.setattr(Layout, "place", forgetful)
    state = start.__wrapped__(config_of(MODEL), (1, 4, 1), 3)[1]
    parameters = sum(x.size for x in jax.tree.leaves(start(config_of(MODEL))[1].params))
    assert bytes_on_first_device(state.params) > 1.02 * 4 * parameters / 4


def test_offloaded_state_stays_in_host_memory():
    state, _, _ = run(config_of(MODEL), on_mesh(BATCHES[:1], (2, 2, 1)), (2, 2, 1), 2, True)
    moments = [x for x in jax.tree.leaves(state.opt_state) if x.ndim]
    assert moments and {x.sharding.memory_kind for x in moments} == {HOST_MEMORY}


@pytest.mark.parametrize(("name", "shape"), [("temperature", ()), ("blocks/gate", (12,))])
def test_a_parameter_without_an_axis_is_refused_by_name(name, shape):
    """Only models of one's own can have one."""
    path = tuple(jax.tree_util.DictKey(key) for key in name.split("/"))
    with pytest.raises(UserError, match=rf"^the parameter {name} has no axis"):
        split_parameter(path, shape, 1)


@pytest.mark.parametrize("shards", [1, 2, 3, 5, 7, 8, 64])
@pytest.mark.parametrize("shape", [(12, 768, 3, 768), (12, 768), (50257, 768), (4099, 100), (2, 7)])
def test_splitting_wastes_next_to_nothing(shards, shape):
    """Whatever the devices: an axis of its own is split, with less than one row of padding a shard."""
    name = {4: "blocks/attention/qkv/kernel", 2: "token_embedding"}[len(shape)] if shape[0] != 12 else "blocks/x/bias"
    path = tuple(jax.tree_util.DictKey(key) for key in name.split("/"))
    split = split_parameter(path, shape, shards)
    assert split.padded_size % shards == 0 and 0 <= split.padded_size - shape[split.axis] < shards
    assert not (name.startswith("blocks") and split.axis == 0), "layers are gathered one by one"
    padded = jax.eval_shape(split.pad, jax.ShapeDtypeStruct(split.shape, jnp.int8))
    assert padded.shape == split.placed(abstract_mesh((1, 1, 1)), sharded=True).shape
    assert jax.eval_shape(split.crop, padded).shape == shape


@pytest.mark.slow
def test_the_benchmark_finds_what_theory_says(monkeypatch):
    """benchmarks/collectives.py on 4 devices: bytes held within 2%, moved at most theory's, losses to rounding."""
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    collectives = importlib.import_module("collectives")
    options = argparse.Namespace(steps=2, rows=32, d_model=64, n_layers=2, vocab_size=512)
    reference = collectives.measure(collectives.Case((1, 1, 1), 0, 1), options)
    cases = collectives.cases_named("^(stage 1|hybrid, stage 3), K=4", 4)
    assert len(cases) == 2
    for case in cases:
        result = collectives.measure(case, options)
        np.testing.assert_allclose(result["losses"], reference["losses"], rtol=1e-5)
        assert sum(result["held"].values()) == pytest.approx(sum(result["theory_held"].values()), rel=0.02)
        assert 0.9 * result["theory_moved"] < sum(result["moved"].values()) < 1.01 * result["theory_moved"]

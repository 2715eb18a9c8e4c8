"""Optimizers and schedules: against optax where it has them, against their papers where it hasn't."""

import dataclasses
import functools
import math
import operator
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import optax.contrib
import pytest
from conftest import slow
from flax import nnx

from jaxlm.config import Config, ModelConfig, TrainingConfig, validate
from jaxlm.config.schema import FROM_OPTAX
from jaxlm.config.unused import NEEDS
from jaxlm.errors import UserError
from jaxlm.model import Transformer
from jaxlm.train.average import next_average
from jaxlm.train.optim import NEWTON_SCHULZ, OPTIMIZERS, build_optimizer, decay_mask
from jaxlm.train.schedules import SCHEDULES, build_schedule, effective_warmup

MODEL = ModelConfig(vocab_size=61, d_model=32, n_heads=2, n_layers=2, d_ff=64, max_seq_len=24)
TRAINING = TrainingConfig(learning_rate=1e-2, warmup_steps=0, eps=1e-4)


@functools.cache
def make_params(model=MODEL):
    return nnx.to_pure_dict(nnx.state(Transformer(model, rngs=nnx.Rngs(0))))


def rates_of(config, steps):
    schedule = build_schedule(config, steps)
    return np.array([schedule(step) for step in range(steps)])


def assert_close(a, b, tolerance):
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_allclose(x, y, rtol=tolerance, atol=tolerance)


def test_adamw_is_optax_adamw():
    config = dataclasses.replace(TRAINING, weight_decay=0.1, max_grad_norm=None, decay_embeddings=True)
    params = make_params()
    grads = jax.tree.map(lambda p: jnp.cos(7 * p), params)
    theirs = optax.adamw(1e-2, 0.9, 0.999, 1e-4, weight_decay=0.1, mask=decay_mask(params, True))
    expected, updates = first_update(theirs, grads, params), first_update(build_optimizer(config), grads, params)
    assert_close(jax.tree.map(lambda u: -1e-2 * u, updates), expected, 1e-7)


def first_update(rule, grads, params):
    return jax.jit(lambda grads, params: rule.update(grads, rule.init(params), params)[0])(grads, params)


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


def test_decay_of_modern_blocks():
    model = dataclasses.replace(MODEL, norm="rmsnorm", activation="swiglu", n_kv_heads=1, qk_norm=True, use_bias=False)
    params = nnx.eval_shape(lambda: nnx.state(Transformer(model, rngs=nnx.Rngs(0))))
    mask = jax.tree_util.tree_leaves_with_path(decay_mask(nnx.to_pure_dict(params), True))
    names = {decays: {"/".join(e.key for e in path) for path, d in mask if d == decays} for decays in (True, False)}
    kernels = {
        f"blocks/{name}/kernel" for name in ("attention/q", "attention/kv", "attention/out", "mlp/up", "mlp/down")
    }
    assert names[True] == kernels | {"token_embedding", "position_embedding"}
    norms = {"blocks/attention/q_norm", "blocks/attention/k_norm", "blocks/norm1", "blocks/norm2", "final_norm"}
    assert names[False] == {f"{name}/scale" for name in norms}


@pytest.mark.parametrize("name", sorted(SCHEDULES))
def test_schedule_shape(name):
    config = dataclasses.replace(TRAINING, lr_scheduler=name, warmup_steps=10, learning_rate=2.0, min_lr_ratio=0.1)
    rates = rates_of(config, 200)
    assert np.all(np.diff(rates[:10]) > 0) and rates[0] > 0
    assert rates[10] == pytest.approx(2.0)
    assert np.all(np.diff(rates[10:]) <= 1e-7)
    assert rates[-1] == pytest.approx(2.0 if name == "constant" else 0.2, rel=1e-5)
    if name == "cosine":
        assert rates[10 + 189 // 2] == pytest.approx(1.1, abs=0.02)


@pytest.mark.parametrize(("asked", "steps", "warmup"), [(2000, 100, 10), (5, 100, 5), (10, 1, 0), (0, 50, 0)])
def test_warmup_is_at_most_a_tenth(asked, steps, warmup):
    config = dataclasses.replace(TRAINING, warmup_steps=asked)
    assert effective_warmup(config, steps) == warmup
    rates = rates_of(config, steps)
    assert max(rates) == pytest.approx(TRAINING.learning_rate)


@pytest.mark.parametrize("name", [name for name in NEEDS if NEEDS[name][0] == "training.lr_scheduler"])
def test_which_schedule_an_option_is_for(name):
    for scheduler in SCHEDULES:
        config = dataclasses.replace(TRAINING, lr_scheduler=scheduler, warmup_steps=2, min_lr_ratio=0.2)
        other = dataclasses.replace(config, **{name.partition(".")[2]: 0.7})
        assert np.array_equal(rates_of(config, 40), rates_of(other, 40)) == (scheduler not in NEEDS[name][1])


@pytest.mark.parametrize("name", [name for name in NEEDS if NEEDS[name][0] == "training.optimizer"])
def test_which_optimizer_an_option_is_for(name):
    """Two updates of each with another value: others where the table says that it is used, and only there."""
    kernels = jnp.cos(jnp.arange(2.0 * 4 * 3)).reshape(2, 4, 3)
    params = {"blocks": {"mlp": {"kernel": kernels}}, "token_embedding": jnp.sin(jnp.arange(15.0)).reshape(5, 3)}

    def updates(config):
        rule, found = build_optimizer(config), []
        state = rule.init(params)
        grads = jax.tree.map(jnp.cos, params)
        for factor in (1.0, -0.001, 1.0, -0.01):  # whose signs lion changes as either of its decays says
            update, state = rule.update(optax.tree.scale(factor, grads), state, params)
            found += jax.tree.leaves(update)
        return found

    value = "polar_express" if name == "training.muon_coefficients" else 0.5
    for optimizer in OPTIMIZERS:
        config = dataclasses.replace(TRAINING, optimizer=optimizer)
        pairs = zip(
            updates(config), updates(dataclasses.replace(config, **{name.partition(".")[2]: value})), strict=True
        )
        assert all(np.array_equal(*pair) for pair in pairs) == (optimizer not in NEEDS[name][1]), optimizer


def test_lamb_is_optax_lamb_of_each_layer():
    """optax takes a leaf for one parameter: given the layers apart, it must say what ours says of them stacked."""
    config = dataclasses.replace(TRAINING, optimizer="lamb", weight_decay=0.1, max_grad_norm=None)
    params = unlike_layers(MODEL)
    grads = jax.tree.map(lambda p: jnp.cos(7 * p), params)
    theirs = optax.lamb(1.0, 0.9, 0.999, 1e-4, weight_decay=0.1, mask=lambda tree: decay_mask(tree, True))
    expected = first_update(theirs, apart(grads), apart(params))
    updates = first_update(build_optimizer(dataclasses.replace(config, decay_embeddings=True)), grads, params)
    assert_close(apart(jax.tree.map(jnp.negative, updates)), expected, 1e-6)


def unlike_layers(model):
    """Parameters; those of the second layer are twice as large, or the layers' norms would be alike."""
    params = make_params(model)
    larger = lambda x: x * np.arange(1, 3, dtype=np.float32).reshape(2, *[1] * (x.ndim - 1))  # noqa: E731
    return params | {"blocks": jax.tree.map(lambda x: larger(np.asarray(x)), params["blocks"])}


def apart(tree):
    """The layers one by one."""
    layers = [jax.tree.map(operator.itemgetter(layer), tree["blocks"]) for layer in range(MODEL.n_layers)]
    return {**tree, "blocks": layers}


def two_updates(rule, params):
    state = rule.init(params)
    for i in (7, 8):
        grads = jax.tree.map(lambda p, i=i: jnp.cos(i * p), params)
        updates, state = rule.update(grads, state, params)
    return updates


def test_muon_is_optax_muon_of_each_single_matrix():
    """Queries, keys, values, gates, each layer's: every one a matrix of its own; embeddings, norms, biases by Adam."""
    model = dataclasses.replace(MODEL, activation="swiglu")
    params = make_params(model)
    config = dataclasses.replace(TRAINING, optimizer="muon", weight_decay=0.1, max_grad_norm=None)
    updates = jax.jit(lambda p: two_updates(build_optimizer(config), p))(params)
    muon = optax.contrib.muon(1.0, beta=0.95, consistent_rms=0.2)
    alone = jax.jit(lambda matrix: two_updates(muon, {"x": matrix})["x"])
    for path, p in jax.tree_util.tree_leaves_with_path(params["blocks"]):
        found = functools.reduce(lambda tree, key: tree[key.key], path, updates["blocks"])
        if path[-1].key != "kernel":
            continue
        matrices = p[:, :, None] if p.ndim == 3 else p
        found = found[:, :, None] if p.ndim == 3 else found
        for layer in range(p.shape[0]):
            for n in range(matrices.shape[2]):
                own = matrices[layer, :, n]
                assert_close(found[layer, :, n], -alone(own) + 0.1 * own, 1e-4)
    adam = two_updates(optax.adam(1.0, 0.9, 0.999, 1e-4), params)
    assert_close(updates["final_norm"], jax.tree.map(jnp.negative, adam["final_norm"]), 1e-5)
    assert_close(updates["token_embedding"], -adam["token_embedding"] + 0.1 * params["token_embedding"], 1e-5)


def in_numpy(gradients, coefficients, beta1, beta2, normalised):
    """Muon's, or NorMuon's, last step for a matrix [outputs, inputs], as their papers write them, in float64."""
    momentum, second = np.zeros(gradients[0].shape), np.zeros((len(gradients[0]), 1))
    for i, g in enumerate(gradients, 1):
        momentum = beta1 * momentum + (1 - beta1) * g
        ahead = beta1 * momentum / (1 - beta1 ** (i + 1)) + (1 - beta1) * g / (1 - beta1**i)  # as optax has Nesterov's
        x = ahead / np.linalg.norm(ahead)
        for a, b, c in coefficients:
            square = x @ x.T
            x = a * x + (b * square + c * square @ square) @ x
        second = beta2 * second + (1 - beta2) * (x * x).mean(1, keepdims=True)
    if not normalised:
        return 0.2 * max(x.shape) ** 0.5 * x
    x = x / np.sqrt(second)
    return 0.2 * np.sqrt(x.size) * x / np.linalg.norm(x)


@pytest.mark.parametrize("name", ["muon", "normuon"])
@pytest.mark.parametrize("coefficients", sorted(NEWTON_SCHULZ))
def test_muon_and_normuon_are_their_papers(name, coefficients):
    """Of each matrix [inputs, outputs] alone, the three of a kernel [inputs, 3, outputs], too."""
    config = dataclasses.replace(
        TRAINING, optimizer=name, muon_coefficients=coefficients, weight_decay=0.0, max_grad_norm=None, beta2=0.9
    )
    params = make_params()
    updates = jax.jit(lambda p: two_updates(build_optimizer(config), p))(params)["blocks"]
    iterations = np.broadcast_to(np.array(NEWTON_SCHULZ[coefficients]), (5, 3))
    for part, layer in (("qkv", 0), ("qkv", 1), ("out", 1)):
        kernel = params["blocks"]["attention"][part]["kernel"][layer]
        for which in [(slice(None), n) for n in range(3)] if part == "qkv" else [...]:
            gradients = [np.cos(i * np.asarray(kernel[which], np.float64)).T for i in (7, 8)]
            expected = in_numpy(gradients, iterations, 0.95, 0.9, name == "normuon")
            found = updates["attention"][part]["kernel"][layer][which].T
            np.testing.assert_allclose(found, expected, atol=2e-3 * np.abs(expected).max())


def test_polar_express_is_nearer_to_orthogonal():
    """Singular values from a hundredth of the largest on: within 0.15 of 1 after five iterations, Jordan's 0.3."""
    values = np.geomspace(0.01, 1, 50)
    off = {}
    for name, coefficients in NEWTON_SCHULZ.items():
        x = values
        for a, b, c in np.broadcast_to(np.array(coefficients), (5, 3)):
            x = a * x + b * x**3 + c * x**5
        off[name] = np.abs(x - 1).max()
    assert off["polar_express"] < 0.15 < 0.3 < off["jordan"]


def test_cautious_decay_is_for_weights_that_the_update_makes_smaller():
    config = dataclasses.replace(TRAINING, weight_decay=0.1, max_grad_norm=None)
    params = make_params()
    grads = jax.tree.map(lambda p: jnp.cos(7 * p) - 0.99, params)
    without, all_of_it, cautious = (
        first_update(build_optimizer(dataclasses.replace(config, **options)), grads, params)
        for options in ({"weight_decay": 0.0}, {}, {"cautious_decay": True})
    )
    choose = lambda p, u, decayed: jnp.where(u * p > 0, decayed, u)  # noqa: E731
    assert_close(cautious, jax.tree.map(choose, params, without, all_of_it), 1e-7)
    kernel = lambda tree: tree["blocks"]["mlp"]["up"]["kernel"]  # noqa: E731
    shrunk = np.mean(np.asarray(kernel(cautious) != kernel(without)))
    assert 0.2 < shrunk < 0.8


@pytest.mark.parametrize("name", ["adam", "sgd"])
def test_cautious_decay_is_decoupled(name):
    with pytest.raises(UserError, match=rf"^training.cautious_decay is for decoupled .* \({name}\) has not; use"):
        validate(Config(training=dataclasses.replace(TRAINING, optimizer=name, cautious_decay=True)))


def test_embeddings_have_a_learning_rate_of_their_own():
    params = make_params()
    grads = jax.tree.map(lambda p: jnp.cos(7 * p), params)
    one, five = (
        first_update(build_optimizer(dataclasses.replace(TRAINING, embedding_lr_ratio=ratio)), grads, params)
        for ratio in (None, 5.0)
    )
    factors = jax.tree_util.tree_map_with_path(
        lambda path, _: 5.0 if path[-1].key in ("token_embedding", "position_embedding") else 1.0, one
    )
    assert_close(five, jax.tree.map(operator.mul, one, factors), 1e-6)


def test_average_of_parameters():
    """As the published rule says, written out; a decay of its own matters once (1 + n) / (10 + n) has reached it."""
    path = np.random.default_rng(0).normal(size=(40, 3)).astype(np.float32)
    average, expected = {"x": jnp.asarray(path[0])}, path[0].astype(np.float64)
    for n, moved in enumerate(path[1:]):
        average = next_average(average, {"x": jnp.asarray(moved)}, 0.7, jnp.int32(n))
        decay = min(0.7, (1 + n) / (10 + n))
        expected = decay * expected + (1 - decay) * moved
    np.testing.assert_allclose(average["x"], expected, rtol=1e-5)


@pytest.mark.parametrize("name", ["adafactor", slow("optax.lars"), slow("optax.adabelief")])
@pytest.mark.slow
def test_optax_sees_each_layer_alone(name):
    """Adafactor's factored moments of matrices of 128 and more, too."""
    params = unlike_layers(dataclasses.replace(MODEL, d_model=128, d_ff=130))
    mask = lambda tree: decay_mask(tree, True)  # noqa: E731
    theirs = {
        "adafactor": optax.chain(optax.adafactor(), optax.add_decayed_weights(-0.1, mask=mask)),
        "optax.lars": optax.lars(1.0, 0.1, weight_decay_mask=mask),
        "optax.adabelief": optax.chain(optax.adabelief(1.0, eps=1e-4), optax.add_decayed_weights(-0.1, mask=mask)),
    }[name]
    config = dataclasses.replace(TRAINING, optimizer=name, weight_decay=0.1, max_grad_norm=None)
    expected = jax.jit(lambda p: two_updates(theirs, p))(apart(params))
    updates = jax.jit(lambda p: two_updates(build_optimizer(config), p))(params)
    assert_close(apart(jax.tree.map(jnp.negative, updates)), expected, 1e-5)


@pytest.mark.parametrize("name", [slow("muon"), "normuon", "adafactor"])
def test_padding_changes_no_update(name):
    config = dataclasses.replace(TRAINING, optimizer=name, max_grad_norm=None)
    params = make_params()
    shapes = jax.eval_shape(lambda: params)
    pad = lambda x: jnp.pad(x, [(0, 3 if i == x.ndim - 1 else 0) for i in range(x.ndim)])  # noqa: E731

    def updates(shapes, pad=pad):
        rule = build_optimizer(config, shapes)
        grads = jax.tree.map(lambda p: pad(jnp.cos(7 * p)), params)
        return jax.jit(lambda p: rule.update(grads, rule.init(p), p)[0])(jax.tree.map(pad, params))

    expected = jax.tree.map(pad, updates(shapes, pad=lambda x: x))
    assert_close(updates(shapes), expected, 1e-5)
    with pytest.raises(AssertionError):  # the fault that this is for: taking padding for numbers
        assert_close(updates(None), expected, 1e-5)


@pytest.mark.parametrize("name", ["optax.adabeleif", "optax.scale_by_adam", "optax.*", "optax.prodigy", "optax.lbfgs"])
def test_optimizers_that_do_not_fit_are_refused(name):
    with pytest.raises(UserError, match=rf"^training.optimizer \({re.escape(name)}\) is not one of adamw, adam"):
        validate(Config(training=dataclasses.replace(TRAINING, optimizer=name)))


def moved_by(name, leaves, inside, outside):
    """The steps of an optimizer of optax, and whatever its state shares between parameters."""
    factory = getattr(optax, name, None) or getattr(optax.contrib, name)
    rule, params = factory(inside), {key: {"kernel": jnp.asarray(x)} for key, x in leaves.items()}
    start, state, steps = params, factory(inside).init(params), jax.tree.map(jnp.zeros_like, params)
    for i in range(5):
        gradients = jax.tree.map(lambda x, i=i: jnp.sign(x) + 0.1 * jnp.cos(7 * i + x), start)
        updates, state = rule.update(gradients, state, params)
        params, steps = (jax.tree.map(lambda x, u: x + outside * u, tree, updates) for tree in (params, steps))
    return steps, [x for x in jax.tree.leaves(state) if x.ndim == 0 and jnp.issubdtype(x.dtype, jnp.floating)]


def fits(name):
    """Steps are in proportion to the learning rate, and each parameter is treated by itself."""
    a, b = np.linspace(-1, 2, 12, dtype=np.float32).reshape(3, 4), np.linspace(1, 4, 5, dtype=np.float32)
    both, shared = moved_by(name, {"a": a, "b": b}, 0.5, 1.0)
    apart = moved_by(name, {"a": a}, 1.0, 0.5)[0] | moved_by(name, {"b": b}, 1.0, 0.5)[0]
    pairs = zip(jax.tree.leaves(both), jax.tree.leaves(apart), strict=True)
    return not shared and all(np.allclose(x, y, 1e-3, 0) for x, y in pairs)


@pytest.mark.slow
def test_the_optimizers_of_optax_that_are_offered_fit():
    assert [name for name in FROM_OPTAX if not fits(name)] == []
    assert not fits("prodigy") and not fits("fromage")  # the faults that this is for


def test_wsd_falls_at_the_end_alone():
    config = dataclasses.replace(
        TRAINING, lr_scheduler="wsd", decay_fraction=0.25, learning_rate=1.0, min_lr_ratio=0.2, warmup_steps=4
    )
    rates = rates_of(config, 45)
    np.testing.assert_allclose(rates[:5], np.arange(1, 6) / 5, rtol=1e-6)
    np.testing.assert_allclose(rates[4:35], 1, rtol=1e-6)
    np.testing.assert_allclose(rates[34:], np.linspace(1, 0.2, 11), rtol=1e-5)


@pytest.mark.parametrize("name", ["optax.galore", "adafactor"])
@pytest.mark.parametrize("trained", ["blocks", "token_embedding"])
def test_either_blocks_or_the_rest_may_be_frozen(name, trained):
    params = {trained: {"kernel": jnp.ones((2, 4, 4))}}
    updates = first_update(build_optimizer(dataclasses.replace(TRAINING, optimizer=name)), params, params)
    assert float(jnp.abs(updates[trained]["kernel"]).min()) > 0


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

"""The kernels for norms and for the loss, interpreted on CPU, against plain JAX."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import make_config, slow
from test_step import HALF, STILL, config_of, make_batch

from jaxlm import Trainer
from jaxlm.config import replace_fields
from jaxlm.ops.matmul import matmul
from jaxlm.ops.norm_kernels import BACKWARD, LARGEST_WIDTH, Factors, Terms, multiply_norm, normalise_by_kernels
from jaxlm.ops.norms import normalise_sum
from jaxlm.ops.own_kernels import LOSS, NORMS, choose_kernels, left_to_xla
from jaxlm.ops.softmax_kernel import LARGEST_VOCABULARY
from jaxlm.parallel.mesh import make_mesh
from jaxlm.train.assemble import Resolved, assemble
from jaxlm.train.loss import loss_sums
from jaxlm.train.numbers import run_numbers
from jaxlm.train.step import make_gradients

BOTH = frozenset({NORMS, LOSS})
TERMS = {"one term": (0, 0), "an update": (1, 0), "an update with a bias": (1, 1)}


def array(seed, *shape, dtype=jnp.float32):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), dtype)


def terms_and_factors(b, t, d, which, scaled=True, biased=True, dtype=jnp.float32):
    update, bias = TERMS[which]
    terms = Terms(array(1, b, t, d, dtype=dtype), *(None,) * 2)
    terms = terms._replace(update=array(2, b, t, d, dtype=dtype) if update else None)
    terms = terms._replace(bias=array(3, d, dtype=dtype) if bias else None)
    return terms, Factors(1 + array(4, d) if scaled else None, array(5, d) if biased else None)


def far(found, expected):
    """Largest difference of any array, relative to the largest element of the expected one; NaN if any is."""
    pairs = zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True)
    wide = [(np.asarray(x, np.float32), np.asarray(y, np.float32)) for x, y in pairs]
    return np.max([np.abs(x - y).max() / np.abs(y).max() for x, y in wide])


def weighed(outputs):
    """A scalar with another gradient for each element of each output."""
    return sum((x.astype(jnp.float32) * array(6 + i, *x.shape)).sum() for i, x in enumerate(outputs))


# rows, positions, channels: the vectors of several programs and a part of another; channels of one piece and of three
SHAPES = {"64 channels": (2, BACKWARD // 2 + 5, 64), "a vector": (1, 1, 42), "42 channels": (3, 7, 42)}


CASES = [  # terms, LayerNorm, whether the sum goes on
    ("64 channels", "an update with a bias", True, True),
    ("42 channels", "one term", False, True),
    ("a vector", "an update", True, False),
]
MORE = [slow(shape, which, shape != "a vector", which != "an update") for shape in SHAPES for which in TERMS]


@pytest.mark.parametrize(("shape", "which", "centred", "goes_on"), CASES + MORE)
def test_sums_are_normalised_as_without_kernels(shape, which, centred, goes_on):
    given = terms_and_factors(*SHAPES[shape], which, scaled=which != "one term", biased=centred)

    def of(own_kernels):
        def f(terms, factors):
            found = normalise_sum(terms, factors, 1e-5, centred, by_kernels=own_kernels, goes_on=goes_on)
            return weighed(found if goes_on else found[1:]), found

        return jax.jit(jax.grad(f, (0, 1), has_aux=True))(*given)

    assert far(of(True), of(False)) < 1e-5


def test_sums_in_bfloat16_are_rounded_once():
    terms, factors = terms_and_factors(2, 40, 96, "an update with a bias", dtype=jnp.bfloat16)
    wide = Terms(*(x.astype(jnp.float32) for x in terms))
    total, y = normalise_by_kernels(terms, factors, 1e-5, True, True)
    exact = normalise_sum(wide, factors, 1e-5, True, by_kernels=False)
    assert total.dtype == y.dtype == jnp.bfloat16
    assert jnp.array_equal(total, exact[0].astype(jnp.bfloat16))
    of_rounded = normalise_sum(Terms(total.astype(jnp.float32)), factors, 1e-5, True, by_kernels=False)[1]
    assert far(y, of_rounded) < 0.004


@pytest.mark.parametrize(("out", "centred"), [((24,), True), slow((2, 24), False)], ids=["LayerNorm", "gated, RMSNorm"])
def test_a_norm_that_is_not_kept_is_multiplied_as_one_that_is(out, centred):
    given = (*terms_and_factors(2, 45, 48, "an update with a bias", biased=centred), array(9, 48, *out))

    def kept(terms, factors, w):
        total, y = normalise_sum(terms, factors, 1e-5, centred, by_kernels=False)
        return total, matmul(y, w)

    def of(f):
        return jax.jit(jax.grad(lambda *x: (weighed(f(*x)), f(*x)), (0, 1, 2), has_aux=True))(*given)

    assert far(of(lambda *x: multiply_norm(*x, 1e-5, centred)), of(kept)) < 1e-5
    kept = jax.eval_shape(lambda *x: jax.vjp(lambda *y: multiply_norm(*y, 1e-5, centred), *x)[1], *given)
    assert [x.size for x in jax.tree.leaves(kept)].count(90 * 48) == 1, "the sum, and not its norm"


@pytest.mark.parametrize(("vocabulary", "softcap", "z_loss"), [(1105, 5.0, 0.01), slow(96, None, 0.0)])
def test_the_loss_and_its_gradients_are_as_without_the_kernel(softcap, z_loss, vocabulary):
    hidden, w = array(1, 3, 14, 16, dtype=jnp.bfloat16), array(2, vocabulary, 16)
    targets = jnp.asarray(np.random.default_rng(3).integers(0, vocabulary, (3, 14)), jnp.int32)
    weights = jnp.abs(array(4, 3, 14)).at[:, 9:].set(0)

    def of(own_kernel):
        options = softcap, z_loss, 5 * 2 * vocabulary, jnp.float16, own_kernel
        f = lambda hidden, w: loss_sums(hidden, w, targets, weights, *options)  # noqa: E731
        return jax.jit(jax.grad(lambda *x: (f(*x)[0], f(*x)), (0, 1), has_aux=True))(hidden, w)

    (gradients, sums), (plain_gradients, plain_sums) = of(True), of(False)
    assert far(sums, plain_sums) < 1e-6
    assert far(gradients, plain_gradients) < 0.004  # bfloat16


MODELS = {
    "as it is": ({}, {}),
    "after the residual": slow({"pre_norm": False}, {}),
    "RMSNorm before and after": ({"norm": "rmsnorm", "sandwich_norm": True, "use_bias": False}, {}),
    "side by side": slow({"parallel_residual": True}, {}),
    "gated, unrolled": ({"activation": "swiglu", "scan_layers": False}, {}),
    "recomputed": slow({"gradient_checkpointing": True}, {}),
    "adapters": slow({"scan_layers": False}, {"lora_rank": 2}),
    "capped": slow({"logit_softcap": 5.0}, {"z_loss": 0.01}),
}


def gradients_of(config, own_kernels):
    """The cross entropy and the gradients of one batch."""
    mesh = make_mesh(jax.devices()[:1], (1, 1, 1))
    assembly = assemble(Resolved(config, mesh), own_kernels=own_kernels)
    numbers = run_numbers(config.training)
    params, key = assembly.init(numbers).params, jax.random.wrap_key_data(numbers["key"])
    params = jax.tree.map(lambda x: x + 0.01 * array(x.size, *x.shape), params)  # no zeros, no ones
    gradients = make_gradients(assembly.graphdef, config, assembly.layout)
    return jax.jit(gradients)(params, make_batch(4), key, jnp.float32(0.01))


@pytest.mark.parametrize(("model", "training"), list(MODELS.values()), ids=list(MODELS))
def test_a_model_learns_the_same_with_its_kernels(model, training):
    config = config_of(dataclasses.replace(STILL, **model), zero_stage=0, **training)
    assert far(gradients_of(config, BOTH), gradients_of(config, frozenset())) < 1e-5


def test_a_model_with_dropout_learns_the_same_with_its_kernels():
    config = config_of(HALF, zero_stage=0)
    assert far(gradients_of(config, BOTH), gradients_of(config, frozenset())) < 1e-5


def test_which_kernels_are_used():
    config = replace_fields(config_of(STILL), {"training.use_amp": True, "model.vocab_size": 384})
    of = lambda capability=8.0, **fields: choose_kernels(  # noqa: E731
        replace_fields(config, {name.replace("__", "."): value for name, value in fields.items()}), capability
    )
    assert of() == BOTH
    assert of(None) == of(7.5) == frozenset()
    assert of(training__own_kernels=False) == of(training__use_amp=False) == frozenset()
    assert of(training__tensor_parallel=2) == frozenset(), "the compiler divides arrays, not a kernel"
    assert of(model__d_model=2 * LARGEST_WIDTH) == {LOSS}
    assert of(model__vocab_size=LARGEST_VOCABULARY) == BOTH
    assert of(model__vocab_size=2 * LARGEST_VOCABULARY) == of(model__vocab_size=385) == {NORMS}
    assert of(model__vocab_size=LARGEST_VOCABULARY - 16) == {NORMS}, "in sixteen pieces"


def test_what_is_left_to_xla_is_said(tmp_path, corpus, monkeypatch):
    """Where a GPU is and nobody asked for it."""
    trainer = Trainer(make_config(tmp_path, corpus, **{"training.max_steps": 1}))
    trainer.train()
    monkeypatch.setattr(Resolved, "capability", 8.0)
    assert "norms by XLA: our kernel has no float32 (training.use_amp false)" in list(trainer._start.lines())
    config = replace_fields(config_of(STILL), {"training.use_amp": True, "model.vocab_size": 50_257})
    few = "needs a vocabulary that is a multiple of 16 and the sum of few powers of two, not 50257 (model.vocab_size)"
    assert left_to_xla(config, 8.0) == [f"loss by XLA: our kernel {few}"]
    assert not left_to_xla(config, 8.0, frozenset({LOSS}))
    assert left_to_xla(config, None) == left_to_xla(replace_fields(config, {"training.own_kernels": False}), 8.0) == []
    old = "our kernel needs a GPU of compute capability 8 or later, not 7.5"
    assert left_to_xla(config, 7.5) == [f"norms by XLA: {old}", f"loss by XLA: {old}"]

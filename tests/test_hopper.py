"""Attention for Hopper's GPUs, run by JAX's interpreter of Mosaic's dialect, which looks for races, too."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import slow
from test_flash import both, case, errors, reference

if jax.__version_info__ < (0, 11):
    pytest.skip("JAX 0.10 has no interpreter for these kernels", allow_module_level=True)

from jax.experimental.pallas import mosaic_gpu

from jaxlm.ops import hopper
from jaxlm.ops.flash_kernels import HOPPER_TILES
from jaxlm.ops.hopper import hopper_attention, hopper_attention_of_product

# T, heads, heads of keys, head size, documents a row, dropout
CASES = {
    "dropout": (140, 1, 1, 64, 1, 0.2),
    "packed, dropout, grouped heads": (260, 2, 1, 64, 4, 0.1),
    "head size 80": (130, 1, 1, 80, 3, 0.0),
    "head size 128": (130, 2, 1, 128, 3, 0.1),
}


@pytest.fixture(autouse=True)
def interpreted(monkeypatch, capfd):
    monkeypatch.setattr(hopper, "INTERPRETER", mosaic_gpu.InterpretGPUParams(detect_races=True))
    yield
    assert "RACE" not in capfd.readouterr().out


@pytest.mark.parametrize("name", [slow(name) if "size" in name else name for name in CASES])
def test_it_is_nearer_than_dense_attention_in_sixteen_bits(name):
    *arrays, segments, key = case(*CASES[name], dtype=jnp.bfloat16, rows=1)
    rate = CASES[name][-1]
    exact, dense = (
        both(lambda q, k, v: reference(q, k, v, segments, key, rate), *(x.astype(dtype) for x in arrays))
        for dtype in (jnp.float32, jnp.bfloat16)
    )
    found = both(lambda q, k, v: hopper_attention(q, k, v, segments, key, rate), *arrays)
    for ours, theirs in zip(errors(found, exact), errors(dense, exact), strict=True):
        assert 0 < ours < max(theirs, 2**-8)


def test_without_keys_nothing_is_dropped():
    """As an evaluation of a model with dropout has none."""
    q, k, v, _, _, _ = case(70, 1, 1, 64, 1, 0.0, dtype=jnp.bfloat16, rows=1)
    run = jax.jit(lambda rate: hopper_attention(q, k, v, None, None, rate), static_argnums=0)
    np.testing.assert_array_equal(run(0.1), run(0.0))


def test_programs_are_as_large_as_their_tiles_say():
    forward, keys, queries = HOPPER_TILES
    assert forward.queries == keys.keys == queries.queries == hopper.BLOCK
    assert {(tile.warps, tile.stages) for tile in HOPPER_TILES} == {(4 * (hopper.GROUPS + 1), hopper.STAGES)}


@pytest.mark.parametrize("biased", [True, slow(False)])
def test_parts_of_a_product_are_read_where_they_stand(biased):
    """Output and gradients of the product and its biases; the keys' bias has none."""
    *arrays, g, segments, key = case(200, 1, 1, 64, 3, 0.1, dtype=jnp.bfloat16, rows=1)
    qkv = jnp.stack(arrays, axis=2)
    bias = jnp.asarray(np.random.default_rng(1).normal(size=qkv.shape[2:]), qkv.dtype) if biased else None

    def dense(qkv, bias):
        q, k, v = jnp.moveaxis(qkv if bias is None else qkv + bias[None, None], 2, 0)
        return reference(q, k, v, segments, key, 0.1)

    def run(f, dtype):
        def weighed(x):
            y = f(*x).astype(jnp.float32)
            return (y * g.astype(jnp.float32)).sum(), y

        x = jax.tree.map(lambda y: y.astype(dtype), (qkv, bias))
        gradients, y = jax.jit(jax.grad(weighed, has_aux=True))(x)
        return [z.astype(jnp.float32) for z in (y, *jax.tree.leaves(gradients))]

    found = run(lambda qkv, bias: hopper_attention_of_product(qkv, bias, segments, key, 0.1), jnp.bfloat16)
    exact, rounded = (run(dense, dtype) for dtype in (jnp.float32, jnp.bfloat16))
    if biased:
        assert not found[2][1].any()
        exact[2], rounded[2] = (x[2].at[1].set(0) for x in (exact, rounded))
    for ours, theirs in zip(errors(found, exact), errors(rounded, exact), strict=True):
        assert 0 < ours < max(theirs, 2**-8)


def test_other_documents_blocks_are_never_touched():
    """A NaN in a block that no query of the document sees would spoil its weights, which are 0, times NaN."""
    q, k, v, g, _, _ = case(256, 1, 1, 64, 1, 0.0, dtype=jnp.bfloat16, rows=1)
    segments = jnp.repeat(jnp.asarray([[1, 2]], jnp.int32), 128, axis=1)
    for unseen in (slice(None, 128), slice(128, None)):
        seen = slice(128, None) if unseen.stop else slice(None, 128)
        spoiled = [x.at[:, unseen].set(jnp.nan) for x in (q, k, v, g)]
        for found in both(lambda *x: hopper_attention(*x, segments, None, 0.0), *spoiled):
            assert jnp.isnan(found[:, unseen]).all() and jnp.isfinite(found[:, seen]).all()

"""The fused attention kernels, interpreted on CPU, against dense attention; and what of them can be compiled here."""

import functools
import importlib
import re
import sys
from collections import Counter
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import make_config, slow
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from test_model import dense_attention

from jaxlm import Trainer
from jaxlm.config import Config, replace_fields
from jaxlm.errors import UserError
from jaxlm.ops.attention_kernels import choose_attention, why_not_fused
from jaxlm.ops.blockwise import dropout_mask
from jaxlm.ops.flash import flash_attention, flash_attention_of_product
from jaxlm.ops.flash_kernels import TILES
from jaxlm.parallel.mesh import abstract_mesh
from jaxlm.train.assemble import Resolved, assemble
from jaxlm.train.step import make_train_step

# T, heads, heads of keys, head size, documents a row, dropout
GRID = {
    "plain": (128, 2, 2, 64, 1, 0.0),
    "T that no block divides": (150, 1, 1, 64, 1, 0.0),
    "packed": (300, 2, 2, 64, 5, 0.0),
    "dropout": (140, 3, 3, 64, 1, 0.2),
    "packed, dropout, grouped heads": (260, 4, 2, 64, 4, 0.1),
    "one head of keys": (130, 4, 1, 16, 3, 0.1),
    "head size 80": (130, 2, 2, 80, 3, 0.1),
    "head size 128": (260, 2, 1, 128, 4, 0.1),
    "head size 256": (100, 2, 1, 256, 2, 0.1),
    "less than a block": (5, 1, 1, 8, 2, 0.3),
}


def case(t, heads, groups, size, documents, rate, dtype=jnp.float32, rows=2):
    """q, k, v, the output's gradient, segments and dropout key."""
    rng = np.random.default_rng(0)
    shapes = [(rows, t, n, size) for n in (heads, groups, groups, heads)]
    arrays = [jnp.asarray(rng.normal(size=shape), dtype) for shape in shapes]
    segments = None
    if documents > 1:
        segments = jnp.asarray(np.sort(rng.integers(1, documents + 1, (rows, t)), axis=1), jnp.int32)
    key = jnp.asarray(rng.integers(0, 2**32, (rows, 2)), jnp.uint32) if rate else None
    return *arrays, segments, key


def both(f, q, k, v, g):
    """Output and gradients of q, k and v, float32."""

    def weighed(q, k, v):
        y = f(q, k, v)
        return (y.astype(jnp.float32) * g.astype(jnp.float32)).sum(), y

    gradients, y = jax.jit(jax.grad(weighed, (0, 1, 2), has_aux=True))(q, k, v)
    return [x.astype(jnp.float32) for x in (y, *gradients)]


def reference(q, k, v, segments, key, rate):
    """Dense attention with the same dropout mask."""
    b, t, heads, _ = q.shape
    k, v = (jnp.repeat(x, heads // x.shape[2], axis=2) for x in (k, v))
    keep = None if key is None else dropout_mask(key, (b, heads, t, t), 0, 0, rate).swapaxes(2, 3)
    return dense_attention(q, k, v, jnp.ones((b, t), jnp.int32) if segments is None else segments, keep, rate)


def errors(found, expected):
    """Largest difference of each array, relative to the expected one's largest element."""
    return [float(jnp.abs(x - y).max() / jnp.abs(y).max()) for x, y in zip(found, expected, strict=True)]


SEEN_IN_OTHERS = ("plain", "packed", "dropout", "head size 80")


@pytest.mark.parametrize("name", [slow(name) if name in SEEN_IN_OTHERS else name for name in GRID])
def test_flash_equals_dense(name):
    rate = GRID[name][-1]
    *arrays, segments, key = case(*GRID[name])
    found = both(lambda q, k, v: flash_attention(q, k, v, segments, key, rate), *arrays)
    expected = both(lambda q, k, v: reference(q, k, v, segments, key, rate), *arrays)
    assert max(errors(found, expected)) < 3e-6


@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("name", [slow("plain"), "packed", slow("dropout"), "head size 80"])
def test_parts_of_a_product_are_read_where_they_stand(name, biased):
    """Output and gradients of the product and its biases; those of the keys' bias are 0 but for rounding."""
    *arrays, g, segments, key = case(*GRID[name])
    rate, qkv = GRID[name][-1], jnp.stack(arrays, axis=2)
    bias = jnp.asarray(np.random.default_rng(1).normal(size=qkv.shape[2:]), jnp.float32) if biased else None

    def weighed(f, qkv, bias):
        y = f(qkv, bias)
        return (y * g).sum(), y

    def dense(qkv, bias):
        q, k, v = jnp.moveaxis(qkv if bias is None else qkv + bias[None, None], 2, 0)
        return reference(q, k, v, segments, key, rate)

    def ours(qkv, bias):
        return flash_attention_of_product(qkv, bias, segments, key, rate)

    def run(f):
        wanted = (0, 1) if biased else 0
        gradients, y = jax.jit(jax.grad(functools.partial(weighed, f), wanted, has_aux=True))(qkv, bias)
        return [y, *jax.tree.leaves(gradients)]

    found, expected = run(ours), run(dense)
    if biased:
        assert float(jnp.abs(expected[2][1]).max()) < 1e-4 and not found[2][1].any()
    assert max(errors(found, expected)) < 5e-6


@pytest.mark.parametrize("groups", [slow(4), 2])
def test_heads_on_two_devices_are_those_of_one(groups):
    """Bit for bit, dropout masks included."""
    *arrays, segments, key = case(140, 4, groups, 16, 3, 0.2)
    run = lambda *arrays: both(lambda *x: flash_attention(*x, segments, key, 0.2), *arrays)  # noqa: E731
    mesh = jax.make_mesh((2,), ("tensor",), axis_types=(AxisType.Auto,), devices=jax.devices()[:2])
    heads = NamedSharding(mesh, PartitionSpec(None, None, "tensor"))
    with jax.set_mesh(mesh):
        found = run(*(jax.device_put(x, heads) for x in arrays))
        text = jax.jit(run).lower(*(jax.device_put(x, heads) for x in arrays)).compile().as_text()
    assert {x.sharding for x in found} == {heads} and "all-gather" not in text
    for ours, alone in zip(found, run(*arrays), strict=True):
        np.testing.assert_array_equal(ours, alone)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, slow(jnp.float16)])
def test_sixteen_bits_are_nearer_than_dense_attention_in_them(dtype):
    *arrays, segments, key = case(*GRID["packed, dropout, grouped heads"], dtype=dtype)
    wide = [x.astype(jnp.float32) for x in arrays]
    exact = both(lambda q, k, v: reference(q, k, v, segments, key, 0.1), *wide)
    dense = both(lambda q, k, v: reference(q, k, v, segments, key, 0.1), *arrays)
    found = both(lambda q, k, v: flash_attention(q, k, v, segments, key, 0.1), *arrays)
    for ours, theirs in zip(errors(found, exact), errors(dense, exact), strict=True):
        assert 0 < ours < theirs


def test_other_documents_blocks_are_never_touched():
    """A NaN in a block that no query of the document sees would spoil its weights, which are 0, times NaN."""
    q, k, v, g, _, _ = case(256, 1, 1, 64, 1, 0.0, rows=1)
    segments = jnp.repeat(jnp.asarray([[1, 2]], jnp.int32), 128, axis=1)
    spoiled = [x.at[:, :128].set(jnp.nan) for x in (q, k, v, g)]
    run = jax.jit(lambda *arrays: both(lambda *x: flash_attention(*x, segments, None, 0.0), *arrays))
    for clean, found in zip(run(q, k, v, g), run(*spoiled), strict=True):
        assert jnp.isnan(found[:, :128]).all()
        np.testing.assert_array_equal(found[:, 128:], clean[:, 128:])
    later = [x.at[:, 128:].set(jnp.nan) for x in (q, k, v, g)]
    for clean, found in zip(run(q, k, v, g), run(*later), strict=True):
        np.testing.assert_array_equal(found[:, :128], clean[:, :128])


def test_dropout_repeats_and_depends_on_its_key():
    *arrays, segments, key = case(*GRID["packed, dropout, grouped heads"])
    run = jax.jit(lambda key, *arrays: both(lambda *x: flash_attention(*x, segments, key, 0.1), *arrays))
    first, again, other = (run(key, *arrays) for key in (key, key, key + jnp.uint32(1)))
    for x, y, z in zip(first, again, other, strict=True):
        np.testing.assert_array_equal(x, y)
        assert not np.array_equal(x, z)
    q, k, v, _ = arrays
    alone = flash_attention(q[1:], k[1:], v[1:], segments[1:], key[1:], 0.1)  # a row does not depend on its batch
    np.testing.assert_array_equal(alone, first[0][1:])


@pytest.mark.slow
def test_a_run_with_the_kernels_is_the_run_without(tmp_path, corpus, monkeypatch):
    """Losses of packed training with dropout, through the whole Trainer."""
    losses = {}
    short = {"model.n_layers": 1, "training.max_steps": 3, "data.validation_files": (), "data.validation_fraction": 0}
    for kernel in ("blockwise", "pallas"):
        monkeypatch.setattr("jaxlm.train.assemble.choose_attention", lambda *_, kernel=kernel: kernel)
        dropout = {"model.dropout": 0.1, "model.attention_dropout": 0.2, "model.n_kv_heads": 1}
        trainer = Trainer(make_config(tmp_path / kernel, corpus, **dropout, **short))
        assert trainer.assembly.attention == kernel
        rows = losses.setdefault(kernel, [])
        monkeypatch.setattr(Trainer, "_log_metrics", lambda self, loss, rows=rows: rows.append(loss))
        trainer.train()
        monkeypatch.undo()
    assert len(losses["pallas"]) == 3
    assert losses["pallas"] == pytest.approx(losses["blockwise"], rel=1e-5)


def test_without_pallas_for_triton_runs_take_another_kernel(tmp_path, corpus, monkeypatch):
    """JAX means to remove it; whoever doesn't choose its kernels doesn't import it."""
    for name in [name for name in sys.modules if name.startswith("jax.experimental.pallas.triton")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "jax.experimental.pallas.triton", None)
    config = Config()
    assert config.data.pack_sequences and choose_attention(config, A100) == "blockwise"
    why = f"pallas is written for Triton, which Pallas of JAX {jax.__version__} does not have"
    assert why_not_fused(config, A100) == f"{why}; mosaic is made for compute capability 9, not 8"
    with pytest.raises(UserError, match=r"model.attention \(pallas\) is written for Triton.*; use auto or blockwise"):
        choose_attention(replace_fields(config, {"model.attention": "pallas"}), H100)
    Trainer(make_config(tmp_path, corpus, **{"training.max_steps": 1})).train()


@pytest.mark.parametrize(
    ("version", "plugin", "capability", "size", "kernel", "why"),
    [
        ((0, 12, 0), True, 9.0, 64, "mosaic", None),
        ((0, 11, 2), True, 9.0, 128, "mosaic", None),
        ((0, 11, 2), True, 9.0, 160, "blockwise", "needs a head size up to 128, not 160"),
        ((0, 11, 2), False, 9.0, 64, "blockwise", 'needs CUDA 13: pip install -e ".[cuda13]", or ".[plan]" elsewhere'),
        ((0, 10, 2), True, 9.0, 64, "blockwise", f"needs JAX 0.11, not {jax.__version__}"),
        ((0, 12, 0), True, 10.0, 64, "blockwise", "is made for compute capability 9, not 10"),
    ],
)
def test_the_way_on_without_triton(monkeypatch, version, plugin, capability, size, kernel, why):
    monkeypatch.setattr("jaxlm.ops.attention_kernels.why_no_triton", lambda: "is gone")
    monkeypatch.setattr(jax, "__version_info__", version)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: name if plugin else None)
    config = replace_fields(Config(), {"model.head_dim": size})
    assert choose_attention(config, capability) == kernel
    assert why_not_fused(config, capability) == (why and f"pallas is gone; mosaic {why}")


@pytest.fixture
def as_h100(monkeypatch):
    """Of benchmarks/gpu: makes an abstract mesh one of GPUs."""
    monkeypatch.syspath_prepend(Path(__file__).parents[1] / "benchmarks" / "gpu")
    return importlib.import_module("sass").as_h100


def lowered_for_cuda(mesh, f, *shapes):
    """The StableHLO of `f` for NVIDIA GPUs, with each kernel lowered to Triton's IR."""
    with jax.sharding.use_abstract_mesh(mesh):
        return jax.jit(f).trace(*shapes).lower(lowering_platforms=("cuda",)).as_text()


@pytest.mark.parametrize("size", [*TILES, 80])
def test_kernels_lower_for_cuda(as_h100, size):
    array = lambda heads: jax.ShapeDtypeStruct((2, 300, heads, size), jnp.bfloat16)  # noqa: E731
    others = jax.ShapeDtypeStruct((2, 300), jnp.int32), jax.ShapeDtypeStruct((2, 2), jnp.uint32)

    def gradients(q, k, v, segments, key):
        return jax.grad(lambda *x: flash_attention(*x, segments, key, 0.1).astype(jnp.float32).sum(), (0, 1, 2))(
            q, k, v
        )

    mesh = as_h100(jax.sharding.AbstractMesh((), ()))
    text = lowered_for_cuda(mesh, gradients, array(4), array(2), array(2), *others)
    assert text.count("xla.gpu.triton") == 3


def test_the_update_lowers_for_cuda_without_a_square_array(corpus, tmp_path, as_h100):
    """The whole update of packed bfloat16 training with dropout, over several devices."""
    fields = {"model.attention_dropout": 0.1, "training.use_amp": True, "data.max_length": 290}
    fields |= {"training.gradient_accumulation_steps": 2}
    sizes = {"model.max_seq_len": 290, "model.vocab_size": 384}
    config = replace_fields(make_config(tmp_path, corpus, **fields), sizes)
    mesh = as_h100(abstract_mesh((1, 2, 1)))
    assembly = assemble(Resolved(config, mesh), attention="pallas")
    step = make_train_step(assembly.graphdef, config, assembly.layout)
    text = lowered_for_cuda(mesh, step, assembly.abstract_state, assembly.abstract_batch, assembly.abstract_numbers)
    of_attention = re.findall(r'name = "(forward|keys|queries)_kernel"', text)
    twice = "in a function for the first layer, whose input is one array, and in one that the others share"
    assert Counter(of_attention) == dict.fromkeys(("forward", "keys", "queries"), 2), twice
    others = re.findall(r'name = "(norm_forward|norm_backward|loss)_kernel"', text)
    assert set(others) == {"norm_forward", "norm_backward", "loss"}
    assert "290x290" not in text and "384x384" not in text
    logits = f"x{config.model.vocab_size}xf16>"  # kept so; bfloat16 would be too coarse (test_model.py)
    assert logits in text


H100, A100, T4 = 9.0, 8.0, 7.5
PLAIN = {"data.pack_sequences": False, "model.attention_dropout": 0.0}


@pytest.mark.parametrize(
    ("fields", "capability", "kernel"),
    [
        ({}, None, "blockwise"),
        ({}, H100, "pallas"),
        ({}, T4, "blockwise"),
        (PLAIN, H100, "cudnn"),
        (PLAIN, A100, "cudnn"),
        (PLAIN | {"training.amp_dtype": "float16"}, A100, "cudnn"),
        (PLAIN | {"model.d_model": 12 * 160}, A100, "pallas"),
        (PLAIN | {"model.d_model": 12 * 160}, H100, "cudnn"),
        (PLAIN | {"model.attention_dropout": 0.1}, H100, "pallas"),
        (PLAIN | {"data.pack_sequences": True}, H100, "pallas"),
        (PLAIN | {"training.use_amp": False}, H100, "blockwise"),
        ({"model.d_model": 12 * 264}, H100, "blockwise"),
        ({"training.tensor_parallel": 2}, H100, "pallas"),
        ({"training.tensor_parallel": 8}, H100, "blockwise"),
        (PLAIN | {"training.tensor_parallel": 2}, H100, "cudnn"),
        ({"model.attention": "blockwise"}, H100, "blockwise"),
        (PLAIN | {"model.attention": "pallas"}, H100, "pallas"),
    ],
)
def test_the_kernel_of_each_case(fields, capability, kernel):
    config = replace_fields(Config(), fields)
    assert choose_attention(config, capability) == kernel
    fallback = kernel == "blockwise" and capability is not None and config.model.attention == "auto"
    assert (why_not_fused(config, capability) is not None) == fallback


@pytest.mark.parametrize(
    ("fields", "capability", "why"),
    [
        ({"model.attention": "pallas"}, None, r"model.attention \(pallas\) needs an NVIDIA GPU; use auto or blockwise"),
        ({"model.attention": "pallas"}, T4, "needs a GPU of compute capability 8 or later, not 7.5"),
        ({"model.attention": "pallas", "training.use_amp": False}, H100, "float32"),
        ({"model.attention": "pallas", "training.tensor_parallel": 8}, H100, "training.tensor_parallel"),
        ({"model.attention": "cudnn"}, H100, "packed documents"),
        ({"model.attention": "cudnn", "data.pack_sequences": False}, H100, "model.attention_dropout"),
        (PLAIN | {"model.attention": "cudnn", "model.d_model": 12 * 132}, A100, "a multiple of 8 up to 128, not 132"),
    ],
)
def test_a_kernel_that_cannot_do_it_is_refused(fields, capability, why):
    with pytest.raises(UserError, match=why):
        choose_attention(replace_fields(Config(), fields), capability)

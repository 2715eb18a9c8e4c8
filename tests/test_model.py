"""The Transformer against plain references, and the equivalences that its options must not break."""

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import slow
from flax import nnx

from jaxlm.config import ModelConfig
from jaxlm.model import Transformer
from jaxlm.model.dropout import dropout, row_keys
from jaxlm.model.layers import Norm
from jaxlm.ops import blockwise
from jaxlm.ops.attention_kernels import causal_attention
from jaxlm.ops.embedding import take_rows
from jaxlm.ops.masks import keep_mask
from jaxlm.ops.norms import normalise
from jaxlm.train.loss import loss_sums

SMALL = ModelConfig(vocab_size=97, d_model=32, n_heads=4, n_layers=2, d_ff=64, max_seq_len=64)
MODERN: dict[str, Any] = {  # all that newer models do otherwise than GPT-2
    "norm": "rmsnorm",
    "activation": "swiglu",
    "use_bias": False,
    "n_kv_heads": 2,
    "positions": "rotary",
    "rope_scaling": "yarn",
    "rope_scaling_factor": 4.0,
    "rope_original_length": 16,
    "qk_norm": True,
    "logit_softcap": 3.0,
    "value_embedding": True,
    "tie_embeddings": False,
}
GEMMA2: dict[str, Any] = {
    "norm": "rmsnorm",
    "sandwich_norm": True,
    "scale_embeddings": True,
    "attention_softcap": 1.5,
    "use_bias": False,
}
NEOX: dict[str, Any] = {"positions": "rotary", "rotary_fraction": 0.5, "parallel_residual": True}
SPEEDRUN: dict[str, Any] = {  # what configs/speedrun.py does otherwise again
    "norm": "rmsnorm",
    "activation": "relu2",
    "use_bias": False,
    "norm_scale": False,
    "positions": "rotary",
    "qk_norm": True,
    "zero_init_outputs": True,
}


def close(actual, expected, tolerance=2e-5):
    for a, b in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        scale = max(float(jnp.abs(b).max()), 1e-6)
        np.testing.assert_allclose(np.asarray(a) / scale, np.asarray(b) / scale, atol=tolerance)


def packed_segments(rng, b, t):
    return jnp.asarray(np.sort(rng.integers(1, 4, (b, t)), axis=1).astype(np.int32))


def dense_attention(q, k, v, segments, keep=None, rate=0.0, softcap=None):
    """[B, T, H, K] softmax attention with the whole T x T matrix."""
    t = q.shape[1]
    scores = jnp.einsum("bqhk,bshk->bhqs", q, k) * q.shape[-1] ** -0.5
    scores = scores if softcap is None else softcap * jnp.tanh(scores / softcap)
    visible = jnp.tril(jnp.ones((t, t), bool))[None, None]
    visible = visible & (segments[:, None, :, None] == segments[:, None, None, :])
    weights = jax.nn.softmax(jnp.where(visible, scores, -jnp.inf), axis=-1)
    if keep is not None:
        weights = jnp.where(keep, weights / (1 - rate), 0.0)
    return jnp.einsum("bhqs,bshk->bqhk", weights, v)


@pytest.mark.parametrize(("rate", "softcap"), [(0.0, 1.5), (0.3, None)])
@pytest.mark.parametrize(
    ("t", "block"), [(24, 128), slow(40, 16), (100, 16), (150, 8)]
)  # one block, unrolled, padded, loop
def test_attention_equals_dense(monkeypatch, t, block, rate, softcap):
    monkeypatch.setattr(blockwise, "BLOCK", block)
    rng = np.random.default_rng(0)
    b, h, k = 2, 3, 8
    q, keys, v, g = (jnp.asarray(rng.normal(size=(b, t, h, k)).astype(np.float32)) for _ in range(4))
    segments = packed_segments(rng, b, t)
    key = jnp.asarray(rng.integers(0, 2**32, (b, 2), dtype=np.uint32))
    keep = blockwise.dropout_mask(key, (b, h, t, t), 0, 0, rate).swapaxes(2, 3) if rate else None

    def ours(q, keys, v):
        options = {"key_B2": key, "rate": rate, "softcap": softcap}
        y = causal_attention(q, keys, v, segments, implementation="blockwise", **options)
        return (y * g).sum(), y

    def reference(q, keys, v):
        y = dense_attention(q, keys, v, segments, keep, rate, softcap)
        return (y * g).sum(), y

    close(*(jax.jit(jax.grad(f, (0, 1, 2), has_aux=True))(q, keys, v) for f in (ours, reference)))


def test_attention_makes_no_square_array():
    t = 4096
    q = jax.ShapeDtypeStruct((1, t, 1, 8), jnp.float32)
    segments = jax.ShapeDtypeStruct((1, t), jnp.int32)

    def loss(q, s):
        return causal_attention(q, q, q, s, implementation="blockwise").sum()

    text = jax.jit(jax.grad(loss)).lower(q, segments).as_text()
    assert f"{t}x{t}" not in text
    memory = jax.jit(jax.grad(loss)).lower(q, segments).compile().memory_analysis()
    assert memory.temp_size_in_bytes < t * t  # a quarter of one float32 T x T array


def test_keep_mask_statistics():
    key = jnp.asarray([[1, 2], [3, 4], [1, 3], [2, 2]], jnp.uint32)
    t, d, rate = 256, 512, 0.1
    coordinates = (jnp.arange(t, dtype=jnp.uint32)[:, None], jnp.arange(d, dtype=jnp.uint32)[None])
    drop = ~np.asarray(keep_mask(key, coordinates, rate))
    n = t * d
    sigma = (rate * (1 - rate) / n) ** 0.5
    assert np.all(np.abs(drop.mean((1, 2)) - rate) < 5 * sigma)
    assert np.all(np.abs(drop.mean(1) - rate) < 5 * (rate * (1 - rate) / t) ** 0.5)  # every column
    assert np.all(np.abs(drop.mean(2) - rate) < 5 * (rate * (1 - rate) / d) ** 0.5)  # every line
    for other in range(1, 4):  # independent between rows, neighbours and lines
        assert abs((drop[0] & drop[other]).mean() - rate**2) < 5 * sigma
    assert abs((drop[:, 1:] & drop[:, :-1]).mean() - rate**2) < 3 * sigma
    assert abs((drop[:, :, 1:] & drop[:, :, :-1]).mean() - rate**2) < 3 * sigma


def test_dropout_keeps_the_mean_and_needs_a_key():
    x = jnp.ones((2, 64, 128))
    key = jnp.asarray([[5, 6], [7, 8]], jnp.uint32)
    dropped = dropout(x, key, 0.25)
    assert set(np.unique(dropped)) == {0.0, np.float32(1 / 0.75)}
    assert abs(float(dropped.mean()) - 1) < 0.02
    assert dropout(x, None, 0.25) is x


def test_row_keys_differ_by_every_coordinate():
    keys = np.concatenate(
        [
            np.asarray(row_keys(jax.random.fold_in(jax.random.key(0), step), jnp.arange(8), 3)).reshape(-1, 2)
            for step in range(3)
        ]
    )
    assert len(np.unique(keys, axis=0)) == len(keys) == 3 * 4 * 3 * 8


@functools.cache
def model_and_params(config, **options):
    model = Transformer(config, rngs=nnx.Rngs(0), **options)
    graphdef, state = nnx.split(model)
    return graphdef, nnx.to_pure_dict(state)


def batch(rng, b=2, t=48, v=97):
    tokens = jnp.asarray(rng.integers(3, v, (b, t)).astype(np.int32))
    targets = jnp.asarray(rng.integers(3, v, (b, t)).astype(np.int32))
    return tokens, targets, packed_segments(rng, b, t)


def loss_and_grads(config, params, data, keys=None):
    graphdef, _ = nnx.split(nnx.eval_shape(lambda: Transformer(config, rngs=nnx.Rngs(0))))
    tokens, targets, segments = data

    def loss(params):
        model = nnx.merge(graphdef, params)
        hidden = model(tokens, segments, None, keys)
        return loss_sums(hidden, model.output_matrix(), targets, jnp.ones(targets.shape), config.logit_softcap)[0]

    return jax.jit(jax.value_and_grad(loss))(params)


def dropout_keys(config, b=2):
    return row_keys(jax.random.key(7), jnp.arange(b), config.n_layers)


@pytest.mark.parametrize(
    ("config", "changes"),
    [
        (SMALL, {"scan_layers": True}),
        slow(SMALL, {"gradient_checkpointing": True}),
        slow(SMALL, {"gradient_checkpointing": True, "remat_policy": "dots"}),
        (SMALL, {"gradient_checkpointing": True, "scan_layers": True}),
        (dataclasses.replace(SMALL, **MODERN), {"gradient_checkpointing": True, "scan_layers": True}),
        slow(dataclasses.replace(SMALL, **SPEEDRUN), {"gradient_checkpointing": True, "remat_policy": "dots"}),
    ],
)
def test_ways_to_run_the_layers_are_equal(config, changes):
    """Scan or unroll, recompute or keep: the same loss and gradients, dropout included (to float32 rounding)."""
    close(of_one_batch(dataclasses.replace(config, **changes), config), of_one_batch(config, config))


@functools.cache
def of_one_batch(config, start):
    """Loss and gradients, dropout on, with the parameters of `start`."""
    data, (_, params) = batch(np.random.default_rng(1)), model_and_params(start)
    return loss_and_grads(config, params, data, dropout_keys(start))


def plain_norm(x, p, kind, epsilon):
    if kind == "layernorm":
        x = x - x.mean(-1, keepdims=True)
    y = x / jnp.sqrt((x * x).mean(-1, keepdims=True) + epsilon)
    if "scale" in p:
        y = y * p["scale"].reshape((1,) * (x.ndim - 1) + (-1,))
    return y + p["bias"][None, None] if "bias" in p else y


def plain_linear(x, p):
    y = jnp.tensordot(x, p["kernel"], 1)
    return y + p["bias"][None, None] if "bias" in p else y


def plain_rotation(x, config):
    """[B, T, H, K] as complex numbers, each pair of channels turned by its own loop over frequencies."""
    x, rest = jnp.split(x, [int(x.shape[-1] * config.rotary_fraction)], -1)
    half, length, factor = x.shape[-1] // 2, config.rope_original_length, config.rope_scaling_factor
    turned, size = [], 0.1 * math.log(factor) + 1 if config.rope_scaling == "yarn" else 1.0
    for i in range(half):
        frequency, kept = config.rope_theta ** (-i / half), 1.0
        if config.rope_scaling == "linear":
            kept = 0.0
        elif config.rope_scaling == "llama3":
            turns, low, high = (
                length * frequency / (2 * math.pi),
                config.rope_low_freq_factor,
                config.rope_high_freq_factor,
            )
            kept = min(max((turns - low) / (high - low), 0), 1)
        elif config.rope_scaling == "yarn":
            at = [half * math.log(length / (n * 2 * math.pi)) / math.log(config.rope_theta) for n in (32, 1)]
            first, last = max(math.floor(at[0]), 0), min(math.ceil(at[1]), 2 * half - 1)
            kept = 1 - min(max((i - first) / (last - first), 0), 1)
        angle = jnp.arange(x.shape[1]) * frequency * (kept + (1 - kept) / factor)
        turned.append((x[..., i] + 1j * x[..., half + i]) * (size * jnp.exp(1j * angle))[None, :, None])
    turned = jnp.stack(turned, -1)
    return jnp.concatenate([turned.real, turned.imag, rest], -1)


def plain_block(x, p, config, segments, values):
    """A pre-norm block with the whole T x T matrix, head by head of keys and values."""
    b, t, d = x.shape
    h, g, eps = config.n_heads, config.kv_heads, config.norm_epsilon
    y, attention = plain_norm(x, p.get("norm1", {}), config.norm, eps), p["attention"]
    if g == h:
        q, k, v = jnp.moveaxis(plain_linear(y, attention["qkv"]), 2, 0)
    else:
        q, (k, v) = plain_linear(y, attention["q"]), jnp.moveaxis(plain_linear(y, attention["kv"]), 2, 0)
    q, k, v = q.reshape(b, t, h, -1), k.reshape(b, t, g, -1), v.reshape(b, t, g, -1)
    if config.qk_norm:
        q, k = (plain_norm(z, attention.get(n, {}), "rmsnorm", eps) for z, n in ((q, "q_norm"), (k, "k_norm")))
    if config.positions == "rotary":
        q, k = plain_rotation(q, config), plain_rotation(k, config)
    if values is not None:
        v = v + attention["value_scale"].reshape(1, 1, g, 1) * values.reshape(b, t, g, -1)
    alone = lambda i: (q[:, :, [i]], k[:, :, [i * g // h]], v[:, :, [i * g // h]])  # noqa: E731
    each = [dense_attention(*alone(i), segments, softcap=config.attention_softcap) for i in range(h)]
    y = plain_linear(jnp.concatenate(each, 2).reshape(b, t, d), attention["out"])
    before, x = x, x + (plain_norm(y, p["norm1_out"], config.norm, eps) if config.sandwich_norm else y)
    y = plain_norm(before if config.parallel_residual else x, p.get("norm2", {}), config.norm, eps)
    y = plain_linear(y, p["mlp"]["up"])
    tanh_gelu = lambda z: 0.5 * z * (1 + jnp.tanh(math.sqrt(2 / math.pi) * (z + 0.044715 * z**3)))  # noqa: E731
    y = {
        "gelu": lambda: tanh_gelu(y),
        "gelu_exact": lambda: 0.5 * y * (1 + jax.lax.erf(y / math.sqrt(2))),
        "relu2": lambda: jnp.maximum(y, 0) ** 2,
        "swiglu": lambda: y[:, :, 0] / (1 + jnp.exp(-y[:, :, 0])) * y[:, :, 1],
        "geglu": lambda: tanh_gelu(y[:, :, 0]) * y[:, :, 1],
    }[config.activation]()
    y = plain_linear(y, p["mlp"]["down"])
    return x + (plain_norm(y, p["norm2_out"], config.norm, eps) if config.sandwich_norm else y)


def plain_loss(params, config, data, z_loss):
    """(what is minimised, cross entropy), with all logits at once."""
    tokens, targets, segments = data
    x = params["token_embedding"][tokens] * (math.sqrt(config.d_model) if config.scale_embeddings else 1)
    if config.positions == "learned":
        x = x + params["position_embedding"][None, : tokens.shape[1]]
    for layer in range(config.n_layers):
        p = jax.tree.map(lambda p, n=layer: p[n], params["blocks"])
        values = params["value_embedding"][tokens] if config.value_embedding else None
        x = plain_block(x, p, config, segments, values)
    x = plain_norm(x, params.get("final_norm", {}), config.norm, config.norm_epsilon)
    logits = x @ params["token_embedding" if config.tie_embeddings else "output_embedding"].T
    if config.logit_softcap:
        logits = config.logit_softcap * jnp.tanh(logits / config.logit_softcap)
    z = jax.nn.logsumexp(logits, -1)
    nll = (z - jnp.take_along_axis(logits, targets[..., None], -1)[..., 0]).sum()
    return nll + z_loss * (z**2).sum(), nll


@pytest.mark.parametrize(
    ("options", "z_loss"),
    [
        slow({"norm": "rmsnorm", "norm_epsilon": 0.1, "activation": "gelu_exact", "n_kv_heads": 1}, 0.0),
        slow({"use_bias": False, "norm_epsilon": 0.1, "activation": "geglu", "qk_norm": True, "n_kv_heads": 4}, 1e-2),
        slow(
            {"positions": "rotary", "rope_scaling": "llama3", "rope_original_length": 24, "rope_scaling_factor": 8.0},
            0.0,
        ),
        slow({"positions": "rotary", "rope_scaling": "linear", "rope_scaling_factor": 3.0, "logit_softcap": 2.0}, 1e-2),
        (SPEEDRUN, 0.0),
        (MODERN, 1e-2),
        (GEMMA2, 0.0),
        (NEOX, 0.0),
    ],
    ids=["rmsnorm", "no_bias", "llama3", "linear", "speedrun", "all", "gemma2", "neox"],
)
def test_modern_blocks_equal_a_plain_model(options, z_loss):
    """Losses and every gradient, of a model of random biases and scales, written out without any of our functions."""
    config = dataclasses.replace(SMALL, n_layers=2 if options is MODERN else 1, **options)
    graphdef, params = model_and_params(config)
    rng = np.random.default_rng(6)
    params = jax.tree.map(lambda p: p + rng.normal(0, 0.2, p.shape).astype(np.float32), params)
    tokens, targets, segments = data = batch(rng, t=32)

    def ours(params):
        model = nnx.merge(graphdef, params)
        hidden, weights = model(tokens, segments), jnp.ones(targets.shape)
        return loss_sums(hidden, model.output_matrix(), targets, weights, config.logit_softcap, z_loss)

    reference = lambda params: plain_loss(params, config, data, z_loss)  # noqa: E731
    (found, expected) = (jax.jit(jax.value_and_grad(f, has_aux=True))(params) for f in (ours, reference))
    assert (expected[0][0] > expected[0][1]) == (z_loss > 0)
    close(found, expected, 1e-4)


def test_recomputing_saves_memory():
    """With gradient_checkpointing the compiled gradient needs less scratch memory (a check that it does anything)."""
    config = dataclasses.replace(SMALL, n_layers=8, d_model=64, d_ff=512, scan_layers=True)
    data = batch(np.random.default_rng(0), b=8, t=64)

    def scratch(config):
        graphdef, params = model_and_params(config)
        loss = lambda params: nnx.merge(graphdef, params)(data[0], data[2]).sum()  # noqa: E731
        return jax.jit(jax.grad(loss)).lower(params).compile().memory_analysis().temp_size_in_bytes

    assert scratch(dataclasses.replace(config, gradient_checkpointing=True)) < 0.6 * scratch(config)


@pytest.mark.parametrize(
    "options",
    [
        {"positions": "learned", "activation": "swish"},
        {"positions": "sinusoidal", "pre_norm": False},
        slow({"positions": "rotary"}),
        MODERN,
    ],
    ids=["learned", "sinusoidal", "rotary", "modern"],
)
def test_packed_documents_do_not_see_each_other(options):
    """d loss(document B) / d embeddings(document A) is exactly 0; a packed document gets what it gets alone."""
    config = dataclasses.replace(SMALL, **options)
    graphdef, params = model_and_params(config)
    rng = np.random.default_rng(2)
    n_a, n_b = 20, 28
    tokens = jnp.asarray(rng.integers(3, 97, (1, n_a + n_b)).astype(np.int32))
    segments = jnp.asarray([[1] * n_a + [2] * n_b], jnp.int32)
    where = jnp.asarray([[*range(n_a), *range(n_b)]], jnp.int32)
    embedded = nnx.merge(graphdef, params).embed(tokens, where)

    def loss_of(first, last):
        def loss(x):
            model = nnx.merge(graphdef, params)
            model.embed = lambda tokens, positions: x
            hidden = model(tokens, segments, where)
            return (hidden[:, first:last] ** 2).sum()

        return loss

    gradient_b = jax.jit(jax.grad(loss_of(n_a, n_a + n_b)))(embedded)
    assert np.all(np.asarray(gradient_b[:, :n_a]) == 0) and np.all(np.any(np.asarray(gradient_b[:, n_a:]) != 0, -1))
    gradient_a = jax.jit(jax.grad(loss_of(0, n_a)))(embedded)
    assert np.all(np.asarray(gradient_a[:, n_a:]) == 0) and np.all(np.any(np.asarray(gradient_a[:, :n_a]) != 0, -1))

    model = jax.jit(lambda *inputs: nnx.merge(graphdef, params)(*inputs))
    packed = model(tokens, segments, where)[:, n_a:]
    close(packed, model(tokens[:, n_a:]))
    leaking = model(tokens, jnp.ones_like(segments), where)[:, n_a:]  # the fault that this test is for
    assert float(jnp.abs(leaking - packed).max()) > 1e-2


@pytest.mark.parametrize("positions", ["learned", "sinusoidal", "rotary"])
def test_positions_matter(positions):
    graphdef, params = model_and_params(dataclasses.replace(SMALL, positions=positions))
    tokens = jnp.asarray([[5, 6, 7, 8]], jnp.int32)
    swapped = jnp.asarray([[6, 5, 7, 8]], jnp.int32)
    model = jax.jit(nnx.merge(graphdef, params))
    assert float(jnp.abs(model(tokens)[:, -1] - model(swapped)[:, -1]).max()) > 1e-4


def test_initialisation_is_gpt2s():
    _, params = model_and_params(dataclasses.replace(SMALL, d_model=128, d_ff=512, n_layers=8, vocab_size=1000))
    blocks = params["blocks"]
    assert float(params["token_embedding"].std()) == pytest.approx(0.02, rel=0.02)
    assert float(blocks["attention"]["qkv"]["kernel"].std()) == pytest.approx(0.02, rel=0.02)
    assert float(blocks["attention"]["out"]["kernel"].std()) == pytest.approx(0.02 / 16**0.5, rel=0.02)
    assert float(blocks["mlp"]["down"]["kernel"].std()) == pytest.approx(0.02 / 16**0.5, rel=0.02)
    assert not blocks["mlp"]["up"]["bias"].any()
    _, from_zero = model_and_params(dataclasses.replace(SMALL, zero_init_outputs=True))
    of_zero = {path[-3].key + "/" + path[-2].key for path, x in jax.tree_util.tree_leaves_with_path(from_zero)
               if path[-1].key == "kernel" and not x.any()}  # fmt: skip
    assert of_zero == {"attention/out", "mlp/down"}
    assert not np.array_equal(blocks["mlp"]["up"]["kernel"][0], blocks["mlp"]["up"]["kernel"][1])


@pytest.fixture(params=["cpu", "gpu"])
def as_on(request, monkeypatch):
    """What a GPU computes in another way than a CPU is computed in that way here."""
    if request.param == "gpu":
        monkeypatch.setattr(jax.lax, "platform_dependent", lambda *given, cpu, default: default(*given))


@pytest.mark.usefixtures("as_on")
@pytest.mark.parametrize(("softcap", "z_loss"), [(None, 0.0), slow(None, 1e-2), slow(2.0, 0.0), (2.0, 1e-2)])
@pytest.mark.parametrize("chunk_bytes", [2**30, 4 * 2 * 97 * 7, 1])  # one chunk, chunks of 7 that don't divide T, of 1
def test_loss_equals_the_unchunked_one(chunk_bytes, softcap, z_loss):
    rng = np.random.default_rng(3)
    hidden = jnp.asarray(rng.normal(size=(2, 24, 16)).astype(np.float32))
    w = jnp.asarray(rng.normal(size=(97, 16)).astype(np.float32))
    targets = jnp.asarray(rng.integers(0, 97, (2, 24)).astype(np.int32))
    weights = jnp.asarray(rng.integers(0, 2, (2, 24)).astype(np.float32))

    def reference(hidden, w):
        logits = jnp.einsum("btd,vd->btv", hidden, w)
        logits = logits if softcap is None else softcap * jnp.tanh(logits / softcap)
        z = jax.nn.logsumexp(logits, -1)
        nll = z - jnp.take_along_axis(logits, targets[..., None], -1)[..., 0]
        return 3.0 * ((nll + z_loss * z**2) * weights).sum(), 3.0 * (nll * weights).sum()

    def ours(hidden, w):
        objective, cross_entropy = loss_sums(hidden, w, targets, weights, softcap, z_loss, chunk_bytes)
        return 3.0 * objective, 3.0 * cross_entropy

    close(ours(hidden, w), reference(hidden, w), 1e-6)  # without gradient, the other code path
    close(*(jax.value_and_grad(f, (0, 1), has_aux=True)(hidden, w) for f in (ours, reference)), 1e-5)


@pytest.mark.parametrize("offset", [0, 64])  # of all logits of a token, as training makes them drift
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_logits_in_sixteen_bits_change_less_than_the_compute_dtype(dtype, offset):
    """The loss by less than 1e-4, the gradients' error by less than half; bfloat16 logits would be too coarse."""
    rng = np.random.default_rng(0)
    common = rng.normal(size=64)
    common *= (offset**0.5) / np.linalg.norm(common)
    w = 0.1 * rng.normal(size=(1000, 64)) + common
    targets = jnp.asarray(rng.integers(0, 1000, (2, 200)), jnp.int32)
    hidden = rng.normal(size=(2, 200, 64)) + 7 * (w - common)[targets] - common
    hidden, w = jnp.asarray(hidden, jnp.float32), jnp.asarray(w, jnp.float32)

    def loss_and_gradients(dtype, kept_as):
        def loss(hidden, w):
            sums = loss_sums(hidden.astype(dtype), w, targets, jnp.ones((2, 200)), chunk_bytes=2**17, kept_as=kept_as)
            return sums[0]

        return jax.jit(jax.value_and_grad(loss, (0, 1)))(hidden, w)

    exact, wide, found, coarse = (
        loss_and_gradients(*dtypes)
        for dtypes in ((jnp.float32, jnp.float32), (dtype, jnp.float32), (dtype, jnp.float16), (dtype, jnp.bfloat16))
    )
    assert abs(found[0] / wide[0] - 1) < 1e-4 and (offset == 0 or abs(coarse[0] / wide[0] - 1) > 1e-4)
    for ours, theirs, true in zip(found[1], wide[1], exact[1], strict=True):
        assert jnp.linalg.norm(ours - true) < 1.5 * jnp.linalg.norm(theirs - true)


@pytest.mark.parametrize("mean", [100.0, 4000.0])
def test_a_large_mean_leaves_a_norm_as_it_is(mean):
    """The mean of squares less the square of the mean, which is Flax's default, would be rounding alone."""
    x = jnp.asarray(mean + np.random.default_rng(0).normal(size=(4, 64)), jnp.float32)
    wide = np.asarray(x, np.float64)
    expected = (wide - wide.mean(-1, keepdims=True)) / wide.std(-1, keepdims=True)
    y, pull = jax.vjp(lambda x: normalise(x, None, None, 1e-6, True), x)
    np.testing.assert_allclose(y, expected, atol=mean * 1e-6)
    g = jnp.asarray(np.random.default_rng(1).normal(size=x.shape), jnp.float32)
    _, pull_centred = jax.vjp(lambda x: normalise(x, None, None, 1e-6, True), jnp.asarray(wide - mean, jnp.float32))
    close(pull(g), pull_centred(g), 1e-3)
    assert np.abs(normalise(jnp.full((1, 64), mean), None, None, 1e-6, True)).max() < 1e-3


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize(
    "kind",
    ["layernorm", "layernorm without bias", "rmsnorm", "rmsnorm and no scale", "layernorm without bias and no scale"],
)
def test_norms_and_their_gradients_are_those_of_flax(kind, dtype):
    rng = np.random.default_rng(0)
    x, g = (jnp.asarray(3 + rng.normal(size=(5, 7, 24)), dtype) for _ in range(2))
    scale = "no scale" not in kind
    config = dataclasses.replace(SMALL, use_bias="without" not in kind, norm_scale=scale, norm_epsilon=1e-3)
    ours = Norm(24, config, kind=kind.split()[0])
    options = {"epsilon": 1e-3, "dtype": jnp.float32, "use_scale": scale, "rngs": nnx.Rngs(0)}
    if kind.startswith("rmsnorm"):
        flax = nnx.RMSNorm(24, **options)
    else:
        flax = nnx.LayerNorm(24, use_bias=config.use_bias, use_fast_variance=False, **options)

    def run(norm, x, g):
        graphdef, params = nnx.split(norm)
        params = jax.tree.map(lambda p: p + jnp.asarray(np.random.default_rng(1).normal(size=p.shape), p.dtype), params)
        y, pull = jax.vjp(lambda params, x: nnx.merge(graphdef, params)(x), params, x)
        return [y, *jax.tree.leaves(pull(g))]

    found, expected = run(ours, x, g), run(flax, x.astype(jnp.float32), g.astype(jnp.float32))
    assert [y.dtype for y in found] == [dtype, *[jnp.float32] * (len(found) - 2), dtype]
    for mine, theirs in zip(found, expected, strict=True):
        close(mine.astype(jnp.float32), theirs, 2e-6 if dtype == jnp.float32 else 8e-3)


# ids, rows of the table, how often the same: runs within a block, over two and over many of them, and all in one
RUNS = [(128, 300, 1), (1000, 300, 1), (1000, 300, 30), (1500, 300, 700), (700, 1, 700), (5, 100_000, 1)]


@pytest.mark.usefixtures("as_on")
@pytest.mark.parametrize(("n", "size", "times"), RUNS)
def test_an_embedding_s_gradient_is_the_sum_over_its_positions(n, size, times):
    rng = np.random.default_rng(0)
    ids = rng.permutation(np.repeat(rng.integers(0, size, -(-n // times)), times)[:n]).reshape(1, n)
    g = rng.normal(size=(1, n, 8)).astype(np.float32)
    expected = np.zeros((size, 8))
    np.add.at(expected, ids, g.astype(np.float64))
    found = jax.jit(jax.grad(lambda table: (take_rows(table, ids) * g).sum()))(jnp.zeros((size, 8)))
    np.testing.assert_allclose(found, expected, atol=2e-7 * np.abs(g).sum() / len(np.unique(ids)), rtol=1e-6)


def test_loss_never_holds_all_logits():
    """Of 8 chunks; a whole [B, T, V] array would be 8 times as large as all that the compiled gradient needs."""
    chunk_bytes = 4 * 2 * 4096 * 32
    hidden, w = jax.ShapeDtypeStruct((2, 256, 8), jnp.float32), jax.ShapeDtypeStruct((4096, 8), jnp.float32)
    targets, weights = jax.ShapeDtypeStruct((2, 256), jnp.int32), jax.ShapeDtypeStruct((2, 256), jnp.float32)
    gradient = jax.grad(lambda h, w, *rest: loss_sums(h, w, *rest, 5.0, 1e-4, chunk_bytes)[0], (0, 1))
    scratch = jax.jit(gradient).lower(hidden, w, targets, weights).compile().memory_analysis().temp_size_in_bytes
    assert scratch < 4 * 2 * 256 * 4096


def test_fresh_model_guesses_uniformly():
    value, _ = loss_and_grads(SMALL, model_and_params(SMALL)[1], batch(np.random.default_rng(4)))
    assert float(value) / (2 * 48) == pytest.approx(np.log(97), rel=0.01)


def test_bfloat16_is_near_float32():
    data = batch(np.random.default_rng(5))
    graphdef, params = model_and_params(SMALL)
    graphdef16, params16 = model_and_params(SMALL, dtype=jnp.bfloat16)
    assert all(p.dtype == jnp.float32 for p in jax.tree.leaves(params16))
    hidden16 = nnx.merge(graphdef16, params)(data[0], data[2])
    assert hidden16.dtype == jnp.bfloat16
    close(hidden16.astype(jnp.float32), nnx.merge(graphdef, params)(data[0], data[2]), 3e-2)

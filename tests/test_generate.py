"""Text from the key-value cache is what the whole model, run anew for every token, would say."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import documents
from flax import nnx

from jaxlm.config import ModelConfig
from jaxlm.errors import UserError
from jaxlm.generate import CHUNK, filter_logits, generate_text, generate_tokens
from jaxlm.model import Transformer
from jaxlm.tokenizer import Tokenizer

VOCAB, WINDOW, NO_EOS = 61, 24, -1
TINY = ModelConfig(
    vocab_size=VOCAB,
    d_model=16,
    n_heads=2,
    n_layers=2,
    d_ff=32,
    max_seq_len=WINDOW,
    tie_embeddings=False,
    scan_layers=True,
)
MODERN: dict[str, Any] = {
    "norm": "rmsnorm",
    "activation": "swiglu",
    "use_bias": False,
    "n_heads": 4,
    "n_kv_heads": 2,
    "positions": "rotary",
    "rope_scaling": "yarn",
    "rope_scaling_factor": 4.0,
    "rope_original_length": 8,
    "qk_norm": True,
    "logit_softcap": 3.0,
}
PROMPT = [1, 17, 4, 33, 8]
GREEDY: dict[str, Any] = {"temperature": 0.0, "top_k": 0, "top_p": 1.0, "num_samples": 1, "seed": 0}


@functools.cache
def lively(config: ModelConfig) -> Transformer:
    """A model with large random matrices, whose likeliest token changes all the time."""
    model = Transformer(config, rngs=nnx.Rngs(0))
    rng = np.random.default_rng(1)

    def enlarge(path: Any, x: jax.Array) -> jax.Array:
        is_matrix = any("kernel" in str(key) or "embedding" in str(key) for key in path)
        return x + rng.normal(0, 0.3, x.shape).astype(np.float32) if is_matrix else x

    nnx.update(model, jax.tree_util.tree_map_with_path(enlarge, nnx.state(model)))
    rows = model.output_embedding[...]
    model.output_embedding[...] = rows / jnp.linalg.norm(rows, axis=1, keepdims=True)  # no token is favoured
    return model


def generate(model: Transformer, prompt: list[int], max_new_tokens: int, eos_id: int = NO_EOS, **options: Any) -> list:
    graphdef, state = nnx.split(model)
    options = GREEDY | options
    return generate_tokens(graphdef, nnx.to_pure_dict(state), prompt, eos_id, max_new_tokens=max_new_tokens, **options)


@functools.partial(jax.jit, static_argnums=0)
def full_logits(graphdef: Any, params: Any, tokens_BT: jax.Array) -> jax.Array:
    model = nnx.merge(graphdef, params)
    return model.logits(model(tokens_BT))


def next_logits(model: Transformer, tokens: list[int]) -> np.ndarray:
    """float32 [V] after `tokens`, from a full forward pass (padded behind, so that it is compiled once)."""
    graphdef, state = nnx.split(model)
    padded = jnp.array([tokens + [0] * (model.config.max_seq_len - len(tokens))])
    return np.array(full_logits(graphdef, nnx.to_pure_dict(state), padded)[0, len(tokens) - 1])


def reference(model: Transformer, prompt: list[int], count: int) -> list[int]:
    """Greedy decoding without a cache; a full window goes on from its second half."""
    window = model.config.max_seq_len
    seen = prompt[-(window // 2) :] if len(prompt) >= window else list(prompt)
    new: list[int] = []
    while len(new) < count:
        if len(seen) > window:
            seen = seen[-(window // 2) :]
        new.append(int(next_logits(model, seen).argmax()))
        seen.append(new[-1])
    return new


@pytest.mark.parametrize("pre_norm", [True, False], ids=["pre_norm", "post_norm"])
@pytest.mark.parametrize("options", [{"positions": p} for p in ("learned", "sinusoidal", "rotary")] + [MODERN])
def test_cache_gives_what_the_full_pass_gives_beyond_the_window_too(options: dict, pre_norm: bool) -> None:
    model = lively(dataclasses.replace(TINY, **options, pre_norm=pre_norm))
    (new,) = generate(model, PROMPT, 3 * WINDOW)
    assert new == reference(model, PROMPT, 3 * WINDOW)
    assert len(set(new)) > 8, "a model that repeats itself proves nothing"


def test_decoded_logits_are_those_of_the_full_pass_and_capped() -> None:
    """Greedy text shows no cap; the numbers do. The cache holds the shared heads only."""
    model = lively(dataclasses.replace(TINY, **MODERN | {"logit_softcap": 0.1}))
    graphdef, state = nnx.split(model)

    @jax.jit
    def decoded(params: Any, tokens: jax.Array) -> tuple[jax.Array, Any]:
        model = nnx.merge(graphdef, params)
        _, cache = model.prefill(tokens[:, :-1], WINDOW)
        return model.decode(tokens[:, -1:], tokens.shape[1] - 1, cache)

    logits, (keys, _) = decoded(nnx.to_pure_dict(state), jnp.array([PROMPT]))
    np.testing.assert_allclose(logits[0], next_logits(model, PROMPT), atol=1e-5)
    assert 0.09 < np.abs(logits).max() < 0.1 and keys.shape == (2, 1, WINDOW, 2, 4)


def test_longer_than_a_chunk_and_a_step_of_the_prompt() -> None:
    model = lively(dataclasses.replace(TINY, max_seq_len=160, positions="rotary", scan_layers=False))
    prompt = np.random.default_rng(2).integers(3, VOCAB, 70).tolist()
    count = 2 * CHUNK + 5
    assert generate(model, prompt, count) == [reference(model, prompt, count)]


@pytest.mark.parametrize("length", [1, WINDOW - 1, WINDOW, WINDOW + 1, 3 * WINDOW])
def test_prompts_of_any_length(length: int) -> None:
    model = lively(TINY)
    prompt = np.random.default_rng(3).integers(3, VOCAB, length).tolist()
    assert generate(model, prompt, 6) == [reference(model, prompt, 6)]


def test_number_of_tokens() -> None:
    model = lively(TINY)
    (most,) = generate(model, PROMPT, 45)
    for count in (1, 2, WINDOW - len(PROMPT), WINDOW - len(PROMPT) + 1, 45):
        assert generate(model, PROMPT, count) == [most[:count]]


def test_end_of_a_document_ends_the_text() -> None:
    model = lively(TINY)
    (new,) = generate(model, PROMPT, 30)
    end = new[7]
    assert generate(model, PROMPT, 30, eos_id=end) == [new[: new.index(end)]]
    samples = generate(model, PROMPT, 30, temperature=1.5, num_samples=16)
    ended = generate(model, PROMPT, 30, eos_id=end, temperature=1.5, num_samples=16)
    assert ended == [tokens[: tokens.index(end)] if end in tokens else tokens for tokens in samples]
    assert len({len(tokens) for tokens in ended}) > 1, "samples have to end each at its own place"


def test_seeds() -> None:
    model = lively(TINY)
    options = {"temperature": 1.5, "num_samples": 16}
    first = generate(model, PROMPT, 30, seed=5, **options)
    assert first == generate(model, PROMPT, 30, seed=5, **options)
    assert first != generate(model, PROMPT, 30, seed=6, **options)
    assert len({tuple(tokens) for tokens in first}) == 16


@pytest.mark.parametrize("only_one", [{"top_k": 1}, {"top_p": 1e-6}])
def test_one_choice_is_greedy(only_one: dict[str, float]) -> None:
    model = lively(TINY)
    assert generate(model, PROMPT, 30, **{"temperature": 1.5, "seed": 9} | only_one) == generate(model, PROMPT, 30)


@pytest.mark.parametrize(("temperature", "top_k"), [(2.0, 0), (0.5, 5)])
def test_tokens_are_drawn_with_their_probabilities(temperature: float, top_k: int) -> None:
    model, count = lively(TINY), 4000
    drawn = np.ravel(generate(model, PROMPT, 1, temperature=temperature, top_k=top_k, num_samples=count))
    logits = next_logits(model, PROMPT) / temperature
    if top_k:
        logits[np.argsort(logits)[:-top_k]] = -np.inf
    wanted = np.exp(logits - logits.max())
    wanted /= wanted.sum()
    assert np.abs(np.bincount(drawn, minlength=VOCAB) / count - wanted).max() < 4 * np.sqrt(0.25 / count)
    assert set(drawn) <= set(np.flatnonzero(wanted))


@pytest.mark.parametrize("top_k", [0, 1, 7, VOCAB, 500])
@pytest.mark.parametrize("top_p", [1.0, 0.95, 0.5, 0.01])
def test_filter_against_numpy(top_k: int, top_p: float) -> None:
    logits = np.random.default_rng(4).normal(0, 2, (20, VOCAB)).astype(np.float32)
    kept = np.asarray(filter_logits(jnp.asarray(logits), top_k, top_p))
    for row, found in zip(logits, kept, strict=True):
        order = np.argsort(-row)[: top_k or None].tolist()
        probabilities = np.exp(row[order] - row.max()) / np.exp(row[order] - row.max()).sum()
        before = np.cumsum(probabilities) - probabilities
        wanted = {token for token, mass in zip(order, before, strict=True) if mass < top_p or top_p == 1}
        assert set(np.flatnonzero(np.isfinite(found))) == wanted
        np.testing.assert_array_equal(found[sorted(wanted)], row[sorted(wanted)])


# ---- Text


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.train(documents(60, 1), 300)


@pytest.fixture(scope="module")
def model(tokenizer: Tokenizer) -> Transformer:
    return lively(dataclasses.replace(TINY, vocab_size=tokenizer.vocab_size))


def test_text_begins_with_the_prompt(model: Transformer, tokenizer: Tokenizer) -> None:
    options: dict[str, Any] = {"max_new_tokens": 8, "num_samples": 2, "seed": 3}
    samples = generate_text(model, tokenizer, "the café", **options)
    assert len(samples) == 2
    assert all(text.startswith("the café") and len(text) > len("the café") for text in samples)
    assert samples == generate_text(model, tokenizer, "the café", **options)


def test_empty_prompt_begins_a_document(model: Transformer, tokenizer: Tokenizer) -> None:
    (text,) = generate_text(model, tokenizer, "", max_new_tokens=8, temperature=0)
    (ids,) = generate(model, [tokenizer.bos_id], 8, eos_id=tokenizer.eos_id)
    assert text == tokenizer.decode(ids)
    assert ids == reference(model, [tokenizer.bos_id], 8)[: len(ids)]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_new_tokens": 0}, r"^--max_new_tokens \(0\) must be at least 1"),
        ({"num_samples": 0}, r"^--num_samples \(0\)"),
        ({"temperature": -0.1}, r"^--temperature \(-0\.1\)"),
        ({"temperature": float("nan")}, r"^--temperature \(nan\)"),
        ({"temperature": float("inf")}, r"^--temperature \(inf\)"),
        ({"top_k": -1}, r"^--top_k \(-1\)"),
        ({"top_p": 0.0}, r"^--top_p \(0\.0\)"),
        ({"top_p": 1.1}, r"^--top_p \(1\.1\)"),
        ({"seed": -1}, r"^--seed \(-1\)"),
        ({"seed": 2**31}, r"^--seed \(2147483648\)"),
    ],
)
def test_options_out_of_bounds(model: Transformer, tokenizer: Tokenizer, options: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        generate_text(model, tokenizer, "x", **options)

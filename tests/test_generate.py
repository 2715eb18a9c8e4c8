"""Text from the key-value cache is what the whole model, run anew for every token, would say."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import documents, slow
from flax import nnx

from jaxlm.config import ModelConfig
from jaxlm.data.tokenizer import Tokenizer
from jaxlm.errors import UserError
from jaxlm.generation.api import TextGenerator, generate_text, generate_tokens, stream_text
from jaxlm.generation.beams import BeamSearch, beam_search
from jaxlm.generation.decode import CHUNK, Clock, Decoder, empty_caches, write_slot
from jaxlm.generation.options import Ids, make_options
from jaxlm.generation.sampling import choose, filter_logits, next_token, penalize
from jaxlm.model import Transformer

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
    "value_embedding": True,
}
PROMPT = [1, 17, 4, 33, 8]
PROMPTS = [PROMPT, [7], list(range(3, 3 + WINDOW)), [5, 9] * 9, PROMPT, [44, 2, 31]]  # short, long, twice the same


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


def generate(model: Transformer, prompt: list, max_new_tokens: int, eos_id: int = NO_EOS, **options: Any) -> list:
    return generate_tokens(model, prompt, eos_id, **{"temperature": 0, "max_new_tokens": max_new_tokens} | options)


@functools.partial(jax.jit, static_argnums=0)
def full_logits(graphdef: Any, params: Any, tokens_BT: jax.Array) -> jax.Array:
    model = nnx.merge(graphdef, params)
    return model.logits(model(tokens_BT))


def next_logits(model: Transformer, tokens: list[int]) -> np.ndarray:
    """float32 [V] after `tokens`, from a full forward pass (padded behind, so that it is compiled once)."""
    graphdef, state = nnx.split(model)
    padded = jnp.array([tokens + [0] * (model.config.max_seq_len - len(tokens))])
    return np.array(full_logits(graphdef, nnx.to_pure_dict(state), padded)[0, len(tokens) - 1])


def reference(model: Transformer, prompt: list[int], count: int, penalty: float = 1.0) -> list[int]:
    """Greedy decoding without a cache; what outgrows the window goes on from half a window."""
    window, context = model.config.max_seq_len, list(prompt)
    seen = list(prompt)
    while len(context) < len(prompt) + count:
        if len(seen) > window:
            seen = seen[-(window // 2) :]
        logits = next_logits(model, seen)
        there = list(set(context))
        logits[there] = np.where(logits[there] > 0, logits[there] / penalty, logits[there] * penalty)
        seen.append(int(logits.argmax()))
        context.append(seen[-1])
    return context[len(prompt) :]


@pytest.mark.parametrize("pre_norm", [True, slow(False)], ids=["pre_norm", "post_norm"])
@pytest.mark.parametrize(
    "options", [{"positions": "learned"}, {"positions": "sinusoidal"}, slow({"positions": "rotary"}), MODERN]
)
def test_cache_gives_what_the_full_pass_gives_beyond_the_window_too(options: dict, pre_norm: bool) -> None:
    model = lively(dataclasses.replace(TINY, **options, pre_norm=pre_norm))
    (new,) = generate(model, PROMPT, 3 * WINDOW)
    assert new == reference(model, PROMPT, 3 * WINDOW)
    assert len(set(new)) > 8, "a model that repeats itself proves nothing"


def test_decoded_logits_are_those_of_the_full_pass_and_capped() -> None:
    """Greedy text shows no cap; the numbers do. The cache holds the shared heads only."""
    model = lively(dataclasses.replace(TINY, **MODERN | {"logit_softcap": 0.1}))
    graphdef, state = nnx.split(model)
    params = nnx.to_pure_dict(state)
    tokens_1T = jnp.array([PROMPT])
    _, prompt = jax.jit(lambda params: nnx.merge(graphdef, params).prefill(tokens_1T[:, :-1]))(params)
    caches = write_slot(empty_caches(prompt, 1, WINDOW), 0, prompt)
    last_B = jnp.array([len(PROMPT) - 1])
    decode = jax.jit(lambda params: nnx.merge(graphdef, params).decode(tokens_1T[:, -1:], last_B, caches))
    logits_1V, ((keys, _), _) = decode(params)
    np.testing.assert_allclose(logits_1V[0], next_logits(model, PROMPT), atol=1e-5)
    assert 0.09 < np.abs(logits_1V).max() < 0.1 + 1e-6 and keys.shape == (1, 2, WINDOW, 4)


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
    (even,) = generate(model, PROMPT, 40, temperature=1e4)
    assert len(set(even)) > 20, "every position has a number of its own"


@pytest.mark.parametrize("only_one", [{"top_k": 1}, {"top_p": 1e-6}, {"min_p": 1.0}])
def test_one_choice_is_greedy(only_one: dict[str, float]) -> None:
    model = lively(TINY)
    assert generate(model, PROMPT, 30, **{"temperature": 1.5, "seed": 9} | only_one) == generate(model, PROMPT, 30)


@pytest.mark.parametrize(("temperature", "top_k"), [(2.0, 0), (0.5, 5)])
def test_tokens_are_drawn_with_their_probabilities(temperature: float, top_k: int) -> None:
    model, count = lively(TINY), 4000
    drawn = np.ravel(
        generate(model, PROMPT, 1, temperature=temperature, top_k=top_k, num_samples=count, batch_size=count)
    )
    logits = next_logits(model, PROMPT) / temperature
    if top_k:
        logits[np.argsort(logits)[:-top_k]] = -np.inf
    wanted = np.exp(logits - logits.max())
    wanted /= wanted.sum()
    assert np.abs(np.bincount(drawn, minlength=VOCAB) / count - wanted).max() < 4 * np.sqrt(0.25 / count)
    assert set(drawn) <= set(np.flatnonzero(wanted))


def test_prompts_of_different_lengths_do_not_disturb_each_other() -> None:
    """Fewer slots than prompts, so that some begin while others go on; all beyond the window."""
    model, count = lively(dataclasses.replace(TINY, positions="rotary")), 2 * WINDOW
    assert generate(model, PROMPTS, count, batch_size=4) == [reference(model, prompt, count) for prompt in PROMPTS]


def test_a_sample_depends_on_its_own_numbers_alone() -> None:
    model = lively(TINY)
    options: dict[str, Any] = {"temperature": 1.2, "num_samples": 2, "eos_id": 11, "seed": 4}
    together = generate(model, PROMPTS, 40, **options, batch_size=5)
    assert together == generate(model, PROMPTS, 40, **options, batch_size=1)
    assert generate(model, PROMPTS[:2], 40, **options) == together[:4]
    assert len({tuple(tokens) for tokens in together}) == len(together), "also of the prompt that is there twice"


def test_repetition_penalty_against_the_full_pass() -> None:
    model, count = lively(dataclasses.replace(TINY, positions="rotary")), 2 * WINDOW
    wanted = [reference(model, prompt, count, penalty=1.3) for prompt in PROMPTS[:3]]
    assert generate(model, PROMPTS[:3], count, repetition_penalty=1.3, batch_size=2) == wanted
    assert wanted[0] != reference(model, PROMPT, count), "the penalty has to change something"


def test_repetition_penalty_of_either_sign() -> None:
    logits_BV = jnp.array([[2.0, -2.0, 3.0, -3.0], [2.0, -2.0, 3.0, -3.0]])
    seen_BV = jnp.array([[True, True, False, False], [False, False, True, True]])
    penalized = penalize(logits_BV, seen_BV, 4.0)
    np.testing.assert_array_equal(penalized, [[0.5, -8.0, 3.0, -3.0], [2.0, -2.0, 0.75, -12.0]])


@pytest.mark.parametrize("options", [{"temperature": 1.5}, {"num_beams": 3}])
def test_ids_that_stand_for_no_token_are_never_generated(options: dict[str, Any]) -> None:
    model, ids, checked = (
        lively(TINY),
        Ids((NO_EOS,), tuple(range(5, VOCAB))),
        make_options(max_new_tokens=40, **options),
    )
    if checked.num_beams > 1:
        made = beam_search(model, PROMPT, ids, checked, Clock())[0].tokens
    else:
        made = [token for _, tokens, _ in Decoder(model, ids, checked, Clock()).run([PROMPT]) for token in tokens]
    assert len(made) == 40
    assert not set(made) & set(ids.missing), "which are 56 of 61, so a model that knows nothing of it takes some"


@pytest.mark.parametrize("beams", [1, 2])
def test_any_of_several_tokens_ends_a_text(beams: int) -> None:
    model = lively(TINY)
    free = generate(model, PROMPT, 30)[0]
    ends = (free[4], free[2])
    if beams > 1:
        found = beam_search(model, PROMPT, Ids(ends), make_options(max_new_tokens=9, num_beams=beams), Clock())[0]
        assert found.finish_reason == "eos"
        assert not set(found.tokens) & set(ends)
    else:
        ((_, tokens, reason),) = Decoder(model, Ids(ends), make_options(temperature=0.0), Clock()).run([PROMPT])
        assert (tokens, reason) == (free[:2], "eos")
        early = make_options(temperature=0.0, min_new_tokens=6, max_new_tokens=6)
        ((_, tokens, _),) = Decoder(model, Ids(ends), early, Clock()).run([PROMPT])
        assert len(tokens) == 6
        assert not set(tokens) & set(ends)


def test_no_end_before_min_new_tokens() -> None:
    model = lively(TINY)
    (new,) = generate(model, PROMPT, 30)
    (ended,) = generate(model, PROMPT, 30, eos_id=new[3])
    assert len(ended) <= 3
    for least in (4, 9):
        (longer,) = generate(model, PROMPT, 30, eos_id=new[3], min_new_tokens=least)
        assert len(longer) >= least and new[3] not in longer and longer[: len(ended)] == ended


def log_probabilities(model: Transformer, tokens: list[int]) -> np.ndarray:
    logits = next_logits(model, tokens).astype(np.float64)
    return logits - logits.max() - np.log(np.exp(logits - logits.max()).sum())


def test_as_many_beams_as_tokens_find_the_best_of_all_texts() -> None:
    model, end = lively(TINY), 9
    first = log_probabilities(model, PROMPT)
    texts = {(end,): first[end]}
    for token in set(range(VOCAB)) - {end}:
        second = log_probabilities(model, [*PROMPT, token])
        texts |= {(token, last): first[token] + second[last] for last in range(VOCAB)}
    for penalty in (0.0, 1.0, 3.0):
        best = sorted(texts, key=lambda text: -texts[text] / len(text) ** penalty)[:5]
        wanted = [[token for token in text if token != end] for text in best]
        found = generate(model, PROMPT, 2, eos_id=end, num_beams=VOCAB, num_samples=5, length_penalty=penalty)
        assert found == wanted


def test_a_beams_length_counts_its_end() -> None:
    """As in transformers: the score of [7, <eos>] is its log-probability over 2."""
    search = BeamSearch(PROMPT, Ids((2,)), make_options(max_new_tokens=9, num_beams=2, length_penalty=1.0), 10)
    assert search.grow(np.array([-1.0, -2.0, -3.0, -4.0]), np.array([7, 8, 9, 5]))
    search.grow(np.array([-3.0, -4.0, -5.0, -6.0]), np.array([2, 7, 10 + 7, 8]))
    assert [(beam.tokens, beam.score) for beam in search.ended] == [([7], -1.5)]


def test_beams_beyond_the_window() -> None:
    """One beam more than greedy decoding has, and never a lower probability; beams keep their own caches."""
    model, count = lively(dataclasses.replace(TINY, positions="rotary")), 2 * WINDOW

    def score(new: list[int]) -> float:
        total, seen = 0.0, list(PROMPT)
        for token in new:
            seen = seen[-(WINDOW // 2) :] if len(seen) > WINDOW else seen
            total += log_probabilities(model, seen)[token]
            seen.append(token)
        return total

    best, second, third = generate(model, PROMPT, count, num_beams=3, num_samples=3)
    assert len(best) == len(second) == count
    assert score(best) >= score(second) >= score(third)
    assert score(best) > score(reference(model, PROMPT, count))
    beams = beam_search(model, PROMPT, Ids((NO_EOS,)), make_options(max_new_tokens=count, num_beams=3), Clock())
    np.testing.assert_allclose([beam.logprob for beam in beams], [score(best)], rtol=1e-4)


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


@pytest.mark.parametrize("size", [1, 5, 128, 300])
def test_choosing_by_weight(size: int) -> None:
    """Evenly spread numbers come to each index as often as its weight has it; never to one of no weight."""
    weights = np.random.default_rng(5).gamma(0.3, size=size).astype(np.float32)
    weights[1::3] = 0
    count = 5000
    uniform = ((np.arange(count) + 0.5) / count).astype(np.float32)
    chosen = np.asarray(choose(jnp.tile(jnp.asarray(weights), (count, 1)), jnp.asarray(uniform)))
    found = np.bincount(chosen, minlength=size)
    assert not found[weights == 0].any()
    assert np.abs(found - count * weights / weights.sum()).max() <= 1.01


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


def test_several_prompts_and_streaming_give_the_same_texts(model: Transformer, tokenizer: Tokenizer) -> None:
    prompts = ["the café", "", "my old cat"]
    texts = generate_text(model, tokenizer, prompts, max_new_tokens=60, temperature=1.0, seed=3)
    assert [text.startswith(prompt) for text, prompt in zip(texts, prompts, strict=True)] == [True] * 3
    pieces = list(stream_text(model, tokenizer, prompts[0], max_new_tokens=60, temperature=1.0, seed=3))
    assert len(pieces) > 3 and prompts[0] + "".join(pieces) == texts[0]


def test_a_stop_string_ends_a_text_and_is_left_out(model: Transformer, tokenizer: Tokenizer) -> None:
    options: dict[str, Any] = {"max_new_tokens": 60, "temperature": 1.0, "seed": 3}
    (whole,) = TextGenerator(model, tokenizer, make_options(**options)).generate(["the"])
    assert whole.finish_reason == "length" and len(whole.tokens) == 60 and whole.logprob < 0
    stop = whole.text[20:23]
    (stopped,) = TextGenerator(model, tokenizer, make_options(**options, stop=[stop, "never there"])).generate(["the"])
    assert stopped.text == whole.text[: whole.text.index(stop)] and stopped.finish_reason == "stop"
    assert stopped.tokens == whole.tokens[: len(stopped.tokens)]
    # One token more where the last one ends within a character.
    assert stop in tokenizer.decode(stopped.tokens) and stop not in tokenizer.decode(stopped.tokens[:-2])
    assert "".join(stream_text(model, tokenizer, "the", **options, stop=stop)) == stopped.text


def test_the_clock_tells_compiling_from_computing(model: Transformer, tokenizer: Tokenizer) -> None:
    options = make_options(max_new_tokens=37, temperature=0.9, top_k=3)  # which no other test has compiled
    first, again = (TextGenerator(model, tokenizer, options) for _ in range(2))
    for generator in (first, again):
        list(generator.generate(["the café", "my"]))
    assert first.clock.compiling > 0 and again.clock.compiling == 0
    assert again.clock.new.timed == again.clock.new.tokens <= 2 * 37 and again.clock.new.seconds > 0
    assert first.clock.new.timed < first.clock.new.tokens, "what was made while compiling has no rate"
    assert again.clock.slides == 4 and "second half 4 times" in again.clock.summary()


def test_prompt_longer_than_the_window(model: Transformer, tokenizer: Tokenizer) -> None:
    with pytest.raises(
        UserError, match=r"^prompt 2 \(\d+ tokens with <bos>\) exceeds model\.max_seq_len \(24\); shorten"
    ):
        generate_text(model, tokenizer, ["short", "my café " * 24])


@pytest.mark.parametrize("temperature", [1e-38, 1e-31, 1e-29, 1e-3])
def test_next_to_no_temperature_is_the_likeliest(temperature: float) -> None:
    logits, keys = jnp.array([[-40.0, 30.0, 29.0], [5.0, -5.0, 6.0]]), jnp.zeros((2, 2), jnp.uint32)
    found = next_token(logits, keys, jnp.zeros(2, jnp.int32), make_options(temperature=temperature))
    assert found.tolist() == [1, 2]


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
        ({"min_p": 1.5}, r"^--min_p \(1\.5\) must be at most 1"),
        ({"repetition_penalty": 0.0}, r"^--repetition_penalty \(0\.0\) must be greater than 0"),
        ({"top_kk": 1}, r"^--top_kk: unknown option \(did you mean top_k\?\)"),
        ({"min_new_tokens": 9, "max_new_tokens": 8}, r"^--min_new_tokens \(9\) exceeds --max_new_tokens \(8\)"),
        (
            {"num_beams": 2, "temperature": 0.5},
            r"^--num_beams \(2\) takes no samples; set --temperature 0 \(not 0\.5\)",
        ),
        ({"num_beams": 2, "num_samples": 3}, r"^--num_samples \(3\) exceeds --num_beams \(2\)"),
        ({"num_beams": 2, "top_k": 3}, r"^--top_k is for samples, which --num_beams \(2\) takes none of"),
        ({"num_beams": 2, "stop": "x"}, r"^--stop .*leave it or --num_beams out"),
        ({"length_penalty": 2.0}, r"^--length_penalty \(2\.0\) is for beams"),
        ({"stop": ["x", ""]}, r"^--stop \(\) is empty"),
        ({"stop": ""}, r"^--stop \(\) is empty"),
        ({"stop": 5}, r"^--stop \(5\) must be list of text"),
    ],
)
def test_options_out_of_bounds(model: Transformer, tokenizer: Tokenizer, options: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        generate_text(model, tokenizer, "x", **options)

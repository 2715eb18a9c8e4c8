"""Models of the `transformers` library, saved by it and opened by training.init_from: the same numbers.

Run by name, with torch and transformers beside jaxlm: `pytest tests/parity`. Nothing here is skipped: without them the
import fails. Every parameter is random, biases and norms too, since zeros and ones would hide a mistake.

Shapes: B rows, T positions, V vocabulary.
"""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tokenizers
import torch
from flax import nnx
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    MistralConfig,
    PretrainedConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen3Config,
)
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from jaxlm.config import Config, DataConfig, ModelConfig, TrainingConfig, replace_fields
from jaxlm.generation.api import generate_tokens
from jaxlm.interop.architectures import FAMILIES, Family
from jaxlm.interop.families import from_tensors
from jaxlm.interop.pretrained import open_pretrained, with_architecture
from jaxlm.model import Transformer
from jaxlm.model.positions import rotary_frequencies
from jaxlm.parallel.layout import Layout
from jaxlm.parallel.mesh import make_mesh
from jaxlm.parallel.split import path_name
from jaxlm.train.loss import loss_sums
from jaxlm.train.numbers import run_numbers
from jaxlm.train.optim import build_optimizer
from jaxlm.train.step import first_state, make_train_step

ROWS = 2
IDS = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": 0}
GPT2 = {**IDS, "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
LLAMA = {**IDS, "vocab_size": 211, "hidden_size": 32, "num_attention_heads": 4}
LLAMA |= {"num_hidden_layers": 2, "intermediate_size": 72, "max_position_embeddings": 64, "num_key_value_heads": 2}


def gpt2(layers: int, heads: int, d: int, ff: int | None, length: int, vocab: int, **more: Any) -> GPT2Config:
    shape = {"n_layer": layers, "n_head": heads, "n_embd": d, "n_inner": ff, "n_positions": length, "vocab_size": vocab}
    return GPT2Config(**GPT2, **shape, **more)


def rope(kind: str, theta: float = 1e4, **more: Any) -> dict[str, Any]:
    return {"rope_parameters": {"rope_type": kind, "rope_theta": theta, **more}}


CAPS = {"attn_logit_softcapping": 1.5, "final_logit_softcapping": 3.0}  # so low that they matter
NEOX = {key: value for key, value in LLAMA.items() if key != "num_key_value_heads"}
LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 32}
MODELS: dict[str, PretrainedConfig] = {
    "two layers": gpt2(2, 2, 32, None, 48, 300),
    "three layers": gpt2(3, 6, 48, 100, 64, 517, activation_function="relu", layer_norm_epsilon=1e-3),
    "blocks of queries": gpt2(1, 3, 24, 64, 300, 97, tie_word_embeddings=False, activation_function="gelu"),
    "llama": LlamaConfig(**LLAMA, **rope("default", 500.0), rms_norm_eps=1e-3),
    "llama with biases": LlamaConfig(
        **LLAMA | {"num_key_value_heads": 4}, attention_bias=True, mlp_bias=True, tie_word_embeddings=True
    ),
    "llama 3": LlamaConfig(**LLAMA, hidden_act="gelu_pytorch_tanh", **rope("llama3", factor=4.0, **LLAMA3)),
    "llama, linear": LlamaConfig(**LLAMA, **rope("linear", factor=3.0)),
    "llama, yarn": LlamaConfig(**LLAMA, **rope("yarn", factor=4.0, original_max_position_embeddings=16)),
    "mistral": MistralConfig(**LLAMA, sliding_window=40),
    "qwen3": Qwen3Config(**LLAMA, head_dim=8, tie_word_embeddings=True),
    "qwen3, wide heads": Qwen3Config(**LLAMA, head_dim=24),  # as the small ones have: 4 heads of 24 in 32
    "qwen2": Qwen2Config(**LLAMA),
    "llama, narrow heads": LlamaConfig(**LLAMA | {"num_key_value_heads": 4}, head_dim=4),
    "gemma 2": Gemma2Config(**LLAMA, head_dim=24, query_pre_attn_scalar=24, sliding_window=64, **CAPS),
    "pythia": GPTNeoXConfig(**NEOX, rope_parameters={"rope_type": "default", "partial_rotary_factor": 0.5}),
    "neox, in turn": GPTNeoXConfig(**NEOX, use_parallel_residual=False, tie_word_embeddings=True),
}
TRAINED = (
    "two layers",
    "three layers",
    "blocks of queries",
    "llama",
    "qwen3, wide heads",
    "qwen2",
    "gemma 2",
    "pythia",
)  # the others differ in positions only


@dataclasses.dataclass
class Pair:
    """One model twice: `theirs` of transformers, ours as `graphdef` and `params`; and `tokens_BT` for both."""

    theirs: PreTrainedModel
    config: ModelConfig
    family: Family
    graphdef: Any
    params: Any
    tokens_BT: np.ndarray

    def their_logits(self, tokens_BT: np.ndarray) -> np.ndarray:
        """Theirs, float32 [B, T, V]."""
        with torch.no_grad():
            return self.theirs(input_ids=torch.tensor(tokens_BT)).logits.numpy()

    def own_logits(self, *arrays_BT: jax.Array) -> jax.Array:
        """Ours, from tokens and, for a packed row, segments and positions."""

        @jax.jit
        def logits(params: Any, *arrays_BT: jax.Array) -> jax.Array:
            model = nnx.merge(self.graphdef, params)
            return model.logits(model(*arrays_BT))

        return logits(self.params, *arrays_BT)

    def their_weights(self) -> Any:
        return ours_from(weights(self.theirs), self.params, self.family, self.config.n_heads)

    def their_gradients(self) -> Any:
        grads = {name: p.grad for name, p in weights(self.theirs).items()}
        plain = dataclasses.replace(self.family, norm_offset=0.0)  # a gradient is none of a factor less one
        return ours_from(grads, self.params, plain, self.config.n_heads)

    def loss(self, params: Any) -> jax.Array:
        """Ours: nats a target over all next tokens."""
        model = nnx.merge(self.graphdef, params)
        inputs_BT, targets_BT = jnp.asarray(self.tokens_BT[:, :-1]), jnp.asarray(self.tokens_BT[:, 1:])
        weights_BT = jnp.ones(targets_BT.shape, jnp.float32)
        softcap = self.config.logit_softcap
        return loss_sums(model(inputs_BT), model.output_matrix(), targets_BT, weights_BT, softcap)[0] / targets_BT.size


def ours_from(tensors: Mapping[str, torch.Tensor], like: Any, family: Family, heads: int) -> Any:
    """Their tensors as our parameter dict, in which `like` has the shapes."""

    def one(path: Any, x: Any) -> jax.Array:
        read = lambda name: tensors[name].detach().numpy()  # noqa: E731
        return jnp.array(from_tensors(path_name(path), x.shape, family, heads, read))

    return jax.tree_util.tree_map_with_path(one, like)


def weights(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    output = "embed_out.weight" if model.config.model_type == "gpt_neox" else "lm_head.weight"  # as in the file
    return {name.replace("lm_head.weight", output): p for name, p in model.named_parameters()}


def random_model(config: PretrainedConfig) -> PreTrainedModel:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn_like(p))
        for name, p in model.named_parameters():  # or greedy generation would repeat one token
            if name.endswith(tuple(f"{x}.weight" for x in ("wpe", "o_proj", "down_proj", "dense", "dense_4h_to_h"))):
                p.mul_(5)
            if config.model_type == "gemma2" and "post_" in name:  # of a norm behind those
                p.add_(5)
    return model


def save(model: PreTrainedModel, folder: Path) -> None:
    """As a user would have it, with a tokenizer of few tokens."""
    model.save_pretrained(folder, max_shard_size="20KB")
    tokens = {name: i for i, name in enumerate(("<bos>", "<eos>", "a", "b"))}
    tokenizers.Tokenizer(tokenizers.models.WordLevel(tokens, "a")).save(str(folder / "tokenizer.json"))


@pytest.fixture(params=MODELS, ids=lambda name: name.replace(" ", "_"))
def pair(request: pytest.FixtureRequest, tmp_path: Path) -> Pair:
    theirs = random_model(MODELS[request.param])
    save(theirs, tmp_path)
    off = {"model.dropout": 0.0, "model.attention_dropout": 0.0}
    config = with_architecture(replace_fields(Config(), {"training.init_from": str(tmp_path), **off}))
    model = Transformer(config.model, rngs=nnx.Rngs(0))
    own = nnx.to_pure_dict(nnx.state(model))
    source = open_pretrained(config)
    assert source is not None
    source.check(own)
    params = source.params(own, own, 1)
    tokens_BT = np.random.default_rng(1).integers(
        0, config.model.vocab_size, (ROWS, config.model.max_seq_len), np.int32
    )
    return Pair(theirs, config.model, FAMILIES[source.kind], nnx.graphdef(model), params, tokens_BT)


def test_logits(pair: Pair) -> None:
    ours = pair.own_logits(jnp.asarray(pair.tokens_BT))
    np.testing.assert_allclose(ours, pair.their_logits(pair.tokens_BT), rtol=0, atol=1e-4)


def test_documents_of_a_packed_row_equal_documents_alone(pair: Pair) -> None:
    length = pair.config.max_seq_len
    lengths = [length // 3, length // 2, length - length // 3 - length // 2]
    segments_BT = np.tile(np.repeat([1, 2, 3], lengths), (ROWS, 1)).astype(np.int32)
    positions_BT = np.tile(np.concatenate([np.arange(n) for n in lengths]), (ROWS, 1)).astype(np.int32)
    ours = pair.own_logits(*map(jnp.asarray, (pair.tokens_BT, segments_BT, positions_BT)))
    alone = [pair.their_logits(part) for part in np.split(pair.tokens_BT, np.cumsum(lengths)[:-1], axis=1)]
    np.testing.assert_allclose(ours, np.concatenate(alone, axis=1), rtol=0, atol=1e-4)


@pytest.mark.parametrize("pair", TRAINED, indirect=True)
def test_loss_and_gradients(pair: Pair) -> None:
    loss, grads = jax.jit(jax.value_and_grad(pair.loss))(pair.params)
    tokens = torch.tensor(pair.tokens_BT, dtype=torch.long)
    expected = pair.theirs(input_ids=tokens, labels=tokens).loss
    expected.backward()
    assert abs(float(loss) - expected.item()) < 1e-5

    def assert_close(path: Any, ours: jax.Array, theirs: jax.Array) -> None:
        scale = float(jnp.abs(theirs).max())
        assert scale > 0, jax.tree_util.keystr(path)
        np.testing.assert_allclose(ours / scale, theirs / scale, rtol=0, atol=1e-4, err_msg=jax.tree_util.keystr(path))

    jax.tree_util.tree_map_with_path(assert_close, grads, pair.their_gradients())


def test_greedy_generation(pair: Pair) -> None:
    prompt, new = pair.tokens_BT[0, :7].tolist(), 32
    ours = generate_tokens(
        nnx.merge(pair.graphdef, pair.params),
        prompt,
        eos_id=-1,
        max_new_tokens=new,
        temperature=0,
        top_k=0,
        top_p=1.0,
        num_samples=1,
        seed=0,
    )
    ids = torch.tensor([prompt])
    theirs = pair.theirs.generate(
        ids, attention_mask=torch.ones_like(ids), do_sample=False, min_new_tokens=new, max_new_tokens=new
    )
    assert len(set(ours[0])) > 3, "the tokens hardly differ: this would not test much"
    assert ours[0] == theirs[0, len(prompt) :].tolist()


@pytest.mark.parametrize("pair", TRAINED, indirect=True)
@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_adamw_updates(pair: Pair, weight_decay: float) -> None:
    """Three updates from the same gradients (their own: where a gradient is only rounding, Adam would enlarge it)."""
    learning_rate = 1e-3
    training = TrainingConfig(learning_rate=learning_rate, weight_decay=weight_decay, max_grad_norm=1.0)
    optimizer = build_optimizer(training)
    params, state, update = pair.params, optimizer.init(pair.params), jax.jit(optimizer.update)
    torch_optimizer = torch.optim.AdamW(decay_groups(pair.theirs, weight_decay), lr=learning_rate)
    for row in np.random.default_rng(2).integers(0, pair.config.vocab_size, (3, 1, 40)):
        torch_optimizer.zero_grad()
        tokens = torch.tensor(row)
        (100 * pair.theirs(input_ids=tokens, labels=tokens).loss).backward()
        grads = pair.their_gradients()
        assert optax.tree.norm(grads) > 1, "nothing to clip"
        torch.nn.utils.clip_grad_norm_(pair.theirs.parameters(), 1.0)
        torch_optimizer.step()
        updates, state = update(grads, state, params)
        params = jax.tree.map(lambda p, u: p - learning_rate * u, params, updates)
    expected = pair.their_weights()
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=1e-5), params, expected)
    moved = jax.tree.map(lambda a, b: float(jnp.abs(a - b).max()), params, pair.params)
    assert min(jax.tree.leaves(moved)) > learning_rate


def decay_groups(model: PreTrainedModel, weight_decay: float) -> list[dict[str, Any]]:
    """Matrices and embeddings with decay, biases and norms without."""
    matrices = [p for p in model.parameters() if p.ndim == 2]
    vectors = [p for p in model.parameters() if p.ndim == 1]
    return [{"params": matrices, "weight_decay": weight_decay}, {"params": vectors, "weight_decay": 0.0}]


@pytest.mark.parametrize("pair", TRAINED, indirect=True)
def test_training_gives_the_same_losses(pair: Pair) -> None:
    """The train step of a run (clipping, AdamW with decay, constant rate) against the loop that PyTorch users write."""
    steps, rate = 6, 3e-3
    training = TrainingConfig(
        learning_rate=rate, weight_decay=0.1, warmup_steps=0, lr_scheduler="constant", use_amp=False
    )
    config = Config(model=pair.config, training=training, data=DataConfig(max_length=pair.config.max_seq_len))
    layout = Layout(make_mesh(jax.devices()[:1]), 0, pair.params)
    numbers = run_numbers(training)
    state = first_state(pair.params, config, layout, numbers)
    step = jax.jit(make_train_step(pair.graphdef, config, layout))
    inputs_BT = pair.tokens_BT[None, :, :-1]
    batch = {
        "tokens": inputs_BT,
        "targets": pair.tokens_BT[None, :, 1:],
        "segments": np.ones_like(inputs_BT),
        "positions": np.broadcast_to(np.arange(inputs_BT.shape[-1], dtype=np.int32), inputs_BT.shape),
        "rows": np.arange(ROWS, dtype=np.int32)[None],
    }
    tokens = torch.tensor(pair.tokens_BT, dtype=torch.long)
    torch_optimizer = torch.optim.AdamW(decay_groups(pair.theirs, 0.1), lr=rate)
    ours, theirs = [], []
    for _ in range(steps):
        state, metrics = step(state, batch, numbers | {"learning_rate": np.float32(rate)})
        loss = pair.theirs(input_ids=tokens, labels=tokens).loss
        torch_optimizer.zero_grad()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(pair.theirs.parameters(), 1.0)
        torch_optimizer.step()
        ours.append([float(metrics["loss"]), float(metrics["grad_norm"])])
        theirs.append([loss.item(), norm.item()])
    assert theirs[-1][0] < theirs[0][0] - 0.1, "nothing was learned"
    np.testing.assert_allclose(ours, theirs, rtol=3e-5)


@pytest.mark.parametrize(
    ("scaling", "theta", "options"),
    [
        ("linear", 1e4, {"rope_scaling_factor": 4.0}),
        ("llama3", 5e5, {"rope_scaling_factor": 8.0, "rope_original_length": 8192}),
        (
            "llama3",
            1e4,
            {
                "rope_scaling_factor": 32.0,
                "rope_original_length": 1024,
                "rope_low_freq_factor": 2.0,
                "rope_high_freq_factor": 9.0,
            },
        ),
        ("yarn", 1e6, {"rope_scaling_factor": 4.0, "rope_original_length": 32768}),
        ("yarn", 1e4, {"rope_scaling_factor": 1.0, "rope_original_length": 100}),
    ],
)
def test_rotary_frequencies_are_theirs(scaling: str, theta: float, options: dict[str, Any]) -> None:
    config = ModelConfig(
        d_model=256, n_heads=4, positions="rotary", rope_theta=theta, rope_scaling=scaling, max_seq_len=2**17, **options
    )
    theirs = {"rope_type": scaling, "rope_theta": theta, "factor": config.rope_scaling_factor}
    if scaling != "linear":
        theirs["original_max_position_embeddings"] = config.rope_original_length
    if scaling == "llama3":
        theirs |= {"low_freq_factor": config.rope_low_freq_factor, "high_freq_factor": config.rope_high_freq_factor}
    llama = LlamaConfig(
        hidden_size=256, num_attention_heads=4, max_position_embeddings=config.max_seq_len, rope_parameters=theirs
    )
    expected, their_scale = ROPE_INIT_FUNCTIONS[scaling](llama, torch.device("cpu"))
    frequencies, scale = rotary_frequencies(config)
    np.testing.assert_allclose(frequencies, expected.numpy(), rtol=2e-6)
    assert scale == pytest.approx(their_scale, rel=1e-7)

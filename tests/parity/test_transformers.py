"""Our Transformer against the GPT-2 of the `transformers` library: the same weights, the same numbers.

Run by name, with torch and transformers beside jaxlm: `pytest tests/parity`. Nothing here is skipped: without them the
import fails. Every parameter is random, biases and norms too, since zeros and ones would hide a mistake.

Shapes: B rows, T positions, V vocabulary.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch
from flax import nnx
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from jaxlm.config import Config, DataConfig, ModelConfig, TrainingConfig
from jaxlm.generate import generate_tokens
from jaxlm.loss import loss_sums
from jaxlm.model import Transformer
from jaxlm.model.positions import rotary_frequencies
from jaxlm.optim import build_optimizer, build_schedule
from jaxlm.sharding import Layout, make_mesh
from jaxlm.step import init_state, make_train_step

ROWS = 2
SHAPES = {
    "two layers": {"n_layer": 2, "n_head": 2, "n_embd": 32, "n_inner": 128, "n_positions": 48, "vocab_size": 300},
    "three layers": {"n_layer": 3, "n_head": 6, "n_embd": 48, "n_inner": 100, "n_positions": 64, "vocab_size": 517},
    "blocks of queries": {"n_layer": 1, "n_head": 3, "n_embd": 24, "n_inner": 64, "n_positions": 300, "vocab_size": 97},
}


@dataclasses.dataclass
class Pair:
    """One model twice: `theirs` of transformers, ours as `graphdef` and `params`; and `tokens_BT` for both."""

    theirs: GPT2LMHeadModel
    config: ModelConfig
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

    def loss(self, params: Any) -> jax.Array:
        """Ours: nats a target over all next tokens."""
        model = nnx.merge(self.graphdef, params)
        inputs_BT, targets_BT = jnp.asarray(self.tokens_BT[:, :-1]), jnp.asarray(self.tokens_BT[:, 1:])
        weights_BT = jnp.ones(targets_BT.shape, jnp.float32)
        return loss_sums(model(inputs_BT), model.output_matrix(), targets_BT, weights_BT)[0] / targets_BT.size


def ours_from(tensors: Mapping[str, torch.Tensor], n_layers: int) -> Any:
    """GPT-2's tensors (weights, or gradients) as our parameter dict: the layers stacked, the kernels as they are."""

    def array(name: str) -> jax.Array:
        return jnp.array(tensors[name].detach().numpy())

    def stacked(name: str) -> jax.Array:
        return jnp.stack([array(f"h.{layer}.{name}") for layer in range(n_layers)])

    def linear(name: str) -> dict[str, jax.Array]:
        return {"kernel": stacked(f"{name}.weight"), "bias": stacked(f"{name}.bias")}

    def in_three(layer: dict[str, jax.Array]) -> dict[str, jax.Array]:
        """Queries, keys and values on an axis of their own."""
        return {name: x.reshape(*x.shape[:-1], 3, x.shape[-1] // 3) for name, x in layer.items()}

    def norm(name: str) -> dict[str, jax.Array]:
        return {"scale": stacked(f"{name}.weight"), "bias": stacked(f"{name}.bias")}

    blocks = {
        "attention": {"qkv": in_three(linear("attn.c_attn")), "out": linear("attn.c_proj")},
        "mlp": {"up": linear("mlp.c_fc"), "down": linear("mlp.c_proj")},
        "norm1": norm("ln_1"),
        "norm2": norm("ln_2"),
    }
    final_norm = {"scale": array("ln_f.weight"), "bias": array("ln_f.bias")}
    embeddings = {"token_embedding": array("wte.weight"), "position_embedding": array("wpe.weight")}
    return {"blocks": blocks, "final_norm": final_norm, **embeddings}


def weights(model: GPT2LMHeadModel) -> dict[str, torch.Tensor]:
    return dict(model.transformer.named_parameters())


def gradients(model: GPT2LMHeadModel) -> dict[str, torch.Tensor]:
    return {name: p.grad for name, p in weights(model).items()}


@pytest.fixture(params=SHAPES, ids=lambda name: name.replace(" ", "_"))
def pair(request: pytest.FixtureRequest) -> Pair:
    shape = SHAPES[request.param]
    torch.manual_seed(0)
    off = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    ids = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": 0}
    theirs = GPT2LMHeadModel(GPT2Config(**shape, **off, **ids)).eval()
    with torch.no_grad():
        for p in theirs.parameters():
            p.add_(0.1 * torch.randn_like(p))
        theirs.transformer.wpe.weight.mul_(5)  # or greedy generation would repeat one token
    config = ModelConfig(
        vocab_size=shape["vocab_size"],
        d_model=shape["n_embd"],
        n_heads=shape["n_head"],
        n_layers=shape["n_layer"],
        d_ff=shape["n_inner"],
        max_seq_len=shape["n_positions"],
        dropout=0.0,
        attention_dropout=0.0,
    )
    model = Transformer(config, rngs=nnx.Rngs(0))
    params = ours_from(weights(theirs), config.n_layers)
    own = nnx.to_pure_dict(nnx.state(model))
    assert jax.tree.map(jnp.shape, params) == jax.tree.map(jnp.shape, own)
    tokens_BT = np.random.default_rng(1).integers(0, config.vocab_size, (ROWS, config.max_seq_len), np.int32)
    return Pair(theirs, config, nnx.graphdef(model), params, tokens_BT)


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

    jax.tree_util.tree_map_with_path(assert_close, grads, ours_from(gradients(pair.theirs), pair.config.n_layers))


def test_greedy_generation(pair: Pair) -> None:
    prompt, new = pair.tokens_BT[0, :7].tolist(), 32
    ours = generate_tokens(
        pair.graphdef,
        pair.params,
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
        grads = ours_from(gradients(pair.theirs), pair.config.n_layers)
        assert optax.tree.norm(grads) > 1, "nothing to clip"
        torch.nn.utils.clip_grad_norm_(pair.theirs.parameters(), 1.0)
        torch_optimizer.step()
        updates, state = update(grads, state, params)
        params = jax.tree.map(lambda p, u: p - learning_rate * u, params, updates)
    expected = ours_from(weights(pair.theirs), pair.config.n_layers)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=1e-5), params, expected)
    moved = jax.tree.map(lambda a, b: float(jnp.abs(a - b).max()), params, pair.params)
    assert min(jax.tree.leaves(moved)) > learning_rate


def decay_groups(model: GPT2LMHeadModel, weight_decay: float) -> list[dict[str, Any]]:
    """Matrices and embeddings with decay, biases and norms without."""
    matrices = [p for p in model.parameters() if p.ndim == 2]
    vectors = [p for p in model.parameters() if p.ndim == 1]
    return [{"params": matrices, "weight_decay": weight_decay}, {"params": vectors, "weight_decay": 0.0}]


def test_training_gives_the_same_losses(pair: Pair) -> None:
    """The train step of a run (clipping, AdamW with decay, constant rate) against the loop that PyTorch users write."""
    steps, rate = 6, 3e-3
    training = TrainingConfig(
        learning_rate=rate, weight_decay=0.1, warmup_steps=0, lr_scheduler="constant", use_amp=False
    )
    config = Config(model=pair.config, training=training, data=DataConfig(max_length=pair.config.max_seq_len))
    layout = Layout(make_mesh(jax.devices()[:1]), 0, pair.params)
    state = init_state(nnx.merge(pair.graphdef, pair.params), build_optimizer(training), config, layout)
    step = jax.jit(make_train_step(pair.graphdef, config, build_schedule(training, steps), layout))
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
        state, metrics = step(state, batch)
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

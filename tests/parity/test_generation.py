"""Our decoding against `transformers.generate`: the same random small GPT-2, the same tokens.

Run by name, with torch and transformers beside jaxlm: `pytest -o addopts= tests/parity`.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx
from transformers import GPT2Config, GPT2LMHeadModel

from jaxlm.config import ModelConfig
from jaxlm.generation.api import generate_tokens
from jaxlm.model import Transformer

VOCAB, LAYERS, HEADS, WIDTH, WINDOW = 97, 2, 2, 32, 64
PROMPTS = [[5, 17, 3, 88, 41], [9], [60, 2, 60, 2, 60, 2, 60]]


@pytest.fixture(scope="module")
def theirs() -> GPT2LMHeadModel:
    torch.manual_seed(0)
    shape = {"n_layer": LAYERS, "n_head": HEADS, "n_embd": WIDTH, "n_positions": WINDOW, "vocab_size": VOCAB}
    off = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    ids = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": 0}
    model = GPT2LMHeadModel(GPT2Config(**shape, **off, **ids)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.15 * torch.randn_like(parameter))
        model.transformer.wpe.weight.mul_(5)  # or the text would repeat one token
    return model


@pytest.fixture(scope="module")
def ours(theirs: GPT2LMHeadModel) -> Transformer:
    """Each of our parameters is theirs of the name below, layers stacked."""
    config = ModelConfig(
        vocab_size=VOCAB, d_model=WIDTH, n_heads=HEADS, n_layers=LAYERS, d_ff=4 * WIDTH, max_seq_len=WINDOW
    )
    graphdef, state = nnx.split(Transformer(config, rngs=nnx.Rngs(0)))
    tensors = {name: jnp.array(p.detach().numpy()) for name, p in theirs.transformer.named_parameters()}
    rooms = {"attention.qkv": "attn.c_attn", "attention.out": "attn.c_proj", "mlp.up": "mlp.c_fc"}
    rooms |= {"mlp.down": "mlp.c_proj", "norm1": "ln_1", "norm2": "ln_2"}
    top = {"final_norm.scale": "ln_f.weight", "final_norm.bias": "ln_f.bias"}
    top |= {"token_embedding": "wte.weight", "position_embedding": "wpe.weight"}

    def find(path: Any, own: jax.Array) -> jax.Array:
        name = ".".join(key.key for key in path)
        if not name.startswith("blocks."):
            return tensors[top[name]]
        room, _, leaf = name.removeprefix("blocks.").rpartition(".")
        inner = f"{rooms[room]}.{'bias' if leaf == 'bias' else 'weight'}"
        return jnp.stack([tensors[f"h.{layer}.{inner}"] for layer in range(LAYERS)]).reshape(own.shape)

    return nnx.merge(graphdef, jax.tree_util.tree_map_with_path(find, nnx.to_pure_dict(state)))


def generated(model: GPT2LMHeadModel, prompt: list[int], new: int, **options: Any) -> list[list[int]]:
    ids = torch.tensor([prompt])
    rows = model.generate(
        ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=new, pad_token_id=0, **options
    )
    return rows[:, len(prompt) :].tolist()


@pytest.mark.parametrize("penalty", [1.0, 1.4, 0.8])
def test_greedy_with_repetition_penalty(theirs: GPT2LMHeadModel, ours: Transformer, penalty: float) -> None:
    found = generate_tokens(ours, PROMPTS, -1, max_new_tokens=40, temperature=0, repetition_penalty=penalty)
    wanted = [generated(theirs, prompt, 40, repetition_penalty=penalty)[0] for prompt in PROMPTS]
    assert found == wanted
    assert len({token for row in wanted for token in row}) > 8, "the tokens hardly differ: this would not test much"


@pytest.mark.parametrize("options", [{}, {"repetition_penalty": 1.3}, {"min_new_tokens": 6}], ids=str)
@pytest.mark.parametrize("length_penalty", [1.0, 0.0, 2.5])
def test_beam_search(
    theirs: GPT2LMHeadModel, ours: Transformer, length_penalty: float, options: dict[str, Any]
) -> None:
    ended, new, beams = set(), 24, 4
    for prompt in PROMPTS:
        for eos_id in (generated(theirs, prompt, 12)[0][7], 30, 55):  # one that greedy decoding comes to, and others
            both: dict[str, Any] = {"num_beams": beams, "length_penalty": length_penalty, **options}
            found = generate_tokens(ours, prompt, eos_id, max_new_tokens=new, num_samples=beams, **both)
            rows = generated(theirs, prompt, new, eos_token_id=eos_id, num_return_sequences=beams, **both)
            assert found == [row[: row.index(eos_id)] if eos_id in row else row for row in rows]
            ended |= {len(row) < new for row in found}
    assert ended == {True, False} or length_penalty, "some end early, others are as long as they may be"


def test_beam_search_without_an_end(theirs: GPT2LMHeadModel, ours: Transformer) -> None:
    found = generate_tokens(ours, PROMPTS, -1, max_new_tokens=30, num_beams=3, num_samples=3)
    wanted = [row for prompt in PROMPTS for row in generated(theirs, prompt, 30, num_beams=3, num_return_sequences=3)]
    assert found == wanted
    greedy = generate_tokens(ours, PROMPTS, -1, max_new_tokens=30, temperature=0)
    assert found[::3] != greedy, "beams have to find something else"
    assert np.unique(np.ravel(found)).size > 8

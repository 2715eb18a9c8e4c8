"""Folders that scripts/export.py writes, opened by the real `transformers`: AutoModelForCausalLM and AutoTokenizer.

Shapes: B rows, T positions.
"""

import dataclasses
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
import torch
import transformers
from conftest import documents
from flax import nnx
from transformers import AutoModelForCausalLM, AutoTokenizer

from jaxlm.checkpoints.items import Progress
from jaxlm.checkpoints.load import LoadedModel
from jaxlm.config import Config, DataConfig, ModelConfig, TrainingConfig, replace_fields
from jaxlm.data.chat_tokens import chat_template, with_template
from jaxlm.data.tokenizer import Tokenizer
from jaxlm.generation.api import encode_prompts, generate_text
from jaxlm.interop import export, pretrained
from jaxlm.interop.architectures import ARCHITECTURE, FAMILIES, Family
from jaxlm.interop.families import family_for
from jaxlm.model import Transformer
from jaxlm.parallel.split import path_name

SMALL = {"vocab_size": 320, "d_model": 32, "n_heads": 4, "n_layers": 2, "d_ff": 48, "max_seq_len": 40}
LLAMA = {**SMALL, "norm": "rmsnorm", "use_bias": False, "activation": "swiglu", "positions": "rotary"}
STRETCHED = {"rope_scaling_factor": 4.0, "rope_original_length": 16}
GEMMA2 = {"sandwich_norm": True, "scale_embeddings": True, "activation": "geglu"}
GEMMA2 |= {"attention_softcap": 2.0, "logit_softcap": 9.0}
NEOX = {"positions": "rotary", "activation": "gelu_exact", "tie_embeddings": False}
MODELS: dict[str, dict[str, Any]] = {
    "gpt2": {**SMALL, "vocab_size": 310},
    "gpt2, own output": {**SMALL, "tie_embeddings": False, "activation": "gelu_exact", "norm_epsilon": 1e-2},
    "gpt2, swish": {**SMALL, "activation": "swish"},
    "gpt2, relu2": {**SMALL, "activation": "relu2"},
    "llama": {**LLAMA, "n_kv_heads": 2, "tie_embeddings": False, "rope_theta": 300.0, "norm_epsilon": 1e-2},
    "llama, tied, biases": {**LLAMA, "use_bias": True, "activation": "geglu"},
    "llama 3": {**LLAMA, "rope_scaling": "llama3", "rope_high_freq_factor": 8.0, **STRETCHED},
    "llama, yarn": {**LLAMA, "rope_scaling": "yarn", **STRETCHED},
    "llama, linear": {**LLAMA, "rope_scaling": "linear", "rope_scaling_factor": 2.5},
    "llama, square": {**LLAMA, "d_ff": LLAMA["d_model"]},
    "qwen3": {**LLAMA, "n_kv_heads": 1, "qk_norm": True, "head_dim": 6},
    "qwen2": {**LLAMA, "n_kv_heads": 1, "qkv_bias": True},
    "gemma 2": {**LLAMA, **GEMMA2, "n_kv_heads": 2, "head_dim": 12},
    "pythia": {**SMALL, **NEOX, "rotary_fraction": 0.25, "parallel_residual": True},
    "neox, stretched": {**SMALL, **NEOX, "rotary_fraction": 0.5, "rope_scaling": "yarn", **STRETCHED},
}


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.train(documents(20, 1), 300)  # the models have more rows than that


def loaded_model(options: dict[str, Any], tokenizer: Tokenizer) -> LoadedModel:
    """All parameters random, biases and norms too, and large enough for greedy text that does not repeat itself."""
    config = Config(ModelConfig(**options), TrainingConfig(use_amp=False), DataConfig(max_length=16))
    model = Transformer(config.model, rngs=nnx.Rngs(0))
    rng = np.random.default_rng(0)

    def noisy(path: Any, x: jax.Array) -> jax.Array:
        name = path_name(path)
        scale = 0.5 if "embedding" in name else 1.0 if name.endswith(("out/kernel", "down/kernel")) else 0.2
        return x + scale * jax.numpy.asarray(rng.normal(size=x.shape), x.dtype)

    nnx.update(model, jax.tree_util.tree_map_with_path(noisy, nnx.to_pure_dict(nnx.state(model))))
    return LoadedModel(model, tokenizer, config, Progress(7, 9, 3.5, 300, "f" * 64, 8, 1))


def exported(folder: Path, loaded: LoadedModel, size: int = 10**9, dtype: str = "float32") -> str:
    export.export(loaded, folder / "run" / "best_model", folder / "out", max_shard_size=size, dtype=dtype)
    return str(folder / "out")


def logits_of_both(loaded: LoadedModel, folder: str) -> tuple[np.ndarray, np.ndarray]:
    config = loaded.config.model
    tokens_BT = np.random.default_rng(1).integers(0, config.vocab_size, (2, config.max_seq_len), np.int32)
    theirs = AutoModelForCausalLM.from_pretrained(folder).eval()
    with torch.no_grad():
        their_logits = theirs(input_ids=torch.tensor(tokens_BT)).logits.float().numpy()
    return np.asarray(loaded.model.logits(loaded.model(tokens_BT))), their_logits


@pytest.mark.parametrize("size", [10**9, 20_000], ids=["one_file", "several_files"])
@pytest.mark.parametrize("name", MODELS)
def test_logits(tmp_path: Path, tokenizer: Tokenizer, name: str, size: int) -> None:
    loaded = loaded_model(MODELS[name], tokenizer)
    folder = exported(tmp_path, loaded, size)
    assert (tmp_path / "out" / "model.safetensors.index.json").exists() == (size < 10**9)
    ours, theirs = logits_of_both(loaded, folder)
    assert np.abs(ours).max() > 1
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-4)


def swapped(keys: dict[str, str], a: str, b: str) -> dict[str, str]:
    return {module: {a: keys[b], b: keys[a]}.get(module, name) for module, name in keys.items()}


def reversed_parts(modules: dict[str, str], module: str) -> dict[str, str]:
    return modules | {module: " ".join(reversed(modules[module].split()))}


FAULTS: dict[str, tuple[str, Callable[[Family], Family]]] = {
    "norms swapped": (
        "gpt2",
        lambda f: dataclasses.replace(f, modules=swapped(f.modules, "blocks/norm1", "blocks/norm2")),
    ),
    "queries and values swapped": (
        "llama 3",
        lambda f: dataclasses.replace(f, modules=reversed_parts(f.modules, "blocks/attention/qkv")),
    ),
    "keys and values swapped": (
        "llama",
        lambda f: dataclasses.replace(f, modules=reversed_parts(f.modules, "blocks/attention/kv")),
    ),
    "gate swapped": ("qwen3", lambda f: dataclasses.replace(f, modules=reversed_parts(f.modules, "blocks/mlp/up"))),
    "square matrices transposed": ("llama, square", lambda f: dataclasses.replace(f, transposed=False)),
    "another activation": ("gpt2", lambda f: dataclasses.replace(f, activations={"gelu": "relu"})),
    "another epsilon": (
        "llama",
        lambda f: dataclasses.replace(f, keys={k: v for k, v in f.keys.items() if k != "norm_epsilon"}),
    ),
    "positions not stretched": (
        "llama 3",
        lambda f: dataclasses.replace(f, rope={}),
    ),
}


@pytest.mark.parametrize("name", FAULTS)
def test_faults_in_the_mapping_are_noticed(
    tmp_path: Path, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    model, fault = FAULTS[name]
    loaded = loaded_model(MODELS[model], tokenizer)
    monkeypatch.setattr(export, "family_for", lambda config, where: fault(family_for(config, where)))
    folder = exported(tmp_path, loaded)
    ours, theirs = logits_of_both(loaded, folder)
    assert np.abs(ours - theirs).max() > 1e-3


@pytest.mark.parametrize("name", ["gpt2", "llama", "qwen3"])
def test_greedy_text(tmp_path: Path, tokenizer: Tokenizer, name: str) -> None:
    """From text to text: tokenizer, <bos>, model, end of text."""
    loaded = loaded_model(MODELS[name] | {"vocab_size": 300}, tokenizer)
    folder = exported(tmp_path, loaded)
    theirs, their_tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    seen = set()
    for prompt in ("the café", " old", "x\n\n<eos>"):
        inputs = their_tokenizer(prompt, return_tensors="pt")
        ids = theirs.generate(**inputs, do_sample=False, max_new_tokens=24)[0, inputs["input_ids"].shape[1] :]
        (ours,) = generate_text(loaded.model, tokenizer, prompt, max_new_tokens=24, temperature=0)
        assert ours == prompt + their_tokenizer.decode(ids, skip_special_tokens=True)
        seen.update(ids.tolist())
    assert len(seen) > 6, "the tokens hardly differ: this would not test much"


AWKWARD = [
    "",
    " ",
    "the café",
    "  two leading, two trailing  ",
    "tabs\t\r\n\n\nlines \n \n",
    "naïve é 你好 🙂‍↔️ \x00\x7f ﷽ \u200b\ufeff",
    "don 't , do n't ! a . b",  # what cleaning up of spaces would change
    "<bos>a</s><eos><pad> <|endoftext|>",
]


@pytest.mark.parametrize("name", ["gpt2", "llama", "qwen3", "qwen2", "gemma 2", "pythia"])
def test_the_tokenizer_gives_the_same_ids(tmp_path: Path, tokenizer: Tokenizer, name: str) -> None:
    """As the model card opens it."""
    folder = Path(exported(tmp_path, loaded_model(MODELS[name], tokenizer)))
    opens = re.search(r"^tokenizer = (\w+)\.from_pretrained", (folder / "README.md").read_text(), re.MULTILINE)
    assert opens is not None
    theirs = getattr(transformers, opens[1]).from_pretrained(folder)
    assert [*theirs("the café")] == theirs.model_input_names == ["input_ids", "attention_mask"]
    assert theirs.unk_token == theirs.eos_token  # without one CTranslate2 can't open a GPT-2
    for text in AWKWARD:
        ids = tokenizer.encode(text)
        assert theirs(text)["input_ids"] == [tokenizer.bos_id, *ids]
        assert theirs(text, add_special_tokens=False)["input_ids"] == ids
        assert theirs.decode(ids) == tokenizer.decode(ids) == text
        assert theirs.decode([1, *ids, 2], skip_special_tokens=True) == text
    assert (theirs.pad_token_id, theirs.bos_token_id, theirs.eos_token_id) == (0, 1, 2)
    assert theirs.model_max_length == SMALL["max_seq_len"]
    padded = theirs(["a", "the café"], padding=True)
    assert padded["input_ids"][0][-1] == 0 and padded["attention_mask"][0][-1] == 0


@pytest.mark.parametrize("name", ["gpt2, own output", "llama", "llama 3", "qwen3", "gemma 2", "pythia"])
def test_what_transformers_saves_again_is_read_bit_for_bit(tmp_path: Path, tokenizer: Tokenizer, name: str) -> None:
    """Ours -> theirs -> saved by theirs -> ours."""
    loaded = loaded_model(MODELS[name], tokenizer)
    folder = exported(tmp_path, loaded)
    AutoModelForCausalLM.from_pretrained(folder).save_pretrained(tmp_path / "again", max_shard_size="20KB")
    AutoTokenizer.from_pretrained(folder).save_pretrained(tmp_path / "again")
    asked = replace_fields(Config(), {"training.init_from": str(tmp_path / "again")})
    config = pretrained.with_architecture(asked)
    assert {f: dataclasses.asdict(config.model)[f] for f in ARCHITECTURE} == {
        f: dataclasses.asdict(loaded.config.model)[f] for f in ARCHITECTURE
    }
    source = pretrained.open_pretrained(config)
    assert source is not None and source.kind in FAMILIES
    assert source.tokenizer is not None and source.tokenizer.agrees_with(tokenizer)
    own = nnx.to_pure_dict(nnx.state(loaded.model))
    source.check(own)
    jax.tree.map(np.testing.assert_array_equal, source.params(own, own, 1), own)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_16_bits(tmp_path: Path, tokenizer: Tokenizer, dtype: str) -> None:
    loaded = loaded_model(MODELS["llama"], tokenizer)
    folder = exported(tmp_path, loaded, dtype=dtype)
    assert AutoModelForCausalLM.from_pretrained(folder).dtype == getattr(torch, dtype)
    wide = AutoModelForCausalLM.from_pretrained(folder, dtype="float32").eval()
    tokens = np.arange(20, dtype=np.int32)[None]
    with torch.no_grad():
        theirs = wide(input_ids=torch.tensor(tokens)).logits.numpy()
    ours = np.asarray(loaded.model.logits(loaded.model(tokens)))
    assert np.corrcoef(ours.ravel(), theirs.ravel())[0, 1] > 0.999


def test_a_chat_template_is_carried(tmp_path: Path, tokenizer: Tokenizer) -> None:
    """A model that was tuned here is asked the same there, special tokens that a user writes out included."""
    own = with_template(tokenizer, chat_template(DataConfig(chat_template="plain"), tokenizer))
    theirs = AutoTokenizer.from_pretrained(exported(tmp_path, loaded_model(SMALL, own)))
    turns = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "  x = 1 # <eos> é\n"}]
    found = theirs.apply_chat_template(turns, tokenize=True, add_generation_prompt=True, return_dict=True)
    assert encode_prompts(own, [turns], 10**6) == [found["input_ids"]]

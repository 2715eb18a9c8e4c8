"""Export for transformers, and starting from such a folder, both without torch: tests/parity runs the real library.

Every parameter is random, biases and norms too, since zeros and ones would hide a mistake.
"""

import dataclasses
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import urllib.parse
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, ClassVar

import jax
import numpy as np
import pytest
import tokenizers
import yaml
from conftest import documents, make_config
from flax import nnx
from flax.traverse_util import flatten_dict
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from jaxlm import Trainer, load
from jaxlm.checkpoints.items import Progress
from jaxlm.checkpoints.load import LoadedModel
from jaxlm.config import Config, DataConfig, ModelConfig, TrainingConfig, replace_fields
from jaxlm.data.special_tokens import CONFIG, GENERATION, OWN
from jaxlm.data.tokenizer import Tokenizer
from jaxlm.errors import UserError
from jaxlm.interop import export, pretrained
from jaxlm.interop.architectures import ARCHITECTURE, DROPOUTS, FAMILIES, PARTIAL, ROPE_TYPES
from jaxlm.interop.families import family_for, from_config
from jaxlm.model import Transformer

SMALL = {"vocab_size": 300, "d_model": 16, "n_heads": 4, "n_layers": 2, "d_ff": 24, "max_seq_len": 32}
LLAMA = {**SMALL, "dropout": 0.0, "norm": "rmsnorm", "use_bias": False, "activation": "swiglu", "positions": "rotary"}
GEMMA2: dict[str, Any] = {"sandwich_norm": True, "scale_embeddings": True, "activation": "geglu"}
GEMMA2 |= {"attention_softcap": 50.0, "logit_softcap": 30.0}
SHAPES = {
    "gpt2": SMALL,
    "gpt2, own output, relu": {**SMALL, "tie_embeddings": False, "activation": "relu", "norm_epsilon": 1e-6},
    "gpt2, more rows than tokens": {**SMALL, "vocab_size": 320},
    "llama": {**LLAMA, "n_kv_heads": 2, "tie_embeddings": False, "rope_theta": 5e5},
    "llama, as many key heads, biases": {**LLAMA, "use_bias": True, "activation": "geglu"},
    "llama 3's positions": {**LLAMA, "rope_scaling": "llama3", "rope_scaling_factor": 8.0, "rope_original_length": 16},
    "llama, yarn": {**LLAMA, "rope_scaling": "yarn", "rope_scaling_factor": 4.0, "rope_original_length": 8},
    "llama, linear": {**LLAMA, "rope_scaling": "linear", "rope_scaling_factor": 2.5},
    "qwen3": {**LLAMA, "n_kv_heads": 1, "qk_norm": True},
    "qwen3, wide heads": {**LLAMA, "n_kv_heads": 1, "qk_norm": True, "head_dim": 6},
    "qwen2": {**LLAMA, "n_kv_heads": 2, "qkv_bias": True},
    "gemma2": {**LLAMA, **GEMMA2, "n_kv_heads": 2, "head_dim": 6},
    "neox": {**SMALL, "positions": "rotary", "rotary_fraction": 0.5, "parallel_residual": True, "rope_theta": 500.0},
}
CLASSES = {"gpt2": "GPT2LMHeadModel", "llama": "LlamaForCausalLM"}
CLASSES |= {"qwen3": "Qwen3ForCausalLM", "qwen2": "Qwen2ForCausalLM"}
CLASSES |= {"gemma2": "Gemma2ForCausalLM", "neox": "GPTNeoXForCausalLM"}


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.train(documents(20, 1), 300)


def abstract_params(model: ModelConfig) -> Any:
    """The parameters' shapes, as the trainer has them for `check`."""
    return nnx.to_pure_dict(nnx.state(nnx.eval_shape(lambda: Transformer(model, rngs=nnx.Rngs(0)))))


def random_model(model: ModelConfig, tokenizer: Tokenizer) -> LoadedModel:
    """As `load` returns it, with parameters from numpy: nothing is compiled."""
    graphdef = nnx.graphdef(nnx.eval_shape(lambda: Transformer(model, rngs=nnx.Rngs(0))))
    rng = np.random.default_rng(0)
    made = jax.tree.map(lambda x: jax.numpy.asarray(rng.normal(size=x.shape), x.dtype), abstract_params(model))
    progress = Progress(7, 9, 3.5, 300, "f" * 64, 8, 1)
    config = Config(model, TrainingConfig(learning_rate=0.125), DataConfig(max_length=16))
    return LoadedModel(nnx.merge(graphdef, made), tokenizer, config, progress)


def flat(model: Any) -> dict[str, np.ndarray]:
    return {k: np.asarray(x) for k, x in flatten_dict(nnx.to_pure_dict(nnx.state(model)), sep="/").items()}


def exported(tmp_path: Path, loaded: LoadedModel, size: int = 10**9, dtype: str = "float32") -> Path:
    export.export(loaded, tmp_path / "run" / "best_model", tmp_path / "out", max_shard_size=size, dtype=dtype)
    return tmp_path / "out"


def read_back(folder: Path, **dotted: Any) -> tuple[Config, dict[str, np.ndarray]]:
    """The configuration of a run that starts from `folder`, and the parameters that it starts with."""
    asked = replace_fields(Config(), {"training.init_from": str(folder), **dotted})
    config = pretrained.with_architecture(asked)
    whole = abstract_params(config.model)
    one = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    held = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=one), whole)
    source = pretrained.open_pretrained(config)
    assert source is not None
    source.check(whole)
    return config, {k: np.asarray(x) for k, x in flatten_dict(source.params(whole, held, 1), sep="/").items()}


def rewrite(folder: Path, **keys: Any) -> Path:
    """Changes keys of config.json; ... removes one."""
    config = json.loads((folder / "config.json").read_text()) | keys
    (folder / "config.json").write_text(json.dumps({k: v for k, v in config.items() if v is not ...}))
    return folder


def retensor(folder: Path, change: Any) -> Path:
    """Replaces the tensors by what `change` makes of them."""
    file = folder / "model.safetensors"
    save_file(change(load_file(file)), file)
    return folder


@pytest.mark.parametrize("name", SHAPES)
def test_what_is_exported_is_read_back_bit_for_bit(
    tmp_path: Path, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """What memory held before is never computed with: here it is numbers whose use is a warning."""
    empty = np.empty

    def unset(*args: Any, **kwargs: Any) -> np.ndarray:
        x = empty(*args, **kwargs)
        if x.dtype == np.float32:
            x.view(np.uint32)[...] = 0x7FA00000  # a signalling NaN
        return x

    monkeypatch.setattr(np, "empty", unset)
    loaded = random_model(ModelConfig(**SHAPES[name]), tokenizer)
    folder = exported(tmp_path, loaded)
    assert json.loads((folder / "config.json").read_text())["architectures"] == [CLASSES[name.split(",")[0].split()[0]]]
    config, params = read_back(folder)
    assert config.model == loaded.config.model
    expected = flat(loaded.model)
    assert params.keys() == expected.keys()
    for path, x in expected.items():
        lost = 2**-22 if name == "gemma2" and path.endswith("/scale") else 0  # there a norm holds its factor less one
        np.testing.assert_allclose(params[path], x, rtol=0, atol=lost, err_msg=path)


def test_a_folder_in_several_files(tmp_path: Path, tokenizer: Tokenizer) -> None:
    loaded = random_model(ModelConfig(**SMALL), tokenizer)
    folder = exported(tmp_path, loaded, size=6_000)
    files = sorted(path.name for path in folder.glob("*.safetensors"))
    assert len(files) > 3 and files[0] == f"model-00001-of-{len(files):05}.safetensors"
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"].values()) == set(files)
    stored = {name: file for file in files for name in load_file(folder / file)}
    assert index["weight_map"] == stored and index["metadata"]["total_size"] == 4 * sum(
        x.size for x in flat(loaded.model).values()
    )
    embedding = folder / stored["transformer.wte.weight"]  # 19,200 bytes, more than asked for
    assert all(file.stat().st_size <= 7_000 for file in folder.glob("*.safetensors") if file != embedding)
    np.testing.assert_array_equal(read_back(folder)[1]["token_embedding"], flat(loaded.model)["token_embedding"])
    (folder / files[-1]).unlink()
    with pytest.raises(UserError, match=rf"^training\.init_from \({folder}\): {files[-1]} is not readable"):
        read_back(folder)


@pytest.mark.parametrize(("dtype", "bits"), [("bfloat16", 8), ("float16", 11)])
def test_parameters_of_16_bits(tmp_path: Path, tokenizer: Tokenizer, dtype: str, bits: int) -> None:
    loaded = random_model(ModelConfig(**LLAMA), tokenizer)
    folder = exported(tmp_path, loaded, dtype=dtype)
    assert {str(x.dtype) for x in load_file(folder / "model.safetensors").values()} == {dtype}
    assert json.loads((folder / "config.json").read_text())["dtype"] == dtype
    for path, x in read_back(folder)[1].items():
        assert x.dtype == np.float32
        np.testing.assert_allclose(x, flat(loaded.model)[path], rtol=2.0**-bits, atol=1e-7)


def test_too_large_for_float16(tmp_path: Path, tokenizer: Tokenizer) -> None:
    loaded = random_model(ModelConfig(**SMALL), tokenizer)
    loaded.model.token_embedding[...] = loaded.model.token_embedding[...] * 1e5
    with pytest.raises(UserError, match=r"^--dtype \(float16\) is too small"):
        exported(tmp_path, loaded, dtype="float16")
    assert list(tmp_path.iterdir()) == []


def test_the_mapping_says_something_about_every_option_of_the_model() -> None:
    """A new field of ModelConfig has to be found in every class, or be what all of its models have."""
    for family in FAMILIES.values():
        rope = {"rope_theta", "rope_scaling"} | {field for keys in ROPE_TYPES.values() for field in keys.values()}
        said = {*family.keys, *family.implied, "activation"} | rope
        assert ("rotary_fraction" in said) != (PARTIAL in family.rope)
        said.add("rotary_fraction")
        assert said == set(ARCHITECTURE), family.architecture


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"pre_norm": False},
            r"^X fits none of transformers' GPT2.*the closest, GPT2LMHeadModel, has no model\.pre_norm false$",
        ),
        ({"positions": "sinusoidal"}, r"the closest, GPT2LMHeadModel, has no model\.positions sinusoidal$"),
        ({"use_bias": False, "n_kv_heads": 2}, r"GPT2LMHeadModel, has no model\.n_kv_heads 2, model\.use_bias false$"),
        ({**LLAMA, "norm": "layernorm"}, r"LlamaForCausalLM, has no model\.norm layernorm$"),
        ({**LLAMA, "activation": "gelu"}, r"LlamaForCausalLM, has no model\.activation gelu$"),
        ({**LLAMA, "logit_softcap": 30.0}, r"LlamaForCausalLM, has no model\.logit_softcap 30\.0$"),
        ({**LLAMA, "qk_norm": True, "use_bias": True}, r"has no model\.qk_norm true$|has no model\.use_bias true$"),
    ],
)
def test_models_that_transformers_does_not_have(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        family_for(ModelConfig(**{**SMALL, **options}), "X")


GPT2_CONFIG = {"architectures": ["GPT2LMHeadModel"], "vocab_size": 300, "n_embd": 16, "n_head": 4, "n_layer": 2}
GPT2_CONFIG |= {"n_positions": 32, "bos_token_id": 1}
LLAMA_CONFIG = {"architectures": ["LlamaForCausalLM"], "vocab_size": 300, "hidden_size": 16, "num_attention_heads": 4}
LLAMA_CONFIG |= {"num_hidden_layers": 2, "intermediate_size": 24, "max_position_embeddings": 32}
MISTRAL_CONFIG = {**LLAMA_CONFIG, "architectures": ["MistralForCausalLM"], "num_key_value_heads": 2}
GEMMA2_CONFIG = {**LLAMA_CONFIG, "architectures": ["Gemma2ForCausalLM"]}
NEOX_CONFIG = {**LLAMA_CONFIG, "architectures": ["GPTNeoXForCausalLM"], "hidden_size": 32}
QWEN3_CONFIG = {**LLAMA_CONFIG, "architectures": ["Qwen3ForCausalLM"], "num_key_value_heads": 2, "head_dim": 4}


@pytest.mark.parametrize(
    ("config", "fields"),
    [
        (GPT2_CONFIG, {"d_ff": 64, "norm_epsilon": 1e-5, "activation": "gelu", "tie_embeddings": True}),
        ({**GPT2_CONFIG, "architectures": None, "model_type": "gpt2"}, {"d_ff": 64, "positions": "learned"}),
        ({**GPT2_CONFIG, "activation_function": "gelu", "n_inner": 40}, {"d_ff": 40, "activation": "gelu_exact"}),
        (LLAMA_CONFIG, {"norm_epsilon": 1e-6, "n_kv_heads": None, "tie_embeddings": False, "rope_theta": 1e4}),
        ({**LLAMA_CONFIG, "rope_theta": 5e5, "head_dim": 4}, {"rope_theta": 5e5, "rope_scaling": None}),
        ({**LLAMA_CONFIG, "rope_parameters": {"rope_theta": 7e3, "rope_type": "default"}}, {"rope_theta": 7e3}),
        (
            {**LLAMA_CONFIG, "rope_scaling": {"type": "linear", "factor": 2.0}},
            {"rope_scaling": "linear", "rope_scaling_factor": 2.0, "rope_original_length": None},
        ),
        (
            {**LLAMA_CONFIG, "rope_scaling": {"rope_type": "yarn", "factor": 2.0, "beta_fast": 32.0}},
            {"rope_scaling": "yarn", "rope_original_length": 32},
        ),
        ({**MISTRAL_CONFIG, "sliding_window": None}, {"n_kv_heads": 2, "use_bias": False}),
        ({**MISTRAL_CONFIG, "sliding_window": 32}, {"qk_norm": False, "max_seq_len": 32}),
        (MISTRAL_CONFIG | {"max_position_embeddings": 8192}, {"max_seq_len": 4096}),  # the window, by default
        ({**QWEN3_CONFIG, "sliding_window": 4, "use_sliding_window": False}, {"qk_norm": True, "head_dim": None}),
        ({**QWEN3_CONFIG, "head_dim": 6}, {"head_dim": 6}),
        ({key: x for key, x in QWEN3_CONFIG.items() if key != "head_dim"}, {"head_dim": 128}),
        ({**LLAMA_CONFIG, "head_dim": 8}, {"head_dim": 8}),
        (
            {**LLAMA_CONFIG, "architectures": ["Qwen2ForCausalLM"], "num_key_value_heads": 2},
            {"qkv_bias": True, "use_bias": False, "n_kv_heads": 2},
        ),
        (GEMMA2_CONFIG, {"attention_softcap": 50.0, "logit_softcap": 30.0, "head_dim": 256, "max_seq_len": 32}),
        (
            GEMMA2_CONFIG | {"sliding_window": 16, "layer_types": ["sliding_attention", "full_attention"]},
            {"max_seq_len": 16, "activation": "geglu", "sandwich_norm": True},
        ),
        (
            NEOX_CONFIG,
            {"rotary_fraction": 0.25, "rope_theta": 1e4, "parallel_residual": True, "activation": "gelu_exact"},
        ),
        (NEOX_CONFIG | {"rotary_pct": 1.0, "rotary_emb_base": 300}, {"rotary_fraction": 1.0, "rope_theta": 300}),
        (  # the newer key wins, as in transformers 5
            NEOX_CONFIG
            | {"rotary_pct": 1.0, "rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}},
            {"rotary_fraction": 0.5, "rope_theta": 1e4},
        ),
    ],
)
def test_configurations_as_transformers_writes_them(config: dict[str, Any], fields: dict[str, Any]) -> None:
    _, model = from_config(config, "X")
    found, defaults = dataclasses.asdict(model), dataclasses.asdict(ModelConfig())
    assert {field: found[field] for field in fields} == fields
    assert [found.pop(field) for field in DROPOUTS] == [0.1 if "n_embd" in config else 0.0] * 2
    chosen = set(found) - set(ARCHITECTURE)
    assert {field: found[field] for field in chosen} == {field: defaults[field] for field in chosen}


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ([], "X: config.json holds no object"),
        ({"architectures": ["BertModel"]}, "X: is a BertModel; jaxlm reads GPT2LMHeadModel, Llama"),
        ({"architectures": ["OlmoForCausalLM"]}, "X: is a OlmoForCausalLM; jaxlm reads"),
        ({"model_type": "t5"}, "X: is a model of type 't5'; jaxlm reads"),
        ({**GPT2_CONFIG, "n_embd": ...}, "X: config.json of a GPT2LMHeadModel lacks n_embd"),
        ({**GPT2_CONFIG, "n_embd": "16"}, r"X: model\.d_model \('16'\) must be int"),
        ({**GPT2_CONFIG, "n_layer": 0}, r"X: model\.n_layers \(0\) must be at least 1"),
        ({**GPT2_CONFIG, "activation_function": "mish"}, 'no GPT2LMHeadModel with activation_function "mish"'),
        (
            {**GPT2_CONFIG, "scale_attn_by_inverse_layer_idx": True, "scale_attn_weights": False},
            "with scale_attn_weights false, scale_attn_by_inverse_layer_idx true$",
        ),
        ({**GPT2_CONFIG, "quantization_config": {"bits": 4}}, "with quantized weights"),
        ({**LLAMA_CONFIG, "attention_bias": True}, "with attention_bias true and mlp_bias false"),
        ({**LLAMA_CONFIG, "hidden_act": "relu"}, 'with hidden_act "relu"'),
        ({**LLAMA_CONFIG, "rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}, "with rope_type dynamic"),
        ({**LLAMA_CONFIG, "rope_scaling": {"rope_type": ["x"]}}, r"with rope_type \['x'\]"),
        ({**LLAMA_CONFIG, "rope_parameters": "none"}, 'with rope_parameters "none"'),
        ({**LLAMA_CONFIG, "rope_scaling": {"type": "linear"}}, "rope_type linear without factor"),
        (
            {**LLAMA_CONFIG, "rope_scaling": {"type": "yarn", "factor": 2.0, "beta_fast": 16, "mscale": 1.0}},
            "with beta_fast 16 of rope_type yarn, mscale 1.0 of rope_type yarn",
        ),
        ({**LLAMA_CONFIG, "rope_scaling": {"type": "linear", "factor": "2"}}, r"X: model\.rope_scaling_factor \('2'\)"),
        ({**MISTRAL_CONFIG, "sliding_window": "x"}, 'with sliding_window "x"'),
        ({**QWEN3_CONFIG, "attention_bias": True}, "with attention_bias true"),
        ({**GEMMA2_CONFIG, "query_pre_attn_scalar": 144}, "with head_dim 256 and query_pre_attn_scalar 144"),
        ({**GEMMA2_CONFIG, "use_bidirectional_attention": True}, "with use_bidirectional_attention true"),
        ({**NEOX_CONFIG, "attention_bias": False}, "with attention_bias false"),
        (
            {**QWEN3_CONFIG, "use_sliding_window": True, "sliding_window": 8},
            "with use_sliding_window true",
        ),
        ({**QWEN3_CONFIG, "layer_types": ["full_attention", "sliding_attention"]}, "layer_types"),
    ],
)
def test_configurations_that_jaxlm_has_no_option_for(config: Any, message: str) -> None:
    if isinstance(config, dict):
        config = {key: value for key, value in config.items() if value is not ...}
    with pytest.raises(UserError, match=message):
        from_config(config, "X")


# -------------------------------------------------------------------- the tokenizer


AWKWARD = [
    "",
    " ",
    "the café",
    "  two leading",
    "tabs\t\r\n\n\nlines \n",
    "naïve é 你好 🙂‍↔️ \x00\x7f",
    "<bos>a</s><eos><pad>",
]


def test_the_tokenizer_gives_the_same_ids(tmp_path: Path, tokenizer: Tokenizer) -> None:
    folder = exported(tmp_path, random_model(ModelConfig(**SMALL), tokenizer))
    theirs = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    theirs.encode_special_tokens = settings["split_special_tokens"]  # as transformers does
    for text in AWKWARD:
        assert theirs.encode(text).ids == [tokenizer.bos_id, *tokenizer.encode(text)]
        assert theirs.encode(text, add_special_tokens=False).ids == tokenizer.encode(text)
    named = {name: theirs.token_to_id(settings[f"{name}_token"]) for name in ("bos", "eos", "pad")}
    assert named == {"bos": tokenizer.bos_id, "eos": tokenizer.eos_id, "pad": tokenizer.pad_id}
    assert Tokenizer.load(folder).agrees_with(tokenizer)


def test_another_tokenizer_is_refused(tmp_path: Path, tokenizer: Tokenizer) -> None:
    folder = exported(tmp_path, random_model(ModelConfig(**SMALL), tokenizer))
    tokenizer.save(tmp_path / "same")
    Tokenizer.train(documents(20, 2), 290).save(tmp_path / "other")
    read_back(folder, **{"data.tokenizer_path": str(tmp_path / "same")})
    other = {"data.tokenizer_path": str(tmp_path / "other")}
    with pytest.raises(
        UserError, match=r"^data\.tokenizer_path \(.*other\) is not the tokenizer of training\.init_from"
    ):
        read_back(folder, **other)
    (folder / "tokenizer.json").unlink()
    with pytest.raises(UserError, match=r"holds no tokenizer\.json; write one there, or set data\.tokenizer_path"):
        read_back(folder)
    read_back(folder, **other)


def test_more_tokens_than_rows(tmp_path: Path, tokenizer: Tokenizer) -> None:
    folder = exported(tmp_path, random_model(ModelConfig(**SMALL | {"vocab_size": 299}), tokenizer))
    with pytest.raises(UserError, match=r"its tokenizer has 300 tokens, but its model has only 299"):
        read_back(folder)


# -------------------------------------------------------------------- folders that are not as they should be


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory, tokenizer: Tokenizer) -> Path:
    return exported(tmp_path_factory.mktemp("small"), random_model(ModelConfig(**SMALL), tokenizer))


@pytest.fixture
def folder(tmp_path: Path, small: Path) -> Path:
    """A copy of an exported model, to be damaged."""
    return Path(shutil.copytree(small, tmp_path / "copy"))


def without(name: str) -> Any:
    return lambda tensors: {key: x for key, x in tensors.items() if key != name}


EMBEDDING = "transformer.wte.weight"
TENSOR_CHANGES = {
    "missing": (without(EMBEDDING), rf"lacks 1 tensor\(s\) that config\.json asks for, as {EMBEDDING}"),
    "unknown": (
        lambda t: t | {"transformer.h.0.x": t[EMBEDDING]},
        r"has what no GPT2LMHeadModel has: transformer\.h\.0\.x",
    ),
    "shape": (
        lambda t: t | {EMBEDDING: t[EMBEDDING][1:]},
        rf"{EMBEDDING} is F32 \[299, 16\], but .* a float of \[300, 16\]",
    ),
    "type": (lambda t: t | {EMBEDDING: t[EMBEDDING].astype(np.int8)}, rf"{EMBEDDING} is I8 \[300, 16\], but"),
    "other name, shape": (
        lambda t: without(EMBEDDING)(t) | {"lm_head.weight": t[EMBEDDING][1:]},
        rf"{EMBEDDING} is F32 \[299, 16\]",
    ),
    "output": (lambda t: t | {"lm_head.weight": 2 * t[EMBEDDING]}, r"an lm_head\.weight of its own, though tie_word"),
}


@pytest.mark.parametrize("name", TENSOR_CHANGES)
def test_tensors_that_do_not_fit(folder: Path, name: str) -> None:
    change, message = TENSOR_CHANGES[name]
    with pytest.raises(UserError, match=message):
        read_back(retensor(folder, change))


def test_a_model_with_parameters_that_the_class_does_not_have(folder: Path) -> None:
    """As a `model_class` of the user's own may have them."""
    config = pretrained.with_architecture(replace_fields(Config(), {"training.init_from": str(folder)}))
    source = pretrained.open_pretrained(config)
    assert source is not None
    whole = abstract_params(config.model)
    with pytest.raises(UserError, match=r"^training\.init_from \(.*\): no GPT2LMHeadModel has extra, which the model"):
        source.check(whole | {"extra": {"gate": whole["token_embedding"]}})


def test_a_longer_context_is_chosen_at_the_start(tmp_path: Path, tokenizer: Tokenizer) -> None:
    folder = exported(tmp_path, random_model(ModelConfig(**LLAMA), tokenizer))
    config, params = read_back(folder, **{"model.rope_scaling": "yarn", "model.rope_scaling_factor": 4.0})
    model = config.model
    assert (model.rope_scaling, model.rope_original_length, model.max_seq_len) == ("yarn", 32, 128)
    again = pretrained.with_architecture(config)
    assert again.model == model
    plain, same = read_back(folder)
    assert (plain.model.rope_scaling, plain.model.max_seq_len) == (None, 32)
    assert all((params[path] == same[path]).all() for path in same)
    longer = {"model.rope_scaling": "linear", "model.rope_scaling_factor": 2.0, "model.max_seq_len": 48}
    assert read_back(folder, **longer)[0].model.max_seq_len == 48
    with pytest.raises(UserError, match=r"model\.max_seq_len is 48, there 32"):
        read_back(folder, **{"model.max_seq_len": 48})


def test_tensors_that_are_left_out_of_account(folder: Path, small: Path) -> None:
    """Old versions saved masks, base models have names without a prefix, tied outputs may be there twice."""

    def old(tensors: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        plain = {name.removeprefix("transformer."): x for name, x in tensors.items()}
        return plain | {"h.0.attn.bias": np.ones((1, 1, 32, 32), np.uint8), "lm_head.weight": tensors[EMBEDDING]}

    expected = read_back(small)[1]
    for path, x in read_back(retensor(folder, old))[1].items():
        np.testing.assert_array_equal(x, expected[path])


def test_folders_that_hold_no_model(folder: Path, tmp_path: Path) -> None:
    def refused(message: str, name: Path = folder) -> None:
        with pytest.raises(UserError, match=message):
            read_back(name)

    (folder / "model.safetensors").write_bytes(b"\x08\0\0\0\0\0\0\0{}      x")
    refused(r"model\.safetensors is not readable")
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    refused(r"holds no model\.safetensors; pytorch_model\.bin is a pickle, which .*save_pretrained$")
    (folder / "model.safetensors.index.json").write_text("[]")
    refused(r"model\.safetensors\.index\.json is not readable")
    (folder / "config.json").write_text("{")
    refused(r"config\.json is not readable")
    (folder / "config.json").unlink()
    refused(r"holds no model; name a best_model, .*, or one that transformers has saved$")
    refused(r"^training\.init_from \(/no/such/folder\): no such folder$", Path("/no/such/folder"))


class Hub(BaseHTTPRequestHandler):
    """As much of the Hub as `snapshot_download` asks for, with the one model test/tiny."""

    protocol_version = "HTTP/1.1"
    files: ClassVar[dict[str, bytes]] = {}
    fetched: ClassVar[list[str]] = []

    def log_message(self, *arguments: Any) -> None:
        pass

    def answer(self, status: int, body: bytes, **headers: str) -> None:
        self.send_response(status)
        for name, value in {**headers, "Content_Length": str(len(body))}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def do_GET(self) -> None:
        path = urllib.parse.unquote(self.path.partition("?")[0])
        name = path.partition(f"/resolve/{COMMIT}/")[2]
        if "test/tiny" not in path:
            self.answer(401, b"{}", X_Error_Code="RepoNotFound")
        elif "/tree/" in path:
            entries = [{"type": "file", "path": n, "size": len(x), "oid": n} for n, x in self.files.items()]
            self.answer(200, json.dumps(entries).encode())
        elif path.startswith("/api/models/test/tiny"):
            siblings = [{"rfilename": name} for name in self.files]
            self.answer(200, json.dumps({"id": "test/tiny", "sha": COMMIT, "siblings": siblings}).encode())
        else:
            self.fetched.append(name)
            self.answer(200, self.files[name], ETag=f'"{name}"', X_Repo_Commit=COMMIT)

    def do_HEAD(self) -> None:
        self.do_GET()


COMMIT = "0123456789" * 4
FETCH = """
import json, sys
from jaxlm.config import Config, replace_fields
from jaxlm.errors import UserError
from jaxlm.interop.pretrained import with_architecture
for name in sys.argv[1:]:
    try:
        print(with_architecture(replace_fields(Config(), {"training.init_from": name})).model.d_model)
    except UserError as error:
        print(error)
assert "jax" not in sys.modules, "a mistake should show before that"
"""


def on_hub(endpoint: str, home: Path, *names: str) -> list[str]:
    """What comes of each of `names` in a process that knows the Hub at `endpoint`."""
    environment = {"HF_ENDPOINT": endpoint, "HF_HOME": str(home), "PYTHONPATH": str(Path(__file__).parents[1])}
    command = [sys.executable, "-W", "error", "-c", FETCH, *names]
    environment = os.environ | environment | {"HF_HUB_DISABLE_PROGRESS_BARS": "1"}
    done = subprocess.run(command, env=environment, cwd=home, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    return done.stdout.splitlines()


def test_a_model_on_the_hub(small: Path, tmp_path: Path) -> None:
    Hub.files = {path.name: path.read_bytes() for path in small.iterdir()}
    Hub.files |= {"pytorch_model.bin": b"no", "onnx/model.safetensors": b"no"}
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        names = ("test/tiny", "test/none", "no name/of a/model")
        width, none, odd = on_hub(f"http://127.0.0.1:{server.server_port}", tmp_path, *names)
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
    assert width == "16"
    assert none == "training.init_from (test/none): no such folder, and no model on the Hub, or not a public one"
    assert odd == "training.init_from (no name/of a/model): no such folder"
    assert set(Hub.fetched) == set(Hub.files) - {"pytorch_model.bin", "onnx/model.safetensors"}

    # What was fetched is used without the Hub; anything else is one line.
    width, other = on_hub("http://127.0.0.1:9", tmp_path, "test/tiny", "test/other")
    assert width == "16"
    reach = r"training\.init_from \(test/other\): no such folder, and the Hugging Face Hub is out of reach \(.*refused"
    assert re.match(reach, other)


def test_options_that_contradict_the_folder(folder: Path) -> None:
    asked = {"model.n_layers": 3, "model.d_model": 16, "model.norm": "rmsnorm", "model.dropout": 0.3}
    with pytest.raises(
        UserError,
        match=r"^training\.init_from \(.*\) has another architecture: model\.n_layers is 3, there 2; model\.norm is "
        r"rmsnorm, there layernorm\. Leave these options out",
    ):
        read_back(folder, **asked)
    config, _ = read_back(folder, **{"model.d_model": 16, "model.dropout": 0.3})
    assert (config.model.d_model, config.model.n_layers, config.model.dropout) == (16, 2, 0.3)


def test_a_tied_embedding_under_the_name_of_the_output(folder: Path) -> None:
    """As safetensors.torch.save_model leaves it, which keeps one name of a tensor."""
    _, expected = read_back(folder)
    retensor(folder, lambda t: without(EMBEDDING)(t) | {"lm_head.weight": t[EMBEDDING]})
    _, found = read_back(folder)
    np.testing.assert_array_equal(found["token_embedding"], expected["token_embedding"])
    with pytest.raises(UserError, match="lacks 1 tensor"):
        read_back(rewrite(folder, tie_word_embeddings=False))


def test_a_folders_dropouts_are_kept_unless_they_are_set(folder: Path) -> None:
    def rates(**asked: Any) -> tuple[float, float]:
        model = read_back(folder, **asked)[0].model
        return model.dropout, model.attention_dropout

    rewrite(folder, embd_pdrop=0.25, resid_pdrop=0.25, attn_pdrop=0.0)
    assert rates() == (0.25, 0.0)
    assert rates(**{"model.dropout": 0.1, "model.attention_dropout": 0.1}) == (0.1, 0.1), "which are the defaults"
    rewrite(folder, resid_pdrop=0.0)
    with pytest.raises(UserError, match=r"has several rates of what is one dropout here; set model\.dropout$"):
        rates()
    assert rates(**{"model.dropout": 0.0}) == (0.0, 0.0)


def test_what_a_folder_says_of_its_tokens_is_exported(tmp_path: Path, tokenizer: Tokenizer) -> None:
    a, b = tokenizer.token(7), tokenizer.token(8)
    said = {"bos_token": a, "eos_token": b, "chat_template": "{{ x }}", "config": {"eos_token_id": [8, 9]}}
    own = Tokenizer.from_json(tokenizer.to_json(), said=said | {"generation_config": {"eos_token_id": 9, "top_k": 5}})
    folder = exported(tmp_path, random_model(ModelConfig(**SMALL), own))
    files = {name: json.loads((folder / name).read_text()) for name in (GENERATION, CONFIG, OWN)}
    assert files[GENERATION] == {"eos_token_id": [8, 9], "top_k": 5, "bos_token_id": 7, "pad_token_id": 0}
    assert (files[CONFIG]["bos_token_id"], files[CONFIG]["eos_token_id"]) == (7, [8, 9])
    assert (files[OWN]["eos_token"], files[OWN]["chat_template"]) == (b, "{{ x }}")
    assert not files[OWN]["split_special_tokens"], "the template's tokens are no plain characters"
    back = Tokenizer.load(folder)
    assert (back.bos_id, back.eos_id, back.pad_id, back.end_ids) == (7, 8, 0, (8, 9))


def test_the_head_of_a_model_card(tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text("---\nlicense: apache-2.0\nlanguage: de\n---\n# A base\n")
    config = replace_fields(Config(), {"training.init_from": str(tmp_path), "data.train_files": ("a.txt",)})
    head = yaml.safe_load(export._metadata(config, {}))
    assert (head["license"], head["language"]) == ("apache-2.0", "de")
    assert "base_model" not in head, "the name of a folder goes to nobody"
    assert "datasets" not in head
    config = replace_fields(Config(), {"training.init_from": "test/tiny"})
    head = yaml.safe_load(export._metadata(config, {"license": "mit", "language": ["en", "fr"]}))
    assert head | {"base_model": "test/tiny", "license": "mit", "language": ["en", "fr"]} == head
    assert (head["datasets"], head["metrics"]) == (["wikitext"], ["perplexity"])


# -------------------------------------------------------------------- writing


def test_a_folder_that_is_in_use_is_refused(tmp_path: Path, tokenizer: Tokenizer) -> None:
    loaded = random_model(ModelConfig(**SMALL), tokenizer)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").touch()
    with pytest.raises(UserError, match=r"^--to \(.*out\): is not empty"):
        exported(tmp_path, loaded)
    (tmp_path / "out" / "mine").unlink()
    exported(tmp_path, loaded)  # an empty one is filled


@pytest.mark.parametrize(
    "error",
    [
        OSError(28, "No space left on device"),
        SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_nothing_is_left_of_an_export_that_fails(
    tmp_path: Path, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    import safetensors.numpy

    loaded, write, written = random_model(ModelConfig(**SMALL), tokenizer), safetensors.numpy.save_file, []

    def full_disk(*arguments: Any, **options: Any) -> None:
        assert not (tmp_path / "out").exists()
        write(*arguments, **options)
        written.append(arguments)
        if len(written) == 2:
            raise error

    monkeypatch.setattr(safetensors.numpy, "save_file", full_disk)
    with pytest.raises(UserError, match=r"^--to \(.*out\): cannot be written \(No space left on device\)"):
        exported(tmp_path, loaded, size=6_000)
    assert list(tmp_path.iterdir()) == []
    exported(tmp_path, loaded, size=10_000)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


KILLED = """
import os, pathlib, signal, sys
from jaxlm.data.atomic import atomic_path
with atomic_path(pathlib.Path(sys.argv[1])) as folder:
    folder.mkdir()
    (folder / "half").touch()
    os.kill(os.getpid(), signal.SIGKILL)
"""


def test_what_a_killed_export_left_behind_is_removed(tmp_path: Path, tokenizer: Tokenizer) -> None:
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[1])}
    done = subprocess.run(
        [sys.executable, "-c", KILLED, str(tmp_path / "out")], env=environment, timeout=60, check=False
    )
    assert done.returncode == -signal.SIGKILL
    (left_behind,) = (path for path in tmp_path.iterdir() if path.is_dir())  # beside its lock
    assert left_behind.name != "out" and (left_behind / "half").exists()
    assert not (exported(tmp_path, random_model(ModelConfig(**SMALL), tokenizer)) / "half").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


# -------------------------------------------------------------------- a run


def test_a_run_starts_from_an_exported_run(tmp_path: Path, corpus: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Train, export, start from the export and from the run's own folder, stop, go on without either of them."""
    first = Trainer(make_config(tmp_path / "first", corpus, **{"training.max_steps": 2, "training.eval_steps": 2}))
    first.train()
    best = first.folder / "best_model"
    loaded = load(best)
    export.export(loaded, best, tmp_path / "hf", max_shard_size=10_000, dtype="float32")
    card = (tmp_path / "hf" / "README.md").read_text()
    row = [json.loads(line) for line in (first.folder / "metrics.jsonl").read_text().splitlines()][-1]
    for figure in (
        f"| parameters | {first.assembly.parameters:,} |",
        f"| validation loss | {row['eval/loss']:.4f} nats",
        f"| validation bits per byte | {row['eval/bits_per_byte']:.4f} |",
        "| updates | 2 of 2 |",
        f"| tokens | {2 * 8 * 32:,}, in updates of {8 * 32:,}",
        "train.jsonl",
        '"vocab_size": 300',
    ):
        assert figure in card
    assert str(tmp_path) not in card  # the card goes public

    plain = dataclasses.asdict(ModelConfig())
    model = {f"model.{name}": plain[name] for name in ARCHITECTURE}  # all at their defaults
    second: dict[str, Any] = {**model, "training.zero_stage": 3, "training.save_steps": 1, "training.stop_at_step": 1}
    second |= {"training.init_from": str(tmp_path / "hf")}
    trainer = Trainer(make_config(tmp_path / "second", corpus, **second))
    assert trainer.config.model == dataclasses.replace(loaded.config.model, scan_layers=True)
    assert "(GPT2LMHeadModel)" in capsys.readouterr().err
    own = Trainer(make_config(tmp_path / "own", corpus, **second | {"training.init_from": str(best)}))
    for start in (trainer, own):
        for path, x in flatten_dict(jax.device_get(start.assembly.to_whole(start.state.params)), sep="/").items():
            np.testing.assert_array_equal(x, flat(loaded.model)[path], err_msg=path)
    assert trainer.evaluate()["loss"] == pytest.approx(row["eval/loss"], abs=1e-5)

    trainer.train()
    shutil.rmtree(tmp_path / "hf")
    again = Trainer(make_config(tmp_path / "second", corpus, **second | {"training.stop_at_step": 2}))
    assert again.current_step == 1
    assert load(again.folder / "checkpoint_1").config.training.init_from == str(tmp_path / "hf")
    with pytest.raises(UserError, match=r"training\.init_from was .*, is null"):
        Trainer(make_config(tmp_path / "second", corpus, **second | {"training.init_from": None, **vocabulary(again)}))


def vocabulary(trainer: Trainer) -> dict[str, Any]:
    """Options that say what the checkpoint's model is."""
    values = dataclasses.asdict(trainer.config.model)
    return {f"model.{name}": values[name] for name in ARCHITECTURE}


def test_padding_of_shards_is_undone() -> None:
    """What 4 devices hold of an axis of 6 is padded to 8, with zeros."""
    from jaxlm.parallel.layout import put_whole
    from jaxlm.parallel.mesh import DATA, make_mesh

    mesh = make_mesh(jax.devices())
    sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(None, DATA))
    x = np.arange(18, dtype=np.float32).reshape(3, 6)
    held = put_whole(x, jax.ShapeDtypeStruct((3, 8), np.float32, sharding=sharding))
    assert {shard.data.shape for shard in held.addressable_shards} == {(3, 2)}
    np.testing.assert_array_equal(held, np.pad(x, ((0, 0), (0, 2))))


def test_an_own_folder_that_is_damaged_is_refused(tmp_path: Path, corpus: Path) -> None:
    trainer = Trainer(make_config(tmp_path, corpus, **{"training.max_steps": 1, "model.n_layers": 1}))
    model = tmp_path / "in" / "new folders" / "model"
    trainer.save_model(model)
    start = replace_fields(Config(), {"training.init_from": str(model)})
    config = pretrained.with_architecture(start)
    source = pretrained.open_pretrained(config)
    assert source is not None
    file = max((model / "params").rglob("*"), key=lambda path: path.stat().st_size)
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(
        UserError, match=r"^training\.init_from \(.*model\) is damaged: params/.* is not as it was saved"
    ):
        source.check(abstract_params(config.model))

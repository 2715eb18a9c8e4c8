"""Adapters beside PEFT: opened by it with equal logits, read from it, and merged into what transformers opens.

Run by name, with torch, transformers and peft beside jaxlm: `pytest tests/parity/test_peft.py`.
"""

import dataclasses
import json
import os
import shutil
from pathlib import Path
from typing import Any

import jax
import numpy as np
import peft
import pytest
import torch
import transformers
from conftest import make_config

from jaxlm import Trainer, load
from jaxlm.config import ModelConfig
from jaxlm.data.tokenizer import Tokenizer
from jaxlm.errors import UserError
from jaxlm.interop.export import export, export_adapter

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning", "ignore::UserWarning")
DOWN = "down_proj|mlp.c_proj|dense_4h_to_h"
IDS = np.random.default_rng(0).integers(3, 250, (2, 20))
SHAPES = {
    "gpt2": transformers.GPT2Config(n_embd=32, n_head=2, n_layer=2, n_inner=64, n_positions=32, vocab_size=300),
    "llama": transformers.LlamaConfig(
        hidden_size=32,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_hidden_layers=2,
        intermediate_size=64,
        max_position_embeddings=32,
        vocab_size=300,
        tie_word_embeddings=False,
    ),
    "pythia": transformers.GPTNeoXConfig(
        hidden_size=32,
        num_attention_heads=4,
        num_hidden_layers=2,
        intermediate_size=64,
        max_position_embeddings=32,
        vocab_size=300,
        rope_parameters={"rope_type": "default", "partial_rotary_factor": 0.5},
    ),
}


@pytest.fixture(params=SHAPES)
def base(tmp_path: Path, corpus: Path, request: pytest.FixtureRequest) -> Path:
    """A random model of transformers, with a tokenizer."""
    torch.manual_seed(0)
    folder = tmp_path / "base"
    transformers.AutoModelForCausalLM.from_config(SHAPES[request.param]).save_pretrained(folder)
    texts = [(corpus / "train.jsonl").read_text()]
    Tokenizer.train(texts, 300).save(folder)
    return folder


def logits_of(model: Any) -> np.ndarray:
    with torch.no_grad():
        return model.eval()(torch.tensor(IDS)).logits.numpy()


def logits_of_jaxlm(folder: Path) -> np.ndarray:
    loaded = load(folder)
    return np.asarray(loaded.model.logits(loaded.model(jax.numpy.asarray(IDS, jax.numpy.int32))))


@pytest.fixture
def tuned(tmp_path: Path, corpus: Path, base: Path) -> Path:
    options = {"training.init_from": os.path.relpath(base), "training.lora_rank": 3, "training.lora_alpha": 5.0}
    Trainer(dataclasses.replace(make_config(tmp_path, corpus, **options), model=ModelConfig())).train()
    return tmp_path / "run" / "final_model"


def test_adapters_are_opened_by_peft_and_merged_by_transformers(
    tmp_path: Path, base: Path, tuned: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = logits_of_jaxlm(tuned)
    assert np.abs(own - logits_of_jaxlm(base)).max() > 1e-2
    export_adapter(load(tuned), tuned, tmp_path / "adapter")
    monkeypatch.chdir(tmp_path)  # the base is found from anywhere
    opened = peft.AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter")
    np.testing.assert_allclose(logits_of(opened), own, atol=1e-4)
    export(load(tuned), tuned, tmp_path / "merged", max_shard_size=10**9, dtype="float32", repo_id="x")
    merged = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    np.testing.assert_allclose(logits_of(merged), own, atol=1e-4)
    np.testing.assert_allclose(logits_of_jaxlm(tmp_path / "adapter"), own, atol=1e-4)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"use_rslora": True},
        {
            "rank_pattern": {"down_proj|mlp.c_proj|dense_4h_to_h": 2},
            "alpha_pattern": {"down_proj|mlp.c_proj|dense_4h_to_h": 9},
        },
    ],
)
def test_a_run_starts_from_adapters_of_peft(tmp_path: Path, corpus: Path, base: Path, options: dict[str, Any]) -> None:
    torch.manual_seed(1)
    config = peft.LoraConfig(r=4, lora_alpha=6, target_modules="all-linear", task_type="CAUSAL_LM", **options)
    model = peft.get_peft_model(transformers.AutoModelForCausalLM.from_pretrained(base), config)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    model.save_pretrained(tmp_path / "theirs")
    own = logits_of_jaxlm(tmp_path / "theirs")
    np.testing.assert_allclose(own, logits_of(model), atol=1e-4)
    assert np.abs(own - logits_of_jaxlm(base)).max() > 1e-2
    if options:
        return  # a run is long, and starts from what was loaded
    options = {"training.init_from": str(tmp_path / "theirs"), "training.max_steps": 1, "training.learning_rate": 1e-30}
    Trainer(dataclasses.replace(make_config(tmp_path, corpus, **options), model=ModelConfig())).train()
    np.testing.assert_allclose(logits_of_jaxlm(tmp_path / "run" / "final_model"), own, atol=1e-5)


def test_what_is_no_plain_adapter_is_refused(tmp_path: Path, base: Path) -> None:
    for options, named in (
        ({"use_dora": True}, "use_dora true"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"init_lora_weights": "pissa"}, 'init_lora_weights "pissa"'),
    ):
        config = peft.LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM", **options)
        model = peft.get_peft_model(transformers.AutoModelForCausalLM.from_pretrained(base), config)
        folder = tmp_path / named.split()[0]
        model.save_pretrained(folder)
        with pytest.raises(UserError, match=named):
            load(folder)


def test_an_adapter_that_is_not_whole_is_refused_in_a_line(tmp_path: Path, tuned: Path) -> None:
    """Or that belongs to another adapter, of which nothing would be left."""
    export_adapter(load(tuned), tuned, tmp_path / "adapter")
    file = tmp_path / "adapter" / "adapter_config.json"
    config = json.loads(file.read_text())
    for change, problem in (
        ({"lora_alpha": None}, "no usable lora_alpha"),
        ({"lora_alpha": "much"}, "no usable lora_alpha"),
        ({"alpha_pattern": {"(": 2}}, "no usable lora_alpha"),
        ({"base_model_name_or_path": str(tmp_path / "adapter")}, "is an adapter, too"),
        ({"base_model_name_or_path": str(tuned)}, "is of jaxlm"),
        ({"base_model_name_or_path": None}, "has no base_model_name_or_path"),
    ):
        other = tmp_path / "other"
        shutil.copytree(tmp_path / "adapter", other, dirs_exist_ok=True)
        (other / "adapter_config.json").write_text(json.dumps(config | change))
        with pytest.raises(UserError, match=problem):
            load(other)

"""The evaluation harness, lm-eval, on an exported folder: its figures are those of our own loss on the same text."""

import dataclasses
import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import documents
from test_folders import LLAMA, exported, loaded_model
from transformers import AutoTokenizer

from jaxlm.checkpoints.load import LoadedModel
from jaxlm.config import DataConfig
from jaxlm.data.chat_tokens import chat_template, with_template
from jaxlm.data.tokenizer import Tokenizer
from jaxlm.generation.api import encode_prompts
from jaxlm.train.loss import loss_sums

MAX_LENGTH = 256
TASKS = {
    "whole_text": """
task: whole_text
dataset_path: json
dataset_kwargs: {data_files: {test: FILE}}
test_split: test
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{text}}"
metric_list:
  - {metric: byte_perplexity}
  - {metric: bits_per_byte}
""",
    "last_word": """
task: last_word
dataset_path: json
dataset_kwargs: {data_files: {test: FILE}}
test_split: test
output_type: loglikelihood
doc_to_text: "{{text.split(' ')[:-1]|join(' ')}}"
doc_to_target: "{{' ' + text.split(' ')[-1]}}"
metric_list:
  - {metric: perplexity, aggregation: perplexity, higher_is_better: false}
""",
}


def nats(loaded: LoadedModel, ids: list[int], scored: int) -> float:
    """Our cross entropy of the last `scored` tokens of `ids`, which begin with <bos>.

    Texts are filled up behind, where no token looks, so that JAX has one shape to compile for.
    """
    tokens_BT = np.zeros((1, MAX_LENGTH), np.int32)
    tokens_BT[0, : len(ids)] = ids
    place_T = np.arange(MAX_LENGTH - 1)
    weights_BT = ((place_T >= len(ids) - 1 - scored) & (place_T < len(ids) - 1)).astype(np.float32)[None]
    hidden = loaded.model(tokens_BT[:, :-1])
    return float(loss_sums(hidden, loaded.model.output_matrix(), tokens_BT[:, 1:], weights_BT)[1])


def harness(folder: Path, model: str, task: str, model_args: str = "", *options: str) -> dict[str, Any]:
    """What the command prints about a task."""
    command = [sys.executable, "-m", "lm_eval", "run", "--model", "hf", "--tasks", task, "--device", "cpu"]
    command += ["--model_args", f"pretrained={model},dtype=float32{model_args}", "--include_path", str(folder)]
    offline = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_CACHE": str(folder / "cache")}
    done = subprocess.run(
        [*command, "--batch_size", "1", "--output_path", str(folder / "results"), *options],
        env=os.environ | offline,
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    (file,) = (folder / "results").rglob("*.json")
    return json.loads(file.read_text())["results"][task]


@pytest.fixture
def case(tmp_path: Path) -> tuple[LoadedModel, str, list[str]]:
    tokenizer = Tokenizer.train(documents(20, 1), 300)
    loaded = loaded_model({**LLAMA, "max_seq_len": MAX_LENGTH, "n_kv_heads": 2}, tokenizer)
    texts = [text.strip() for text in documents(12, 7) if len(text.split()) > 3]
    assert max(len(tokenizer.encode(text)) for text in texts) < MAX_LENGTH - 1
    (tmp_path / "text.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    for name, task in TASKS.items():
        (tmp_path / f"{name}.yaml").write_text(task.replace("FILE", str(tmp_path / "text.jsonl")))
    return loaded, exported(tmp_path, loaded), texts


def test_perplexity_of_whole_texts(tmp_path: Path, case: tuple[LoadedModel, str, list[str]]) -> None:
    loaded, folder, texts = case
    result = harness(tmp_path, folder, "whole_text", ",add_bos_token=False")  # the harness puts <bos> there itself
    ids = [loaded.tokenizer.encode(text) for text in texts]
    total = sum(nats(loaded, [loaded.tokenizer.bos_id, *each], len(each)) for each in ids)
    utf8_bytes = sum(len(text.encode()) for text in texts)
    assert result["bits_per_byte,none"] == pytest.approx(total / math.log(2) / utf8_bytes, rel=1e-5)
    assert result["byte_perplexity,none"] == pytest.approx(math.exp(total / utf8_bytes), rel=1e-5)


def test_likelihood_of_continuations(tmp_path: Path, case: tuple[LoadedModel, str, list[str]]) -> None:
    """As the choices of most tasks are scored: each after its context, which begins with <bos> by itself."""
    loaded, folder, texts = case
    result = harness(tmp_path, folder, "last_word")
    encode = loaded.tokenizer.encode
    scored = [len(encode(text)) - len(encode(text.rpartition(" ")[0])) for text in texts]
    whole = [[loaded.tokenizer.bos_id, *encode(text)] for text in texts]
    each = [-nats(loaded, ids, count) for ids, count in zip(whole, scored, strict=True)]
    assert result["perplexity,none"] == pytest.approx(math.exp(-np.mean(each)), rel=1e-5)


def test_likelihood_of_answers(tmp_path: Path, case: tuple[LoadedModel, str, list[str]]) -> None:
    """With the chat template that the folder carries: the context is the user's turn, the continuation the answer."""
    loaded, _, texts = case
    tokenizer = with_template(loaded.tokenizer, chat_template(DataConfig(chat_template="plain"), loaded.tokenizer))
    (tmp_path / "chat").mkdir()
    folder = exported(tmp_path / "chat", dataclasses.replace(loaded, tokenizer=tokenizer))
    result = harness(tmp_path, folder, "last_word", "", "--apply_chat_template")
    theirs, each = AutoTokenizer.from_pretrained(folder), []
    for text in texts:
        question, _, answer = text.rpartition(" ")
        (asked,) = encode_prompts(tokenizer, [[{"role": "user", "content": question}]], MAX_LENGTH)
        prompt = theirs.decode(asked)
        ids_of = lambda text: theirs(text, add_special_tokens=False)["input_ids"]  # noqa: E731
        context, whole = ids_of(prompt.rstrip()), ids_of(f"{prompt} {answer}")
        assert whole[: len(asked)] == asked
        each.append(-nats(loaded, whole, len(whole) - len(context)))  # as it scores the line break before the answer
    assert result["perplexity,none"] == pytest.approx(math.exp(-np.mean(each)), rel=1e-5)

"""The evaluation harness, lm-eval, on an exported folder: its figures are those of our own loss on the same text."""

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import documents
from lm_eval import simple_evaluate
from lm_eval.tasks import TaskManager
from test_folders import LLAMA, exported, loaded_model
from transformers import AutoTokenizer

from jaxlm.checkpoints.load import LoadedModel
from jaxlm.config import DataConfig
from jaxlm.data.chat_tokens import chat_template, with_template
from jaxlm.data.tokenizer import Tokenizer
from jaxlm.generation.api import encode_prompts
from jaxlm.train.loss import loss_sums

pytestmark = pytest.mark.filterwarnings("ignore")  # of what the harness imports and calls

MAX_LENGTH = 256
WHOLE_TEXT = {
    "output_type": "loglikelihood_rolling",
    "doc_to_text": "",
    "doc_to_target": "{{text}}",
    "metric_list": [{"metric": "byte_perplexity"}, {"metric": "bits_per_byte"}],
}
LAST_WORD = {
    "output_type": "loglikelihood",
    "doc_to_text": "{{text.split(' ')[:-1]|join(' ')}}",
    "doc_to_target": "{{' ' + text.split(' ')[-1]}}",
    "metric_list": [{"metric": "perplexity", "aggregation": "perplexity", "higher_is_better": False}],
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


def harness(folder: Path, model: str, task: dict[str, Any], model_args: str = "", **options: Any) -> dict[str, Any]:
    """What it says of a task on the texts in `folder`."""
    data = {"data_files": {"test": str(folder / "text.jsonl")}, "cache_dir": str(folder / "cache")}
    task = {"task": "own", "dataset_path": "json", "dataset_kwargs": data, "test_split": "test", **task}
    options |= {"batch_size": 1, "device": "cpu", "bootstrap_iters": 0}
    options |= {"task_manager": TaskManager(include_defaults=False)}  # does not look for its thousands of tasks
    found = simple_evaluate("hf", f"pretrained={model},dtype=float32{model_args}", [task], **options)
    return found["results"]["own"]


@pytest.fixture
def case(tmp_path: Path) -> tuple[LoadedModel, str, list[str]]:
    tokenizer = Tokenizer.train(documents(20, 1), 300)
    loaded = loaded_model({**LLAMA, "max_seq_len": MAX_LENGTH, "n_kv_heads": 2}, tokenizer)
    texts = [text.strip() for text in documents(12, 7) if len(text.split()) > 3]
    assert max(len(tokenizer.encode(text)) for text in texts) < MAX_LENGTH - 1
    (tmp_path / "text.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return loaded, exported(tmp_path, loaded), texts


def test_perplexity_of_whole_texts(tmp_path: Path, case: tuple[LoadedModel, str, list[str]]) -> None:
    loaded, folder, texts = case
    result = harness(tmp_path, folder, WHOLE_TEXT, ",add_bos_token=False")  # the harness puts <bos> there itself
    ids = [loaded.tokenizer.encode(text) for text in texts]
    total = sum(nats(loaded, [loaded.tokenizer.bos_id, *each], len(each)) for each in ids)
    utf8_bytes = sum(len(text.encode()) for text in texts)
    assert result["bits_per_byte,none"] == pytest.approx(total / math.log(2) / utf8_bytes, rel=1e-5)
    assert result["byte_perplexity,none"] == pytest.approx(math.exp(total / utf8_bytes), rel=1e-5)


def test_likelihood_of_continuations(tmp_path: Path, case: tuple[LoadedModel, str, list[str]]) -> None:
    """As the choices of most tasks are scored: each after its context, which begins with <bos> by itself."""
    loaded, folder, texts = case
    result = harness(tmp_path, folder, LAST_WORD)
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
    result = harness(tmp_path, folder, LAST_WORD, apply_chat_template=True)
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

"""Instruction data beside TRL and transformers: the same tokens, the same of them learned, the same loss.

Run by name, with torch, transformers and trl beside jaxlm: `pytest tests/parity/test_trl.py`.
docs/finetuning.md has the table of what TRL does otherwise; the last tests here are its rows.
"""

import json
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
import transformers
import trl

from jaxlm import load
from jaxlm.config import DataConfig
from jaxlm.data.chat import PLAIN
from jaxlm.data.tokenizer import Tokenizer
from jaxlm.data.tokens import TokenDocuments, prepare
from jaxlm.errors import UserError
from jaxlm.generation.api import encode_prompts
from jaxlm.run.evaluate import evaluate_model

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning", "ignore::UserWarning")
LENGTH = 96
MARKERS = ["<|im_start|>", "<|im_end|>", "[INST]", "[/INST]"]
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# The turns of a user and the assistant alternate, or it raises; no line ends; what is said is trimmed.
INST = (
    "{{ bos_token }}{% for m in messages %}"
    "{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('roles must alternate') }}{% endif %}"
    "{% if m.role == 'user' %}[INST] {{ m.content | trim }} [/INST]{% else %} {{ m.content | trim }}{{ eos_token }}"
    "{% endif %}{% endfor %}"
)
MARKED = CHATML.replace(
    "{{ m.content }}<|im_end|>\n",
    "{% if m.role == 'assistant' %}{% generation %}{{ m.content }}<|im_end|>{% endgeneration %}"
    "{% else %}{{ m.content }}<|im_end|>{% endif %}{{ '\n' }}",
)
TEMPLATES = {"chatml": CHATML, "inst": INST, "marked": MARKED, "plain": PLAIN}
WORDS = ["What is 2 + 3?", "It is 5.", "And doubled?", "10, of course.", " and spaces ", "naïve café 🙂", "a\n\nb"]


def talk(*contents: str) -> list[dict[str, str]]:
    return [{"role": "assistant" if i % 2 else "user", "content": text} for i, text in enumerate(contents)]


TALKS = [talk(*WORDS[:2]), talk(*WORDS[:4]), talk(WORDS[4], WORDS[5]), talk(WORDS[6], WORDS[4], WORDS[0], WORDS[6])]


@pytest.fixture
def folder(tmp_path: Path, request: pytest.FixtureRequest) -> Path:
    """A tiny GPT-2 with a tokenizer that has markers, as transformers saves it; the test's template is its own."""
    Tokenizer.train(WORDS * 9, 290).save(tmp_path / "trained")
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_file=str(tmp_path / "trained" / "tokenizer.json"),
        bos_token="<bos>",
        eos_token="<eos>",
        pad_token="<pad>",
    )
    tokenizer.add_special_tokens({"additional_special_tokens": MARKERS})
    tokenizer.chat_template = TEMPLATES[request.param]
    tokenizer.save_pretrained(tmp_path / "folder")
    torch.manual_seed(0)
    shape = {"n_layer": 2, "n_head": 2, "n_embd": 32, "n_positions": LENGTH, "vocab_size": len(tokenizer)}
    off = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0, "bos_token_id": 1, "eos_token_id": 2}
    model = transformers.GPT2LMHeadModel(transformers.GPT2Config(**shape, **off))
    model.save_pretrained(tmp_path / "folder")
    return tmp_path / "folder"


templates = pytest.mark.parametrize("folder", TEMPLATES, indirect=True)


def of_jaxlm(folder: Path, rows: list[Any], **options: Any) -> tuple[list[list[int]], list[list[int]]]:
    """The ids and labels of each row, in TRL's form, in which -100 is not learned."""
    found = prepared(folder, rows, **options)
    ids, labels = [], []
    for number in range(len(found)):
        span = slice(*found.offsets[number : number + 2])
        ids.append(found.tokens[span].tolist())
        learned = np.ones(len(ids[-1]), bool) if found.learned is None else found.learned[span]
        labels.append(np.where(learned, ids[-1], -100).tolist())
    return ids, labels


def data_of(folder: Path, rows: list[Any], **options: Any) -> DataConfig:
    file = folder.parent / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    given = {"validation_fraction": 0, "min_length": 0, "max_length": LENGTH - 1} | options
    return DataConfig(
        train_files=(str(file),), tokenizer_path=str(folder), cache_dir=str(folder.parent / "cache"), **given
    )


def prepared(folder: Path, rows: list[Any], **options: Any) -> TokenDocuments:
    found = prepare(data_of(folder, rows, **options), 0, None, lambda _: None).train
    assert found is not None
    return found


def trainer(folder: Path, rows: list[Any], **options: Any) -> trl.SFTTrainer:
    about = {"report_to": "none", "use_cpu": True, "bf16": False, "max_length": LENGTH, "disable_tqdm": True}
    arguments = trl.SFTConfig(output_dir=str(folder.parent / "trl"), **about | options)
    return trl.SFTTrainer(
        model=transformers.AutoModelForCausalLM.from_pretrained(folder),
        args=arguments,
        train_dataset=datasets.Dataset.from_list(rows),
        processing_class=transformers.AutoTokenizer.from_pretrained(folder),
    )


def of_trl(folder: Path, rows: list[Any], **options: Any) -> tuple[list[list[int]], list[list[int]]]:
    dataset = trainer(folder, rows, **options).train_dataset
    return [list(row["input_ids"]) for row in dataset], [list(row["labels"]) for row in dataset]


@templates
def test_prompts_and_completions_are_those_of_trl(folder: Path) -> None:
    rows = [{"prompt": turns[:-1], "completion": turns[-1:]} for turns in TALKS]
    assert of_jaxlm(folder, rows) == of_trl(folder, rows)


@templates
def test_the_loss_is_that_of_trl(folder: Path) -> None:
    rows = [{"prompt": turns[:-1], "completion": turns[-1:]} for turns in TALKS]
    theirs = trainer(folder, rows)
    batch = theirs.data_collator([theirs.train_dataset[i] for i in range(len(rows))])
    with torch.no_grad():
        expected = theirs.compute_loss(theirs.model, dict(batch)).item()
    ours = evaluate_model(load(folder), data_of(folder, rows, packing_strategy="best_fit"), 2, lambda _: None)
    assert ours["tokens"] == int((batch["labels"][:, 1:] != -100).sum())
    assert ours["loss"] == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("folder", ["marked", "plain"], indirect=True)
def test_answers_that_a_template_marks_are_those_of_transformers_and_trl(folder: Path) -> None:
    rows = [{"messages": turns} for turns in TALKS]
    ids, labels = of_jaxlm(folder, rows)
    assert (ids, labels) == of_trl(folder, rows, assistant_only_loss=True)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    for row, own_ids, own_labels in zip(rows, ids, labels, strict=True):
        theirs = tokenizer.apply_chat_template(
            row["messages"], tokenize=True, return_dict=True, return_assistant_tokens_mask=True
        )
        assert own_ids == theirs["input_ids"]
        assert [label != -100 for label in own_labels] == [bool(x) for x in theirs["assistant_masks"]]


@templates
def test_prompts_to_be_answered_are_those_of_transformers(folder: Path) -> None:
    tokenizer, own = transformers.AutoTokenizer.from_pretrained(folder), Tokenizer.load(folder)
    for turns in TALKS:
        theirs = tokenizer.apply_chat_template(turns[:-1], tokenize=True, add_generation_prompt=True, return_dict=True)
        assert encode_prompts(own, [turns[:-1]], LENGTH) == [theirs["input_ids"]]


@pytest.mark.parametrize("folder", ["inst"], indirect=True)
def test_answers_that_no_template_marks(folder: Path) -> None:
    """jaxlm finds each turn; TRL asks for a template that marks them."""
    rows = [{"messages": turns} for turns in TALKS]
    with pytest.raises(ValueError, match="generation"):
        of_trl(folder, rows, assistant_only_loss=True)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    _, labels = of_jaxlm(folder, rows)
    for turns, own in zip(TALKS, labels, strict=True):
        learned = tokenizer.decode([label for label in own if label != -100])
        assert learned == "".join(f" {turn['content'].strip()}<eos>" for turn in turns[1::2])


# ---- What TRL 1.16 and transformers 5.24 do otherwise: the table of docs/finetuning.md -------------------------------


@pytest.mark.parametrize("folder", ["plain"], indirect=True)
def test_theirs_learn_all_of_messages_and_an_empty_completion(folder: Path) -> None:
    ids, labels = of_trl(folder, [{"messages": TALKS[0]}])
    assert labels == ids
    rows = [{"prompt": "What is 2", "completion": ""}, {"prompt": "What is", "completion": " 2"}]
    ids, labels = of_trl(folder, rows)
    assert [[label for label in each if label != -100] for each in labels] == [[2], [ids[1][-2], 2]]
    own_ids, own_labels = of_jaxlm(folder, rows)
    assert own_ids == [[1, *ids[1]]], "theirs have no <bos>"
    assert own_labels == [[-100, *labels[1]]]


@pytest.mark.parametrize("folder", ["chatml"], indirect=True)
def test_theirs_go_on_where_a_prompt_is_not_where_the_whole_begins(folder: Path) -> None:
    (folder / "chat_template.jinja").write_text(CHATML.replace("assistant\n{% endif", "assistant:\n{% endif"))
    rows = [{"prompt": TALKS[0][:1], "completion": TALKS[0][1:]}]
    _, labels = of_trl(folder, rows)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    assert tokenizer.decode([label for label in labels[0] if label != -100]) == "\nIt is 5.<|im_end|>\n"
    with pytest.raises(UserError, match="line 1: .*the text of the prompt is not where the whole text begins"):
        of_jaxlm(folder, rows)


@pytest.mark.parametrize("folder", ["plain"], indirect=True)
def test_theirs_leave_the_spaces_at_the_end_of_an_answer_out(folder: Path) -> None:
    """With GPT-2's kind of tokenizer, whose places of tokens leave spaces out; after them a template must end."""
    file = folder / "tokenizer.json"
    trimming = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    file.write_text(json.dumps(json.loads(file.read_text()) | {"post_processor": trimming}))
    unended = PLAIN.replace("{{ eos_token }}{% endgeneration %}", "{% endgeneration %}")
    (folder / "chat_template.jinja").write_text(unended)
    row = {"messages": talk("a", "It is 5.  ")}
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    theirs = tokenizer.apply_chat_template(
        row["messages"], tokenize=True, return_dict=True, return_assistant_tokens_mask=True
    )
    _, labels = of_jaxlm(folder, [row])
    text = tokenizer.decode([label for label in labels[0] if label != -100])
    assert text == "It is 5.  "
    learned = [token for token, kept in zip(theirs["input_ids"], theirs["assistant_masks"], strict=True) if kept]
    assert tokenizer.decode(learned) == "It is 5. "

"""Conversations: the text that a chat template makes of them, what of it is learned, and that nothing else is."""

import io
import json
import random
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
from conftest import make_config

from jaxlm import Trainer, evaluate, load
from jaxlm.__main__ import run_named
from jaxlm.commands.inspect import describe_row
from jaxlm.config import DataConfig
from jaxlm.data import files
from jaxlm.data.chat import PLAIN, ChatTemplate, check_messages
from jaxlm.data.chat_tokens import chat_template, turn_end, why_it_will_not_stop, with_template
from jaxlm.data.documents import Document, Found
from jaxlm.data.formats import ConversationRows
from jaxlm.data.handed_over import PythonRows
from jaxlm.data.hub import read_split
from jaxlm.data.loader import Rows
from jaxlm.data.packing import plan_cached
from jaxlm.data.tokenizer import Tokenizer
from jaxlm.data.tokens import Prepared, prepare
from jaxlm.errors import UserError
from jaxlm.generation.api import encode_prompts, generate_text

TOKENS = {"bos_token": "<bos>", "eos_token": "<eos>"}
# A common form, whose answers are not marked; and one that drops what earlier answers thought.
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
FORGETFUL = CHATML.replace("{{ m.content }}", "{{ m.content if loop.last else m.content.split('=')[-1] }}")
TURNS = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "What is 2 + 3?"},
    {"role": "assistant", "content": "2 + 3 = 5"},
    {"role": "user", "content": "And 5 + 4?"},
    {"role": "assistant", "content": "5 + 4 = 9"},
]

CALLING = {"role": "assistant", "content": "", "tool_calls": [{"type": "function", "function": {"name": "add"}}]}


def template(source: str) -> ChatTemplate:
    return ChatTemplate(source, TOKENS, "template")


def answers_of(source: str, messages: Sequence[Any] = TURNS, last: bool = False) -> list[str]:
    text, answers = template(source).answers(messages, last)
    return [text[start:end] for start, end in answers]


def test_text_and_answers_of_the_plain_template() -> None:
    text = "<bos><|user|>\nHi<eos>\n<|assistant|>\nHello!<eos>\n"
    messages = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello!"}]
    assert template(PLAIN).answers(messages, False).text == text
    assert answers_of(PLAIN) == ["2 + 3 = 5<eos>", "5 + 4 = 9<eos>"]
    assert answers_of(PLAIN, last=True) == ["5 + 4 = 9<eos>"]
    prompt = template(PLAIN).render(messages[:1], prompt=True)
    assert prompt.text == "<bos><|user|>\nHi<eos>\n<|assistant|>\n"
    assert text.startswith(prompt.text)


def test_a_call_that_a_template_leaves_out_is_refused() -> None:
    named = {"role": "user", "content": "Use add."}  # whatever else names the function
    with pytest.raises(UserError, match="does not write tool_calls, as in turn 7"):
        template(CHATML).render([*TURNS, named, CALLING])
    with pytest.raises(UserError, match="does not write function_call, as in turn 1"):
        template(PLAIN).render([{"role": "assistant", "content": "", "function_call": {"name": "add"}}])
    assert '"add"' in template("{% for m in messages %}{{ m | tojson }}\n{% endfor %}").render([CALLING]).text


def test_answers_are_found_where_a_template_does_not_mark_them() -> None:
    assert answers_of(CHATML) == ["2 + 3 = 5<|im_end|>\n", "5 + 4 = 9<|im_end|>\n"]
    assert answers_of(CHATML, TURNS[:4]) == ["2 + 3 = 5<|im_end|>\n"]
    text, answers = template(CHATML).completion(TURNS[:2], TURNS[2:])
    assert [text[start:end] for start, end in answers] == [text[text.index("2 + 3 = 5") :]]


def test_an_answer_that_a_template_changes_later_is_refused() -> None:
    with pytest.raises(UserError, match=r"turn 3, the assistant's, can't be found.*data\.loss_on last_turn"):
        template(FORGETFUL).answers(TURNS, False)
    assert answers_of(FORGETFUL, last=True) == ["5 + 4 = 9<|im_end|>\n"]


def test_what_templates_are_given() -> None:
    written = template("{{ tools | tojson }}{{ strftime_now('%d %b %Y') }}{% for x in [1, 2] %}{% break %}{% endfor %}")
    assert written.render([], tools=[{"name": "é<"}]).text == '[{"name": "é<"}]26 Jul 2024'
    assert template("  {% if true %}\n  a\n  {% endif %}\nb").render([]).text == "  a\nb"
    with pytest.raises(UserError, match="template raises: no such role"):
        template("{{ raise_exception('no such role') }}").render(TURNS)
    with pytest.raises(UserError, match="template raises"):
        template("{{ messages[0].content + 1 }}").render(TURNS)
    with pytest.raises(UserError, match="line 2"):
        template("\n{% if %}")
    with pytest.raises(UserError, match="U\\+FDD0"):
        template(PLAIN).render([{"role": "assistant", "content": "\ufdd0"}])


@pytest.mark.parametrize(
    ("messages", "problem"),
    [
        ([], "no list of messages"),
        ("Hi", "no list of messages"),
        ([{"content": "Hi"}], "turn 1 has no role"),
        ([{"role": "user", "content": "Hi"}, {"role": "bot", "content": "Hi"}], r"turn 2 has an unknown role \(bot\)"),
        ([{"role": "user"}], "turn 1 has no content"),
        ([{"role": "user", "content": 3}], "turn 1: its content is int"),
    ],
)
def test_bad_messages(messages: Any, problem: str) -> None:
    with pytest.raises(UserError, match=problem):
        check_messages(messages)


def test_keys_that_hold_nothing_are_left_out() -> None:
    turn = {"role": "assistant", "content": None, "tool_calls": [{"name": "f"}], "name": None}
    assert check_messages([turn]) == [{"role": "assistant", "content": None, "tool_calls": [{"name": "f"}]}]


# ---- From files to rows ----------------------------------------------------------------------------------------------


def conversations(count: int) -> list[list[dict[str, str]]]:
    """Sums of two numbers, one or two of them each."""
    numbers = random.Random(0)
    made = []
    for _ in range(count):
        turns = []
        for _ in range(numbers.choice((1, 1, 2))):
            a, b = numbers.randrange(100), numbers.randrange(100)
            turns += [{"role": "user", "content": f"{a}+{b}?"}, {"role": "assistant", "content": f"It is {a + b}."}]
        made.append(turns)
    return made


def write(path: Path, rows: Sequence[Any]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


@pytest.fixture
def talks(tmp_path: Path) -> str:
    return write(tmp_path / "talks.jsonl", [{"messages": turns} for turns in conversations(60)])


def prepared(tmp_path: Path, file: str, **options: Any) -> tuple[Prepared, list[str]]:
    data = DataConfig(train_files=(file,), cache_dir=str(tmp_path / "cache"), **{"max_length": 64} | options)
    lines: list[str] = []
    return prepare(data, 330, None, lines.append), lines


def rows_of(found: Prepared, **options: Any) -> Rows:
    assert found.train is not None
    data = DataConfig(min_length=0, **{"max_length": 64, "packing_strategy": "best_fit"} | options)
    return Rows(found.train, plan_cached(found.train, data, lambda _: None))


def learned_texts(found: Prepared, rows: Rows) -> list[str]:
    """The targets that are learned, in pieces that were adjacent, as they are written."""
    pieces = []
    for row in (rows[i] for i in range(len(rows))):
        for segment in range(1, row["segments"].max() + 1):
            own = row["segments"] == segment
            breaks = np.flatnonzero(np.diff(np.concatenate([[0], row["loss_mask"][own].astype(int), [0]])))
            for start, end in breaks.reshape(-1, 2):
                pieces.append("".join(map(found.tokenizer.token, row["targets"][own][start:end])).replace("Ġ", " "))
    return pieces


def test_the_answers_and_nothing_else_are_learned(tmp_path: Path, talks: str) -> None:
    found, lines = prepared(tmp_path, talks, validation_fraction=0)
    wanted = [turn["content"] + "<eos>" for turns in conversations(60) for turn in turns if turn["role"] == "assistant"]
    assert sorted(learned_texts(found, rows_of(found))) == sorted(wanted)
    assert found.train is not None
    assert found.train.document_bytes.sum() == sum(len(text) - len("<eos>") for text in wanted)
    learned = sum(len(found.tokenizer.encode(text)) for text in wanted)
    assert any(line.startswith(f"train: {learned:,} of ") for line in lines), lines
    assert "documents: conversations by data.chat_template (plain)" in lines
    row = rows_of(found)[0]
    assert not (row["loss_mask"] & (row["segments"] == 0)).any()


def test_tokens_are_those_of_the_template(tmp_path: Path, talks: str) -> None:
    found, _ = prepared(tmp_path, talks, validation_fraction=0)
    assert found.train is not None
    own = chat_template(DataConfig(), found.tokenizer)
    for number, turns in enumerate(conversations(60)):
        low, high = found.train.offsets[number : number + 2]
        assert found.train.tokens[low:high].tolist() == found.tokenizer.encode(own.render(turns).text)
    assert found.tokenizer.encode("<bos>") == [found.tokenizer.bos_id]
    assert all("<" not in token[1:] for token in map(found.tokenizer.token, range(259, found.tokenizer.vocab_size)))


def test_what_is_learned_can_be_chosen(tmp_path: Path, talks: str) -> None:
    found, _ = prepared(tmp_path, talks, validation_fraction=0, loss_on="last_turn")
    wanted = [turns[-1]["content"] + "<eos>" for turns in conversations(60)]
    assert sorted(learned_texts(found, rows_of(found))) == sorted(wanted)
    found, _ = prepared(tmp_path, talks, validation_fraction=0, loss_on="all")
    assert found.train is not None
    assert found.train.learned is None
    assert "loss_mask" not in rows_of(found)[0]


def test_prompts_with_completions(tmp_path: Path) -> None:
    rows = [{"prompt": f"{i} plus one is", "completion": f" {i + 1}"} for i in range(40)] + [
        {"prompt": "nothing", "completion": ""}
    ]
    found, lines = prepared(tmp_path, write(tmp_path / "p.jsonl", rows), validation_fraction=0)
    texts = learned_texts(found, rows_of(found))
    assert sorted(texts) == sorted(f" {i + 1}<eos>" for i in range(40))
    assert any("1 document(s) left out, with nothing to learn: " in line and "line 41" in line for line in lines)
    assert "chat_template" not in found.tokenizer.said
    assert found.train is not None
    assert found.tokenizer.bos_id in found.train.tokens[:1]
    turns = [{"prompt": talk[:1], "completion": talk[1:2]} for talk in conversations(40)]
    found, _ = prepared(tmp_path, write(tmp_path / "m.jsonl", turns), validation_fraction=0)
    wanted = [talk[1]["content"] + "<eos>\n" for talk in conversations(40)]
    assert sorted(text.replace("Ċ", "\n") for text in learned_texts(found, rows_of(found))) == sorted(wanted)


def test_parquet_and_json_say_the_same(tmp_path: Path, talks: str) -> None:
    from pyarrow import Table, parquet

    table = Table.from_pylist([{"id": i, "messages": turns} for i, turns in enumerate(conversations(60))])
    parquet.write_table(table, tmp_path / "talks.parquet")
    found = [prepared(tmp_path, file, validation_fraction=0)[0] for file in (talks, str(tmp_path / "talks.parquet"))]
    first, second = (each.train for each in found)
    assert first is not None
    assert second is not None
    assert first.folder != second.folder
    assert (first.tokens == second.tokens).all()
    assert (first.learned == second.learned).all()


WITH_TOOLS = (
    "{% for tool in tools or [] %}{{ tool | tojson }}{% endfor %}{% for m in messages %}[{{ m.role }}]"
    "{{ m.content if m.content is not none else '(none)' }}"
    "{% for call in m.tool_calls or [] %}{{ call.function.arguments | tojson }}{% endfor %}{% endfor %}"
)


def test_calls_in_a_table_have_their_own_arguments_alone(tmp_path: Path) -> None:
    """In a table each has those of all others, too, as nulls; in JSON lines a null was meant."""

    def row(tool: str, arguments: dict[str, Any]) -> dict[str, Any]:
        call = {"type": "function", "function": {"name": tool, "arguments": arguments}}
        turns = [{"role": "user", "content": "q"}, {"role": "assistant", "content": None, "tool_calls": [call]}]
        properties = {name: {"type": type(value).__name__} for name, value in arguments.items()}
        return {"messages": turns, "tools": [{"name": tool, "parameters": {"properties": properties}}]}

    given = [row("weather", {"city": "Bern", "content": "short"}), row("add", {"x": [1, 2]})]
    table = datasets.Dataset.from_list(given)
    table.to_parquet(tmp_path / "rows.parquet")
    written = ConversationRows("messages", template(WITH_TOOLS), "all")

    def texts_of(found: Found) -> list[str]:
        documents = list(found)
        assert all(isinstance(document, Document) for document in documents), documents
        return [document.text for document in documents if isinstance(document, Document)]

    expected = texts_of(PythonRows(given, "train_dataset", DataConfig()).read(written))
    assert expected[1].endswith('}[user]q[assistant](none){"x": [1, 2]}')
    assert texts_of(PythonRows(table, "train_dataset", DataConfig()).read(written)) == expected
    assert texts_of(read_split(table, "train", written, "train")) == expected
    assert texts_of(files.read_files([tmp_path / "rows.parquet"], written, "data.train_files")) == expected
    given[1]["messages"][1]["tool_calls"][0]["function"]["arguments"]["x"] = None
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(x) + "\n" for x in given))
    assert texts_of(files.read_files([tmp_path / "rows.jsonl"], written, "data.train_files"))[1].endswith('{"x": null}')


def test_tools_may_be_json(tmp_path: Path) -> None:
    written = template(
        "{% for t in tools %}{{ t.name }};{% endfor %}{% for m in messages %}{{ m.content }}{% endfor %}"
    )
    rows = ConversationRows("messages", written, "all")
    for tools in ([{"name": "f"}, {"name": "g"}], '[{"name": "f"}, {"name": "g"}]'):
        document = rows.document({"messages": TURNS[:2], "tools": tools}, "line 1")
        assert isinstance(document, Document)
        assert document.text == "f;g;Be brief.What is 2 + 3?"


def test_all_is_learned_whatever_a_template_does(tmp_path: Path) -> None:
    for kind, row in (
        ("messages", {"messages": TURNS}),
        ("prompt_completion", {"prompt": TURNS[:3], "completion": TURNS[3:]}),
    ):
        document = ConversationRows(kind, template(FORGETFUL), "all").document(row, "line 1")
        assert isinstance(document, Document)
        assert (document.text, document.learned) == (template(FORGETFUL).render(TURNS).text, None)
    last = ConversationRows("prompt_completion", template(PLAIN), "last_turn")
    document = last.document({"prompt": TURNS[:1], "completion": TURNS[1:]}, "line 1")
    assert isinstance(document, Document)
    assert document.learned is not None
    assert [document.text[start:end] for start, end in document.learned] == ["5 + 4 = 9<eos>"]


def test_other_columns_are_not_looked_at(tmp_path: Path) -> None:
    """As a date beyond what Python has, in a column that nothing needs."""
    from pyarrow import Table, array, int64, parquet, timestamp

    far = array([2**62] * 30, int64()).cast(timestamp("us"))
    parquet.write_table(
        Table.from_pydict({"when": far, "text": [f"text {i}" for i in range(30)]}), tmp_path / "a.parquet"
    )
    found, _ = prepared(tmp_path, str(tmp_path / "a.parquet"), validation_fraction=0)
    assert found.train is not None
    assert len(found.train) == 30


def test_conversations_are_held_out_whole(tmp_path: Path) -> None:
    few = write(tmp_path / "few.jsonl", [{"messages": turns} for turns in conversations(4)])
    found, _ = prepared(tmp_path, few, min_length=0)
    assert found.train is not None
    assert found.validation is not None
    assert (len(found.train), len(found.validation)) == (3, 1)


LONG = [{"role": "user", "content": "1+1?"}, {"role": "assistant", "content": "2 " * 200}]
FAR = [{"role": "user", "content": "1+1? " * 50}, {"role": "assistant", "content": "2"}]


def test_conversations_longer_than_a_row(tmp_path: Path) -> None:
    rows = [{"messages": turns} for turns in [LONG, *conversations(30), FAR]]
    file = write(tmp_path / "long.jsonl", rows)
    found, lines = prepared(tmp_path, file, validation_fraction=0)
    assert found.train is not None
    assert (len(found.train), np.diff(found.train.offsets)[0]) == (31, 65)
    assert any("1 document(s) left out, with nothing to learn in the first 65 tokens" in line for line in lines)
    assert any("line 32" in line for line in lines)
    found, lines = prepared(tmp_path, file, validation_fraction=0, too_long="drop")
    assert found.train is not None
    assert len(found.train) == 30
    assert any("2 document(s) left out, of more than 65 tokens (data.too_long drop)" in line for line in lines)
    with pytest.raises(UserError, match=r"line 1 has \d+ tokens, and a row sees 65.*data\.too_long"):
        prepared(tmp_path, file, validation_fraction=0, too_long="error")


def test_texts_longer_than_a_row_can_be_dropped(tmp_path: Path) -> None:
    file = write(tmp_path / "text.jsonl", [{"text": "long " * 200}] + [{"text": f"short {i}"} for i in range(20)])
    found, lines = prepared(tmp_path, file, validation_fraction=0, too_long="drop")
    assert found.train is not None
    assert len(found.train) == 20
    assert any("1 document(s) left out, of more than 65 tokens" in line for line in lines)


@pytest.mark.parametrize(
    ("rows", "options", "problem"),
    [
        ([{"messages": TURNS}, {"text": "x"}], {}, r"data\.format \(messages\): messages: not in .*line 2"),
        ([{"messages": TURNS}, {"messages": "x"}], {}, "line 2: holds messages: str; the first row"),
        ([{"prompt": "a", "completion": "b"}, {"prompt": TURNS[:1], "completion": TURNS[2:3]}], {}, "line 2: holds"),
        ([{"messages": [{"role": "robot", "content": "x"}]}], {}, r"line 1: turn 1 has an unknown role \(robot\)"),
        ([{"messages": TURNS}], {"document_separator": "***"}, "data.document_separator"),
        ([{"messages": TURNS}], {"packing_strategy": "concat"}, "data.packing_strategy"),
        ([{"text": "x"}], {"loss_on": "last_turn"}, r"data\.loss_on \(last_turn\)"),
        (
            [{"text": "x"}],
            {"chat_template": "nowhere.jinja"},
            r"data\.chat_template \(nowhere\.jinja\): .* leave it out",
        ),
        ([{"prompt": "a", "completion": "b"}], {"loss_on": "last_turn"}, r"data\.loss_on \(last_turn\)"),
        ([{"messages": TURNS}], {"text_column": "body"}, r"data\.text_column \(body\): not in"),
        ([{"messages": TURNS, "tools": "[{"}], {}, "line 1: tools: bad JSON"),
        ([{"messages": TURNS, "tools": {"a": 1}}], {}, "line 1: tools is dict, not a list"),
        ([{"text": "x"}], {"format": "messages"}, r"data\.format \(messages\): messages: not in"),
        ([{"messages": [*TURNS, CALLING]}], {}, r"line 1: .*\(plain\) does not write tool_calls, as in turn 6"),
        ([{"words": "x"}], {}, r"data\.text_column \(text\)"),
        ([{"messages": TURNS}], {"chat_template": "nowhere.jinja"}, "no such file"),
        ([{"messages": TURNS[:2]}], {}, "can be learned.*with nothing to learn"),
    ],
)
def test_bad_rows(tmp_path: Path, rows: list[Any], options: dict[str, Any], problem: str) -> None:
    with pytest.raises(UserError, match=problem):
        prepared(tmp_path, write(tmp_path / "bad.jsonl", rows), **{"validation_fraction": 0} | options)


def test_plain_text_holds_no_conversations(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("text")
    with pytest.raises(UserError, match=r"data\.format \(messages\): .* is plain text"):
        prepared(tmp_path, str(tmp_path / "a.txt"), format="messages")


def test_bad_rows_can_be_skipped(tmp_path: Path) -> None:
    rows = [{"messages": turns} for turns in conversations(20)] + [{"messages": [{"role": "robot", "content": "x"}]}]
    file = write(tmp_path / "some.jsonl", rows)
    found, lines = prepared(tmp_path, file, validation_fraction=0, on_bad_document="skip")
    assert found.train is not None
    assert len(found.train) == 20
    assert any("1 bad document(s) left out" in line and "line 21: turn 1" in line for line in lines)


# ---- Templates of tokenizers -----------------------------------------------------------------------------------------


@pytest.fixture
def chatml(tmp_path: Path) -> Tokenizer:
    """A tokenizer with markers of turns, as a folder for transformers has it; its <eos> is another token."""
    Tokenizer.train(["What is 2 + 3? It is 5."] * 9, 280).save(tmp_path / "folder")
    file = tmp_path / "folder" / "tokenizer.json"
    content = json.loads(file.read_text())
    for token in ("<|im_start|>", "<|im_end|>"):
        content["added_tokens"].append(
            {"id": len(content["model"]["vocab"]) + 1, "content": token, "special": True}
            | dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
        )
        content["model"]["vocab"][token] = content["added_tokens"][-1]["id"] = len(content["model"]["vocab"])
    file.write_text(json.dumps(content))
    (tmp_path / "folder" / "chat_template.jinja").write_text(CHATML)
    (tmp_path / "folder" / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<eos>"}))
    return Tokenizer.load(tmp_path / "folder")


def test_no_token_ends_answers_that_a_template_leaves_out(chatml: Tokenizer) -> None:
    """Or whose words stand in its own; what begins a text is never taken for what ends one."""
    assert turn_end(template("{{ bos_token }}{{ messages[0].content }}"), chatml) is None
    behind = template("{{ bos_token }}{% for m in messages %}{{ m.content }}<|im_end|>b{% endfor %}")
    end = turn_end(behind, chatml)
    assert end is not None
    assert chatml.token(end) == "<|im_end|>"


def test_the_token_that_ends_an_answer_ends_texts(chatml: Tokenizer, tmp_path: Path) -> None:
    own = chat_template(DataConfig(), chatml)
    end = turn_end(own, chatml)
    assert end is not None
    assert chatml.token(end) == "<|im_end|>"
    assert end not in chatml.end_ids
    carried = with_template(chatml, own)
    assert carried.end_ids == (chatml.eos_id, end)
    carried.save(tmp_path / "saved")
    again = Tokenizer.load(tmp_path / "saved")
    assert (again.end_ids, again.fingerprint) == (carried.end_ids, carried.fingerprint)
    assert with_template(again, chat_template(DataConfig(), again)).fingerprint == carried.fingerprint
    (ids,) = encode_prompts(again, [TURNS[1:2]], 64)
    assert ids[0] == ids[0] == again.encode("<|im_start|>")[0]
    assert again.bos_id not in ids


def test_a_template_that_leaves_out_the_end_of_an_answer_is_doubted(chatml: Tokenizer) -> None:
    content = "{{ m.content }}<|im_end|>"
    marked = "{% generation %}{{ m.content }}<|im_end|>{% endgeneration %}"
    assert why_it_will_not_stop(template(CHATML.replace(content, marked)), chatml) is None
    assert why_it_will_not_stop(template(CHATML), chatml) is None
    doubt = why_it_will_not_stop(template(CHATML.replace("{{ m.content }}", marked.replace("<|im_end|>", ""))), chatml)
    assert doubt is not None
    assert "<|im_end|> ends an answer" in doubt


def test_inspect_shows_what_is_learned(tmp_path: Path, talks: str) -> None:
    found, _ = prepared(tmp_path, talks, validation_fraction=0)
    rows = rows_of(found)
    shown = "\n".join(describe_row(rows, 0, found.tokenizer, 0, 10_000))
    answers = re.findall(r"\[\[(.*?)\]\]", shown)
    assert answers
    assert all(re.fullmatch(r"It is \d+\.<eos>", answer) for answer in answers)
    assert f"({rows[0]['loss_mask'].sum()} learned)" in shown


def test_a_token_that_was_not_named_stays_without_name(chatml: Tokenizer, tmp_path: Path) -> None:
    """A template that asks for it gets nothing, in training and after it: as in transformers."""
    (tmp_path / "asking.jinja").write_text("{{ bos_token }}" + CHATML)
    own = chat_template(DataConfig(chat_template=str(tmp_path / "asking.jinja")), chatml)
    carried = with_template(chatml, own)
    carried.save(tmp_path / "saved")
    again = chat_template(DataConfig(), Tokenizer.load(tmp_path / "saved"))
    assert (again.fingerprint, again.tokens) == (own.fingerprint, {"eos_token": "<eos>"})
    assert again.render(TURNS[1:2]).text == own.render(TURNS[1:2]).text == template(CHATML).render(TURNS[1:2]).text


def test_a_tokenizer_without_a_template_needs_one(tmp_path: Path, talks: str) -> None:
    Tokenizer.train(["What is 2 + 3? It is 5."] * 9, 280).save(tmp_path / "own")
    with pytest.raises(UserError, match=r"data\.chat_template \(none\): the tokenizer has no chat template"):
        prepared(tmp_path, talks, tokenizer_path=str(tmp_path / "own"))
    found, _ = prepared(tmp_path, talks, tokenizer_path=str(tmp_path / "own"), chat_template="plain")
    assert found.tokenizer.said["chat_template"] == PLAIN
    (tmp_path / "other.jinja").write_text(CHATML)
    found, _ = prepared(
        tmp_path, talks, tokenizer_path=str(tmp_path / "own"), chat_template=str(tmp_path / "other.jinja")
    )
    assert found.tokenizer.said["chat_template"] == CHATML
    plain = Tokenizer.load(tmp_path / "own")
    with pytest.raises(UserError, match="no chat template"):
        encode_prompts(plain, [TURNS[:2]], 64)


# ---- Runs ------------------------------------------------------------------------------------------------------------


def test_a_run_keeps_its_template(tmp_path: Path, corpus: Path, talks: str) -> None:
    file = tmp_path / "own.jinja"
    file.write_text(CHATML)
    options = {"data.train_files": (talks,), "data.validation_files": (), "data.min_length": 0}
    options |= {"data.chat_template": str(file), "model.vocab_size": 330}
    Trainer(make_config(tmp_path, corpus, **options, **{"training.stop_at_step": 2})).train()
    checkpoint = tmp_path / "run" / "checkpoint_2"
    found, own = evaluate(checkpoint), evaluate(checkpoint, [talks])
    file.write_text(CHATML.replace("<|im_end|>", "<|eot|>"))
    with pytest.raises(UserError, match="the text is not the one"):
        Trainer(make_config(tmp_path, corpus, **options))
    assert evaluate(checkpoint) == found, "a model is evaluated with the template that it has learned"
    file.unlink()
    assert evaluate(checkpoint, [talks]) == own
    assert evaluate(checkpoint, [talks], chat_template="plain")["loss"] != own["loss"]


@pytest.mark.slow
def test_a_run_resumes_bit_exactly_and_answers(
    tmp_path: Path, corpus: Path, talks: str, patch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    options = {
        "data.train_files": (talks,),
        "data.validation_files": (),
        "data.min_length": 0,
        "training.gradient_accumulation_steps": 2,
        "training.zero_stage": 2,
        "model.vocab_size": 330,
        "training.sample_tokens": 5,
    }
    whole = Trainer(make_config(tmp_path / "whole", corpus, **options))
    assert whole.assembly.masked
    whole.train()
    Trainer(make_config(tmp_path, corpus, **options, **{"training.stop_at_step": 2})).train()
    Trainer(make_config(tmp_path, corpus, **options)).train()
    for row, again in zip(
        *((folder / "run" / "metrics.jsonl").read_text().splitlines() for folder in (tmp_path / "whole", tmp_path)),
        strict=True,
    ):
        first, second = json.loads(row), json.loads(again)
        assert first["train/loss"] == second["train/loss"]
        assert first.get("eval/bits_per_byte") == second.get("eval/bits_per_byte")
    loaded = load(tmp_path / "run")
    (answer,) = generate_text(loaded.model, loaded.tokenizer, TURNS[1:2], max_new_tokens=5)
    assert "2 + 3" not in answer
    patch.setattr("sys.stdin", io.StringIO("Hi\n/temp 0\n/system Be brief.\n/nothing\n/temp hot\nHi\n/exit\nHi\n"))
    capsys.readouterr()
    run_named(["chat", "--model", str(tmp_path / "run"), "--max_new_tokens", "3"])
    shown = capsys.readouterr()
    for line in (
        "temperature 0",
        "a new conversation, system: Be brief.",
        "/nothing: unknown command",
        "/temp ('hot')",
    ):
        assert line in shown.err
    assert "generated 3 tokens" in shown.err
    assert "shorten it" in shown.err, "the window is full, and the chat goes on"
    assert loaded.tokenizer.said["chat_template"] == PLAIN

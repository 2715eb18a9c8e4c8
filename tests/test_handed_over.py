"""Text that a program hands over: read as that of files is, resumed exactly, refused in a line where it can't be."""

import json
from collections.abc import Callable, Iterator
from typing import Any

import datasets
import jax
import numpy as np
import pytest
from conftest import documents, make_config, trainer_on

from jaxlm import Trainer
from jaxlm.__main__ import run as command
from jaxlm.config import DataConfig, load_config, replace_fields
from jaxlm.data.handed_over import PythonRows
from jaxlm.errors import UserError

TEXTS = {"train_dataset": documents(120, 1), "eval_dataset": documents(20, 2)}  # as train.jsonl and validation.jsonl
NO_FILES: dict[str, Any] = {"data.train_files": (), "data.validation_files": ()}
SMALL: dict[str, Any] = {"model.n_layers": 1, "model.d_model": 16, "model.d_ff": 32}


@pytest.fixture(scope="module")
def of_files(tmp_path_factory, corpus):
    """A finished run on the same text in files."""
    trainer = Trainer(make_config(tmp_path_factory.mktemp("files"), corpus, **SMALL))
    trainer.train()
    return trainer


@pytest.fixture
def config(tmp_path, corpus):
    return lambda **more: make_config(tmp_path, corpus, **NO_FILES | SMALL | more)


def rows(trainer):
    lines = [json.loads(line) for line in (trainer.folder / "metrics.jsonl").read_text().splitlines()]
    keep = "train/loss", "train/grad_norm", "eval/loss", "eval/bits_per_byte"
    return [{name: row[name] for name in keep if name in row} for row in lines]


def assert_same_rows(mine, theirs):
    all_of = lambda rows: [rows[i] for i in range(len(rows))]  # noqa: E731
    jax.tree.map(np.testing.assert_array_equal, all_of(mine), all_of(theirs))


def each(change: Callable[[str], Any]) -> dict[str, Any]:
    return {name: [change(text) for text in texts] for name, texts in TEXTS.items()}


class Indexed:
    """As a data set of torch.utils.data: no iterator, and no end but its length."""

    def __init__(self, texts: list[str]) -> None:
        self.texts = texts

    def __len__(self) -> int:
        return len(self.texts)

    def __getitem__(self, i: int) -> str:
        return self.texts[i % len(self.texts)]


WAYS: dict[str, Callable[[], dict[str, Any]]] = {
    "list of str": lambda: TEXTS,
    "list of dict": lambda: each(lambda text: {"id": object(), "text": text}),
    "Dataset": lambda: {n: datasets.Dataset.from_dict({"id": t, "text": t}) for n, t in TEXTS.items()},
    "IterableDataset": lambda: {
        n: datasets.IterableDataset.from_generator(lambda t: ({"text": x} for x in t), gen_kwargs={"t": t})
        for n, t in TEXTS.items()
    },
    "function": lambda: {"train_dataset": lambda: iter(TEXTS["train_dataset"]), "eval_dataset": TEXTS["eval_dataset"]},
    "indexed": lambda: {name: Indexed(texts) for name, texts in TEXTS.items()},
}


@pytest.mark.parametrize("way", WAYS)
def test_each_way_to_hand_text_over_gives_the_rows_of_files(way, config, of_files):
    trainer = Trainer(config(), **WAYS[way]())
    for mine, theirs in (
        (trainer.text.rows, of_files.text.rows),
        (trainer.text.eval_rows[""], of_files.text.eval_rows[""]),
    ):
        assert_same_rows(mine, theirs)
    assert trainer.text.eval_bytes == of_files.text.eval_bytes
    assert trainer.config.data.dataset_name == "python"


def test_a_run_stops_goes_on_and_ends_as_one_on_files(config, of_files, capfd):
    """From another object with the same content, and bit by bit; from the command line it is one line."""
    Trainer(config(**{"training.stop_at_step": 2}), **TEXTS).train()
    folder = Trainer(config(), **each(lambda text: {"text": text})).folder
    assert "text: 120 rows of train_dataset, held out: 20 rows of eval_dataset" in capfd.readouterr().err
    there = r"data\.dataset_name \(python\): the text was handed over by a program and is not here; "
    with pytest.raises(UserError, match=there + "go on where Trainer"):
        command("resume", [str(folder)])
    with pytest.raises(UserError, match=there + r"evaluate on files \(--files\)"):
        command("evaluate", ["--model", str(folder)])
    with pytest.raises(UserError, match="the text is not the one that .*checkpoint_2 was trained on"):
        Trainer(config(), **TEXTS | {"train_dataset": [*TEXTS["train_dataset"][:-1], "Another."]})
    again = Trainer(load_config(str(folder / "config.json")), **TEXTS)  # which stopped at 2
    assert again.current_step == again.last_step == 2
    trainer = Trainer(config(), **TEXTS)
    trainer.train()
    assert rows(trainer) == rows(of_files)
    assert Trainer(config(), **TEXTS).finished


@pytest.fixture(scope="module")
def tokens(of_files):
    """The documents of the run on files, as ids: of another dtype than they are kept in."""
    encode = of_files.tokenizer.encode_documents
    return {name: [ids.astype(np.int64) for ids in encode(texts)] for name, texts in TEXTS.items()}


def test_token_arrays_are_documents_as_they_stand(config, of_files, tokens, tmp_path):
    """Rows, bytes and a learned update are those of the text that they were made from; nothing is put around them."""
    own = {"data.tokenizer_path": str(of_files.folder / "tokenizer")}
    trainer = Trainer(config(**own), **tokens)
    assert_same_rows(trainer.text.rows, of_files.text.rows)
    assert trainer.text.eval_bytes == of_files.text.eval_bytes
    trainer.train()
    assert rows(trainer) == rows(of_files)
    square = np.stack([ids[:10] for ids in tokens["train_dataset"] if len(ids) >= 10])
    options = own | {"training.checkpoint_dir": str(tmp_path / "square"), "data.pack_sequences": False}
    part = Trainer(config(**options), train_dataset=square)
    held_out = part.text.eval_rows[""]
    assert len(held_out) == round(0.05 * len(square)) and len(part.text.rows) + len(held_out) == len(square)
    assert held_out[0]["tokens"][:9].tolist() in square[:, :9].tolist()
    padded = [{"input_ids": [*ids, 0, 0], "attention_mask": [1] * len(ids) + [0, 0]} for ids in tokens["train_dataset"]]
    as_rows = {"train_dataset": datasets.Dataset.from_list(padded), "eval_dataset": tokens["eval_dataset"]}
    third = Trainer(config(**own | {"training.checkpoint_dir": str(tmp_path / "third")}), **as_rows)
    assert_same_rows(third.text.rows, of_files.text.rows)


def test_conversations_are_learned_as_those_of_a_file(config, tmp_path):
    """Messages in dicts, of which some come from Arrow with missing keys; a mask, a template and a question."""
    talks = [
        [{"role": "user", "content": text}, {"role": "assistant", "content": text[::-1]}] for text in documents(30, 4)
    ]
    chats = [{"messages": talk} for talk in talks]
    (tmp_path / "chats.jsonl").write_text("".join(json.dumps(chat) + "\n" for chat in chats))
    of_file = Trainer(config(**{"data.train_files": (str(tmp_path / "chats.jsonl"),)}))
    for name, given in (("a", chats), ("b", datasets.Dataset.from_list(chats))):
        options = {"training.checkpoint_dir": str(tmp_path / name), "training.sample_tokens": 1}
        trainer = Trainer(config(**options), train_dataset=given)
        assert_same_rows(trainer.text.rows, of_file.text.rows)
        assert trainer.resolved.masked and trainer.text.sample_prompt == talks[0][:1]


def once() -> Iterator[str]:
    yield from TEXTS["train_dataset"]


class DataFrame(dict):
    """A stand-in for that of pandas: it iterates over its columns."""


ARRAYS = [np.arange(20), np.arange(20)]
REFUSED: list[tuple[Any, str]] = [
    (once(), r"train_dataset is a generator, which can be read once, .*hand over a list, .*function"),
    ("one text", "train_dataset is one str, not rows"),
    (DataFrame(text=TEXTS["train_dataset"]), "train_dataset is one DataFrame, not rows"),
    (datasets.DatasetDict(), "train_dataset is one DatasetDict, not rows"),
    (7, r"train_dataset \(int\) holds no rows"),
    (lambda: 7, r"train_dataset \(int\) holds no rows"),
    ([], "train_dataset holds no rows"),
    (["", ""], "train_dataset holds no text"),
    (["a", "b", "c", 3], r"train_dataset\[3\] is int; rows are text"),
    (["a", {"text": 3}], r"data\.text_column \(text\): train_dataset\[1\] holds int, not text"),
    (["a", {"text": b"b"}], r"data\.text_column \(text\): train_dataset\[1\] holds bytes, not text"),
    (["a", {"txt": "b"}], r"data\.text_column \(text\): not in train_dataset\[1\] \(did you mean txt\?\)"),
    (datasets.Dataset.from_dict({"txt": ["a"]}), r"data\.text_column \(text\): not in train_dataset .*there is: txt"),
    (["\ud800"], r"train_dataset\[0\]: .*half a surrogate pair"),
    (ARRAYS, r"train_dataset holds input_ids, ids of a tokenizer .*set data\.tokenizer_path, or training\.init_from"),
]
WITH_TOKENIZER: list[tuple[Any, str]] = [
    ([*ARRAYS, [3, 999]], r"train_dataset\[2\]: id 999 is none of the tokenizer's 300 tokens"),
    ([*ARRAYS, [-1, 3]], r"train_dataset\[2\]: id -1 is none of"),
    ([*ARRAYS, [0.5]], r"train_dataset\[2\] holds float64 \[1\], not the token ids"),
    ([*ARRAYS, [[1, 2], [3, 4]]], r"train_dataset\[2\] holds int64 \[2, 2\], not the token ids"),
    ([*ARRAYS, [[1], [3, 4]]], r"train_dataset\[2\]: input_ids: "),
    (np.arange(20), r"train_dataset\[0\] holds int64 \[\], not the token ids of a document"),
    ([{"input_ids": [5, 6], "labels": [-100, 6]}], r"train_dataset\[0\] has labels beside input_ids"),
]


CASES = [(*case, False) for case in REFUSED] + [(*case, True) for case in WITH_TOKENIZER]


@pytest.mark.parametrize(("given", "message", "with_tokenizer"), CASES)
def test_what_is_no_text_is_one_line(given, message, with_tokenizer, config, of_files, tmp_path):
    ours = {"data.tokenizer_path": str(of_files.folder / "tokenizer")} if with_tokenizer else {}
    with pytest.raises(UserError, match=message):
        Trainer(config(**ours), train_dataset=given)
    assert not (tmp_path / "run").exists()


def test_two_texts_are_refused_and_a_data_set_that_is_not_read_is_told(config, corpus, capfd):
    with pytest.raises(UserError, match="eval_dataset is set but train_dataset is not"):
        Trainer(config(), eval_dataset=["a"])
    for name in ("train_files", "validation_files"):
        files = {"data.train_files": ("a.txt",)} | {f"data.{name}": ("a.txt",)}
        with pytest.raises(UserError, match=r"data\.train_files \(a\.txt\) and train_dataset both name the text"):
            Trainer(config(**files), train_dataset=["a"])
    trainer = trainer_on(1, config(**{"data.dataset_name": "python-stdlib"}), **TEXTS)
    assert "data.dataset_name (python-stdlib) is not read: the text is train_dataset" in capfd.readouterr().err
    assert trainer.config.data.dataset_name == "python"
    with pytest.raises(UserError, match=r"data\.document_separator \(\*\) splits text, not tokens"):
        Trainer(config(**{"data.document_separator": "*"}), train_dataset=ARRAYS)
    with pytest.raises(UserError, match=r"eval_dataset\[0\] is int"):
        Trainer(config(), train_dataset=["a"], eval_dataset=[1])


def test_any_two_contents_have_other_fingerprints():
    def fingerprint(*rows):
        return PythonRows([*rows], "rows", DataConfig()).measured(DataConfig())[1]

    class Tensor:
        """As arrays of other libraries: without tolist."""

        def __init__(self, *ids):
            self.ids = ids

        def __array__(self, dtype=None, copy=None):
            return np.asarray(self.ids, dtype)

    assert fingerprint(Tensor(1, 2)) != fingerprint(Tensor(1, 3))
    assert fingerprint({"input_ids": range(3)}) != fingerprint({"input_ids": range(4)})
    assert (
        fingerprint({"input_ids": np.arange(3)})
        == fingerprint({"input_ids": [0, 1, 2]})
        == fingerprint(Tensor(0, 1, 2))
    )


def test_the_text_that_it_replaces_is_not_judged(config, tmp_path):
    trainer = Trainer(
        replace_fields(config(), {"data.dataset_name": "wikitext", "data.validation_fraction": 0.2}),
        train_dataset=TEXTS["train_dataset"],
    )
    assert sum(len(rows.plan) for rows in trainer.text.eval_rows.values()) > 10

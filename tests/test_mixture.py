"""Mixtures: the shares of sources are exact after any number of rows, in training, in annealing and after a resume."""

import json
import shutil
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from conftest import make_config, trainer_on
from hypothesis import given, settings
from hypothesis import strategies as st
from test_loader import make_rows, take

from jaxlm import Trainer
from jaxlm.__main__ import run as command
from jaxlm.config import Config, DataConfig, from_dict, replace_fields, to_dict, validate
from jaxlm.config.batches import Batches
from jaxlm.config.mixture import mixture_options
from jaxlm.data.loader import documents_of_step, train_batches
from jaxlm.data.mixture import Mixture, Turns
from jaxlm.errors import UserError
from jaxlm.monitor.metrics import Throughput
from jaxlm.run.evaluate import evaluate_model, text_to_evaluate
from jaxlm.run.feed import BatchFeeder
from jaxlm.run.load import load

MIXED = {
    "data.anneal_weights": ("web=1", "books=3"),
    "data.anneal_from": 4,
    "data.validation_files": (),
    "data.validation_fraction": 0.1,
    "training.max_steps": 6,
    "training.eval_steps": 6,
    "training.save_steps": 6,
    "model.n_layers": 1,
}


def mixed(folder: Path, corpus: Path, **dotted: Any) -> Config:
    """6 updates of 4 rows: 3 of the web to 1 of books, 1 to 3 from update 4 on."""
    sources = (f"web={corpus / 'train.jsonl'}:0.75", f"books={corpus / 'validation.jsonl'}|{corpus / 'book.txt'}:0.25")
    return make_config(folder, corpus, **MIXED | {"data.sources": sources, "training.batch_size": 4} | dotted)


def rows_of(run: Path) -> dict[int, dict[str, float]]:
    lines = (run / "metrics.jsonl").read_text().splitlines()
    return {row.pop("step"): row for row in map(json.loads, lines)}


# ---------------------------------------------------------------- whose turn it is


@given(weights=st.lists(st.integers(0, 60), min_size=1, max_size=7).filter(any))
@settings(deadline=None, max_examples=40)
def test_every_source_is_within_one_turn_of_its_share(weights: list[int]) -> None:
    turns = Turns(weights)
    counts = np.zeros(len(weights), int)
    for turn in range(turns.period):
        source, number = turns[turn + 5 * turns.period]
        assert number == counts[source] + 5 * weights[source]
        counts[source] += 1
        assert (abs(counts - (turn + 1) * np.array(weights) / sum(weights)) < 1).all()
        assert turns.counts(turn + 1).tolist() == counts.tolist()
    assert counts.tolist() == weights


def test_the_order_is_the_one_that_runs_in_progress_rely_on() -> None:
    turns = Turns([5, 3, 2])
    assert [turns[i][0] for i in range(10)] == [0, 1, 0, 2, 0, 1, 0, 1, 0, 2]


def mixture_of(folder: Path, *counts: int) -> Mixture:
    """Rows of 12, 5 and 7 tokens, so that each says which source it is of."""
    parts = {}
    for name, tokens, count in zip("abc", (13, 6, 8), counts, strict=True):
        (folder / name).mkdir()
        parts[name] = make_rows(folder / name, [tokens] * count, pack=False)
    return Mixture(parts, [[700, 203, 97], [1, 1, 8]])


@pytest.fixture
def mixture(tmp_path: Path) -> Mixture:
    return mixture_of(tmp_path, 10, 7, 5)


def test_1000_updates_are_within_one_row_of_the_weights(tmp_path: Path) -> None:
    """And of the second weights from where these begin; each source is gone over in the order that it has alone."""
    mixture = mixture_of(tmp_path, 700, 600, 500)  # grain is slow for fewer
    G, anneal_row = 2, 1301
    order, seen = mixture.order(42, anneal_row), dict[str, list[int]](a=[], b=[], c=[])
    for place in range(1000 * G):
        name, _, row = mixture.find(order[place])
        seen[name].append(row)
        if place + 1 == anneal_row:
            before = {name: len(rows) for name, rows in seen.items()}
    shares = zip(seen, (0.7, 0.203, 0.097), (0.1, 0.1, 0.8), strict=True)
    for name, share, later in shares:
        assert abs(before[name] - share * anneal_row) < 1
        assert abs(len(seen[name]) - before[name] - later * (1000 * G - anneal_row)) < 1
        alone = mixture.parts[name].order(42)
        assert seen[name] == [alone[i] for i in range(len(seen[name]))]
    assert mixture.counts(1000 * G, anneal_row) == [len(rows) for rows in seen.values()]


def test_what_is_taken_of_each_source(mixture: Mixture) -> None:
    """These rows are all as full as their source's mean."""
    rows = np.concatenate([b["segments"][0] for b in take(train_batches(mixture, 1, Batches(4), 0, anneal_row=21), 30)])
    for place in (4, 20, 21, 24, 120):
        pairs = (rows[:place] > 0).sum(axis=1)
        taken = {name: pairs[pairs == n] for name, n in (("a", 12), ("b", 5), ("c", 7))}
        metrics = mixture.metrics(place, 21)
        assert {f"data/{name}/tokens": own.sum() for name, own in taken.items()}.items() <= metrics.items()
        assert metrics["data/c/epoch"] == len(taken["c"]) / 5


def test_batch_depends_on_the_step_alone(mixture: Mixture) -> None:
    whole = take(train_batches(mixture, 3, Batches(2, 2), 0, anneal_row=17), 8)
    for start in (3, 5):
        batches = take(train_batches(mixture, 3, Batches(2, 2), start, anneal_row=17), 3)
        for expected, batch in zip(whole[start : start + 3], batches, strict=True):
            np.testing.assert_array_equal(batch["tokens"], expected["tokens"])
    doubled = take(train_batches(mixture, 3, Batches(8, offset=-4), 2, anneal_row=17), 2)
    both = np.concatenate([batch["tokens"].reshape(4, -1) for batch in whole[3:7]])
    np.testing.assert_array_equal(np.concatenate([batch["tokens"][0] for batch in doubled]), both)


def test_documents_are_numbered_from_one_source_to_the_next(mixture: Mixture) -> None:
    assert documents_of_step(mixture, 0, Batches(62), 0) == list(range(22))
    assert mixture.documents(10).tolist() == [10]
    assert mixture.documents(21).tolist() == [21]


def test_one_source_is_the_text_alone(tmp_path: Path) -> None:
    rows = make_rows(tmp_path, [5, 8, 3, 30, 2, 13, 4] * 3)
    alone, order = rows.order(7), Mixture({"a": rows}, [[1]]).order(7)
    assert [order[i] for i in range(60)] == [alone[i] for i in range(60)]


# ---------------------------------------------------------------- runs


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory, corpus: Path) -> Trainer:
    trainer = trainer_on(1, mixed(tmp_path_factory.mktemp("mixed"), corpus))
    trainer.train()
    return trainer


def test_a_run_logs_what_it_takes_of_each_source(reference: Trainer, capsys: pytest.CaptureFixture[str]) -> None:
    rows, parts = rows_of(reference.folder), reference.text.rows.parts
    web, books = (len(part) for part in parts.values())
    taken = {step: [rows[step]["data/web/epoch"] * web, rows[step]["data/books/epoch"] * books] for step in (3, 6)}
    assert taken == {3: pytest.approx([9, 3]), 6: pytest.approx([12, 12])}
    assert rows[6]["data/web/tokens"] == pytest.approx(12 / web * parts["web"].plan.pairs, abs=0.5)
    lines = [line for line in reference._start.lines() if line.startswith("mixture: ")]
    epochs = f"{12 / web:.2f}"
    assert lines[0] == f"mixture: web 0.75 of the rows, 0.25 from update 4 on; {web:,} rows, {epochs} epochs"


def test_the_batches_of_a_run_are_the_rows_of_the_stream(reference: Trainer) -> None:
    """Annealed where they should be."""
    rows = reference.text.rows
    order = rows.order(42, 12)
    feeder = BatchFeeder(reference.resolved, rows, range(2, 5), Throughput(), reference._watchdog)
    found = np.concatenate([np.asarray(batch["tokens"]).reshape(4, -1) for batch in feeder])
    np.testing.assert_array_equal(found, [rows[order[place]]["tokens"] for place in range(8, 20)])


def test_losses_of_sources_sum_to_that_of_all(reference: Trainer) -> None:
    """Weighted by their targets; `jaxlm evaluate` says the same."""
    row, text = rows_of(reference.folder)[6], reference.text
    found = reference.evaluate()
    targets = {name: part.plan.pairs for name, part in text.eval_rows.items()}
    mean = sum(found[f"{name}/loss"] * n for name, n in targets.items()) / sum(targets.values())
    assert found["loss"] == pytest.approx(mean, rel=1e-6) and found["tokens"] == sum(targets.values())
    assert found["web/loss"] != pytest.approx(found["books/loss"], rel=1e-3)
    assert {name: row[f"eval/{name}"] for name in found if name != "tokens"} == {
        name: x for name, x in found.items() if name != "tokens"
    }
    loaded, lines = load(str(reference.folder / "final_model")), list[str]()
    again = evaluate_model(loaded, text_to_evaluate(loaded.config, {}), 3, lines.append)
    assert again["web/loss"] == pytest.approx(found["web/loss"], rel=1e-5)
    assert (again["loss"], again["bytes"]) == (pytest.approx(found["loss"], rel=1e-5), text.eval_bytes)
    assert not [line for line in lines if line.startswith("warning")]
    trained = {"data.train_files": (loaded.config.data.sources[0].partition("=")[2].rpartition(":")[0],)}
    evaluate_model(loaded, text_to_evaluate(loaded.config, trained), 3, lines.append)
    assert "warning: the model was trained on this text" in lines
    with pytest.raises(UserError, match="name what is evaluated with --files"):
        text_to_evaluate(loaded.config, {"data.sources": ("a=b:1",)})


@pytest.fixture(scope="module")
def stopped(tmp_path_factory: pytest.TempPathFactory, corpus: Path) -> Path:
    """The run, stopped after update 4, the first of annealing."""
    folder = tmp_path_factory.mktemp("stopped")
    trainer_on(1, mixed(folder, corpus, **{"training.stop_at_step": 4})).train()
    return folder / "run"


@pytest.mark.parametrize("devices", [1, 2])
def test_resume_in_the_middle_of_annealing(
    tmp_path: Path, corpus: Path, stopped: Path, reference: Trainer, devices: int
) -> None:
    """Bit for bit; on two devices, with the same rows an update, to rounding."""
    shutil.copytree(stopped, tmp_path / "run")
    resumed = trainer_on(devices, mixed(tmp_path, corpus, **{"training.batch_size": 4 // devices}))
    resumed.train()
    names = ["train/loss", "eval/loss", "eval/books/loss", "data/web/tokens", "data/books/tokens", "data/books/epoch"]
    expected, found = ([rows_of(trainer.folder)[6][name] for name in names] for trainer in (reference, resumed))
    np.testing.assert_allclose(found, expected, rtol=0 if devices == 1 else 1e-5)
    if devices == 1:
        jax.tree.map(np.testing.assert_array_equal, resumed.state, reference.state)


def test_a_batch_that_changes_later_does_not_move_where_annealing_began(
    tmp_path: Path, corpus: Path, stopped: Path, reference: Trainer
) -> None:
    """16 rows in 4 updates, the last 4 annealed, then 2 updates of 8: the rows of 8 updates of 4."""
    shutil.copytree(stopped, tmp_path / "run")
    changed = {"training.batch_size": 8, "training.allow_change": ("training.batch_size",)}
    trainer = trainer_on(1, mixed(tmp_path, corpus, **changed))
    trainer.train()
    counts = reference.text.rows.counts(32, 12)
    epochs = [rows_of(trainer.folder)[6][f"data/{name}/epoch"] for name in ("web", "books")]
    parts = trainer.text.rows.parts.values()
    assert [round(x * len(part)) for x, part in zip(epochs, parts, strict=True)] == counts == [14, 18]
    assert trainer_on(1, mixed(tmp_path, corpus, **{"training.batch_size": 8})).resolved.anneal_row == 12


def test_other_weights_are_another_run(tmp_path: Path, corpus: Path, stopped: Path) -> None:
    shutil.copytree(stopped, tmp_path / "run")
    with pytest.raises(UserError, match=r'another configuration: data\.anneal_weights was \["web=1", "books=3"\], is'):
        trainer_on(1, mixed(tmp_path, corpus, **{"data.anneal_weights": ("web=1", "books=2")}))


def test_texts_and_conversations_are_mixed(tmp_path: Path, corpus: Path) -> None:
    """All of a text is learned, of conversations the answers; one tokenizer, with the template, is for both."""
    turns = [{"role": "user", "content": "a row"}, {"role": "assistant", "content": "the model"}]
    (tmp_path / "talks.jsonl").write_text((json.dumps({"messages": turns}) + "\n") * 30)
    sources = {"data.sources": (f"web={corpus / 'train.jsonl'}:1", f"talks={tmp_path / 'talks.jsonl'}:1")}
    config = mixed(tmp_path, corpus, **sources, **{"data.anneal_weights": (), "data.anneal_from": None})
    first = trainer_on(1, replace_fields(config, {"training.stop_at_step": 1}))
    first.train()
    rows = first.text.rows
    (batch,) = take(train_batches(rows, 42, Batches(4), 0), 1)
    order = rows.order(42)
    for place, (mask, segments) in enumerate(zip(batch["loss_mask"][0], batch["segments"][0], strict=True)):
        is_text = rows.find(order[place])[0] == "web"
        assert mask.sum() == (segments > 0).sum() if is_text else 0 < mask.sum() < (segments > 0).sum()
    assert trainer_on(1, config).current_step == 1, "its text is the same after a resume"


def test_sources_share_no_file_and_not_all_options(tmp_path: Path, corpus: Path) -> None:
    shared = (f"web={corpus / 'train.jsonl'}:1", f"books={corpus}/*.jsonl:1")
    with pytest.raises(
        UserError, match=r"data\.sources \(web, books\): both have .*train\.jsonl, or a copy of it; leave it out"
    ):
        Trainer(mixed(tmp_path, corpus, **{"data.sources": shared}))
    with pytest.raises(UserError, match=r"data\.chat_template \(plain\): no source holds conversations; leave it out"):
        Trainer(mixed(tmp_path, corpus, **{"data.chat_template": "plain"}))


def test_inspect_says_which_source_a_row_is_of(
    tmp_path: Path, corpus: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = mixed(tmp_path, corpus)
    (tmp_path / "config.json").write_text(json.dumps(to_dict(config)))
    command("inspect", ["--config", str(tmp_path / "config.json"), "--rows", "5", "--first", "10"])
    heads = [line.partition(":")[0] for line in capsys.readouterr().out.splitlines() if line.startswith("row")]
    sources = ["web", "books", "books", "books", "web"]  # annealing begins at row 12
    assert heads == [f"row {10 + i} of the run, of {source}" for i, source in enumerate(sources)]


def test_held_out_files_are_those_of_all_sources(tmp_path: Path, corpus: Path) -> None:
    book = corpus / "book.txt"
    sources = {"data.sources": (f"web={corpus / 'train.jsonl'}:1", f"books={corpus / 'validation.jsonl'}:1")}
    files = {"data.validation_files": (str(book),), "data.validation_fraction": 0.05}
    trainer = Trainer(mixed(tmp_path, corpus, **sources | files))
    assert [*trainer.text.eval_rows] == [""]
    with pytest.raises(
        UserError, match=r"^data.validation_files \(.*book.txt\): is in data.sources, too; leave it out"
    ):
        Trainer(mixed(tmp_path, corpus, **files))


# ---------------------------------------------------------------- options

TWO = {"data.sources": ("web=a:0.7", "books=b:0.3"), "training.max_steps": 9}


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"data.sources": ("web=a",)}, "data.sources (web=a) must be NAME=FILES:WEIGHT, such as web=web/*.jsonl:0.7"),
        ({"data.sources": ("web=a:-1",)}, "data.sources (web=a:-1) must be NAME=FILES:WEIGHT"),
        ({"data.sources": ("web=a:nan",)}, "data.sources (web=a:nan) must be NAME=FILES:WEIGHT"),
        ({"data.sources": ("a/b=a:1",)}, "data.sources (a/b=a:1) must be NAME=FILES:WEIGHT"),
        ({"data.sources": ("web=a||b:1",)}, "data.sources (web=a||b:1) must be NAME=FILES:WEIGHT"),
        ({"data.sources": ("web=a:1", "web=b:1")}, "data.sources (web=b:1): there are two sources of that name"),
        ({"data.sources": ("web=a:1", "b=b:0")}, "data.sources (b): its weight is 0, so no row is trained on"),
        ({"data.sources": ("web=a:1", "b=b:0.00001")}, "data.sources (web=a:1,b=b:0.00001): no 100,000 rows or fewer"),
        ({"training.max_steps": None}, "data.sources is set but training.max_steps is not"),
        ({"data.anneal_weights": ("web=1",)}, "data.anneal_weights (web=1) and data.anneal_from (none) have a use tog"),
        ({"data.anneal_from": 5}, "data.anneal_weights ([]) and data.anneal_from (5) have a use together only"),
        (
            {"data.anneal_weights": ("web=1",), "data.anneal_from": 10},
            "data.anneal_from (10) exceeds training.max_steps (9); lower it",
        ),
        (
            {"data.anneal_weights": ("wbe=1",), "data.anneal_from": 5},
            "data.anneal_weights (wbe) is not one of web, books (did you mean web?)",
        ),
        (
            {"data.anneal_weights": ("web=0",), "data.anneal_from": 5},
            "data.anneal_weights (web=0): all weights are 0; raise one",
        ),
        (
            {"data.anneal_weights": ("web:1",), "data.anneal_from": 5},
            "data.anneal_weights (web:1) must be NAME=WEIGHT, once for a source",
        ),
        ({"data.sources": (), "data.anneal_weights": ("a=1",), "data.anneal_from": 5}, "data.anneal_weights (a=1) has"),
        (
            {"data.train_files": ("c",)},
            "data.train_files (c) and data.sources (web=a:0.7,books=b:0.3) both name the text; leave one out",
        ),
        ({"data.dataset_name": "wikitext"}, "data.dataset_name (wikitext) and data.sources (web=a:0.7,books=b:0.3) bo"),
        ({"data.dataset_split": "test"}, "data.dataset_split (test) has no use beside data.sources (web=a:0.7,books=b"),
    ],
)
def test_what_is_wrong_is_named(values: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError) as caught:
        validate(replace_fields(Config(), TWO | values))
    assert str(caught.value).startswith(message)


def test_weights_are_parts_of_their_sum() -> None:
    def weights(*values: str, **annealed: str) -> list[list[int]]:
        sources = tuple(f"s{i}=a|~/b:c:{value}" for i, value in enumerate(values))
        after = tuple(f"{name}={value}" for name, value in annealed.items())
        options = mixture_options(DataConfig(sources=sources, anneal_weights=after))
        assert options.files["s0"] == ("a", "~/b:c")
        return options.weights

    assert weights("0.7", "0.3") == weights("7", "3") == weights("2.1", ".9") == [[7, 3]]
    assert weights("1", "0", s1="2", s0="0.5") == [[1, 0], [1, 4]]
    assert weights("1", "1", s1="3") == [[1, 1], [0, 1]]


def test_texts_replace_each_other() -> None:
    own = replace_fields(Config(), TWO | {"data.anneal_weights": ("web=1",), "data.anneal_from": 5})
    for text in ({"data.train_files": ("a",)}, {"data.dataset_name": "python-stdlib"}):
        other = validate(replace_fields(own, text)).data
        assert (other.sources, other.anneal_weights, other.anneal_from) == ((), (), None)
    files = replace_fields(Config(), {"data.train_files": ("a",)})
    assert validate(replace_fields(files, TWO)).data.train_files == ()
    in_a_file = from_dict({"training": {"max_steps": 1}, "data": {"train_files": ["a"], "sources": ["b=b:1"]}}, "x")
    with pytest.raises(UserError, match=r"^data.train_files \(a\) and data.sources \(b=b:1\) both name the text"):
        validate(in_a_file)


def test_files_that_are_not_there_are_named_before_anything_else(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"^data.sources \(nowhere.txt\) does not exist"):
        command("train", ["--config", "small", "--data.sources", "a=nowhere.txt:1", "--training.max_steps", "1"])

"""Each example runs, cut down to a tiny model, and leaves what its first lines promise.

.ci/run executes the notebook as it is, in a kernel of its own.
"""

import json
import re
import runpy
from pathlib import Path
from typing import Any

import pytest
from test_docs import TINY, Shrunk, data_of

from jaxlm import load
from jaxlm.config import from_dict
from jaxlm.errors import UserError
from jaxlm.trainer import Trainer

ROOT = Path(__file__).parents[1]
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))


def rows(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def left_by_custom_metric(folder: Path) -> None:
    assert all(row["custom/parameter_norm"] > 0 for row in rows(folder / "runs/custom_metric") if "train/loss" in row)


def left_by_own_data(folder: Path) -> None:
    assert json.loads((folder / "runs/own_data/starts.jsonl").read_text())["train"]["documents"] > 1000
    assert (folder / "runs/own_data/final_model").is_dir()


def left_by_own_block(folder: Path) -> None:
    with pytest.raises(UserError, match="holds a ParallelTransformer, not a Transformer; from Python, load"):
        load(folder / "runs/own_block/final_model")
    config = json.loads((folder / "runs/own_block/config.json").read_text())
    with pytest.raises(UserError, match='the model\'s class was "ParallelTransformer", is "Transformer"'):
        Trainer(from_dict(config, "config.json"))


def left_by_eval_tasks(folder: Path) -> None:
    assert [row["counting/acc"] for row in rows(folder / "runs/eval_tasks") if "eval/loss" in row]


def left_by_sums(folder: Path) -> None:
    first, *_ = talks = [json.loads(line)["messages"] for line in (folder / "sums.jsonl").read_text().splitlines()]
    assert len(talks) == 4000
    a, b, total = map(int, re.findall(r"\d+", first[0]["content"] + first[1]["content"]))
    assert a + b == total


def left_by_fine_tune(folder: Path) -> None:
    first, exported, second = (folder / "runs/fine_tune" / name for name in ("first", "exported", "second"))
    assert json.loads((exported / "config.json").read_text())["model_type"] == "gpt2"
    configs = [json.loads((run / "config.json").read_text()) for run in (first, second)]
    assert configs[1]["training"]["init_from"] == "runs/fine_tune/exported"
    assert configs[0]["model"] == configs[1]["model"]
    assert rows(second)[0]["train/loss"] < rows(first)[0]["train/loss"]


LEFT = {name.removeprefix("left_by_"): check for name, check in vars().copy().items() if name.startswith("left_by_")}


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda path: path.stem)
def test_example(example: Path, tmp_path: Path, corpus: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if example.stem == "eval_tasks":
        pytest.importorskip("lm_eval", reason="pip install lm-eval, as .ci/run does")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("jaxlm.trainer.Trainer", Shrunk)
    monkeypatch.setattr(Shrunk, "changes", TINY | data_of(corpus), raising=False)
    monkeypatch.setattr("sys.argv", [example.name])
    runpy.run_path(str(example), run_name="__main__")
    LEFT[example.stem](tmp_path)


def test_notebook(tmp_path: Path, corpus: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    notebook = json.loads((ROOT / "examples" / "quickstart.ipynb").read_text(encoding="utf-8"))
    code = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    assert all(not cell["outputs"] and cell["execution_count"] is None for cell in code), "clear its outputs"
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("jaxlm.trainer.Trainer", Shrunk)
    monkeypatch.setattr(Shrunk, "changes", TINY | data_of(corpus), raising=False)
    exec("\n".join("".join(cell["source"]) for cell in code), {})
    assert [row["step"] for row in rows(tmp_path / "runs/quickstart")] == [1, 2]

"""A program that was compiled elsewhere and is named by training.compiled_program; on CPU here, as no GPU is."""

import json
from pathlib import Path

import pytest
from conftest import make_config

from jaxlm import Trainer
from jaxlm.config import Config, replace_fields
from jaxlm.errors import UserError
from jaxlm.run.compiled import MADE_OF, PROGRAM, load_program, save_program, without_cache


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory, corpus: Path) -> Config:
    return make_config(tmp_path_factory.mktemp("compiled"), corpus)


@pytest.fixture(scope="module")
def saved(config: Config) -> Path:
    """The folder of the program of a run that has ended."""
    trainer = Trainer(config)
    trainer.train()
    folder = Path(config.training.checkpoint_dir).parent / "program"
    with without_cache():
        compiled = trainer.assembly.lower_step().compile(compiler_options=trainer.assembly.options)
    save_program(trainer.assembly, compiled, "CPU", folder)
    return folder


def losses(folder: str) -> list[float]:
    return [json.loads(line)["train/loss"] for line in (Path(folder) / "metrics.jsonl").read_text().splitlines()]


def test_a_run_with_it_is_the_run_without(
    config: Config, saved: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    again = {"training.checkpoint_dir": str(tmp_path / "run"), "training.compiled_program": str(saved)}
    Trainer(replace_fields(config, again)).train()
    said = capsys.readouterr().err
    assert f"the compiled step: from {saved}, made for CPU without it; its products are untuned" in said
    assert "compiling the step" not in said
    assert losses(str(tmp_path / "run")) == losses(config.training.checkpoint_dir)


def test_numbers_may_differ_and_nothing_else(config: Config, saved: Path, tmp_path: Path) -> None:
    def why(**fields: object) -> str:
        changed = {"training.checkpoint_dir": str(tmp_path / "run")}
        changed |= {name.replace("__", "."): value for name, value in fields.items()}
        program, words = load_program(Trainer(replace_fields(config, changed), fresh=True).assembly, saved)
        return words if program is None else ""

    assert why(training__learning_rate=1e-3, training__seed=5) == ""
    assert why(model__d_ff=96) == "the configuration is not as where it was made"
    about = json.loads((saved / MADE_OF).read_text())
    (saved / MADE_OF).write_text(json.dumps(about | {"jax": "0.1", "the mesh": {}}))
    assert why() == "jax and the mesh are not as where it was made"
    (saved / MADE_OF).write_text(json.dumps(about | {"made for": "A100-80GB"}))
    assert why() == "it was made for A100-80GB, and this is cpu"
    (saved / MADE_OF).write_text(json.dumps(about))
    whole = (saved / PROGRAM).read_bytes()
    (saved / PROGRAM).write_bytes(whole[: len(whole) // 2])
    assert why() == "program.bin is damaged, or of another call"
    (saved / PROGRAM).unlink()
    with pytest.raises(UserError, match=r"training.compiled_program \(.*\): holds no program of jaxlm plan --save"):
        why()

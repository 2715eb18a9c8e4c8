"""A run's folder that an older version wrote (tests/golden/run_1c6a717) opens, goes on, evaluates and starts others."""

import dataclasses
import json
import shutil
from pathlib import Path

import jax
import pytest

from jaxlm import Trainer, load
from jaxlm.config import Config, ModelConfig, load_config, replace_fields
from jaxlm.run.evaluate import evaluate_model

GOLDEN = Path(__file__).parent / "golden" / "run_1c6a717"
LOSSES = json.loads((GOLDEN / "losses.json").read_text())


@pytest.fixture
def old(tmp_path: Path, patch: pytest.MonkeyPatch) -> Path:
    """A copy, which is the working folder, as its paths are relative; on one device, as then."""
    shutil.copytree(GOLDEN, tmp_path / "old")
    patch.chdir(tmp_path / "old")
    patch.setattr("jaxlm.run.begin.start_backend", lambda config: jax.devices()[:1])
    return tmp_path / "old"


def configuration(corpus: Path) -> Config:
    return replace_fields(load_config("config.json"), {"data.cache_dir": str(corpus / "cache")})


def test_it_goes_on_to_the_same_losses(old: Path, corpus: Path) -> None:
    Trainer(configuration(corpus)).train()
    rows = [json.loads(line) for line in (old / "run" / "metrics.jsonl").read_text().splitlines()]
    losses = {str(row["step"]): row["train/loss"] for row in rows if row["step"] > 6}
    assert losses == pytest.approx(LOSSES["train"], rel=1e-6)


def test_its_best_model_evaluates_to_the_same_loss(old: Path, corpus: Path) -> None:
    loaded = load("run/best_model")
    result = evaluate_model(loaded, configuration(corpus).data, 2, lambda line: None)
    assert result["loss"] == pytest.approx(LOSSES["best_model"], rel=1e-6)


def test_its_export_starts_a_run_of_the_same_loss(old: Path, corpus: Path) -> None:
    config = dataclasses.replace(configuration(corpus), model=ModelConfig())  # the architecture comes from there
    trainer = Trainer(replace_fields(config, {"training.init_from": "exported", "training.checkpoint_dir": "new"}))
    assert trainer.evaluate()["loss"] == pytest.approx(LOSSES["best_model"], rel=1e-6)

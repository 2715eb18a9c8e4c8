"""Files of a saved folder that are cut short, changed or gone: always noticed, and the checkpoint before is used."""

import os
import shutil
from pathlib import Path

import pytest
from conftest import make_config

from jaxlm import Trainer, load
from jaxlm.checkpoints.folder import checkpoint_steps, newest_intact
from jaxlm.checkpoints.manifest import damage
from jaxlm.errors import UserError

STEPS = {"training.max_steps": 6, "training.save_steps": 2, "training.eval_steps": 3}


@pytest.fixture(scope="module")
def finished(tmp_path_factory, corpus):
    """The folder of a finished run: checkpoints 4 and 6 would do, 2 is there too."""
    folder = tmp_path_factory.mktemp("damage")
    Trainer(make_config(folder, corpus, **STEPS)).train()
    return folder / "run"


def flip(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


DAMAGE = {
    "one bit flipped": flip,
    "cut short": lambda path: os.truncate(path, path.stat().st_size - 1),
    "gone": os.unlink,
}


@pytest.mark.parametrize("how", DAMAGE)
def test_every_file_of_a_checkpoint_counts(finished, tmp_path, how):
    """One file after the other: noticed each time, and the checkpoint before it is the one to use."""
    run = shutil.copytree(finished, tmp_path / "run")
    before, newest = list(checkpoint_steps(run).values())[-2:]
    files = [path for path in newest.rglob("*") if path.is_file() and path.stat().st_size]
    assert len(files) > 15
    for path in files:
        whole = path.read_bytes()
        DAMAGE[how](path)
        said = []
        assert newest_intact(run, said.append) == before, path
        if newest in checkpoint_steps(run).values():
            name = str(path.relative_to(newest))
            assert len(said) == 1 and f"{newest} is damaged: {name} is " in said[0], said
        else:
            assert how == "gone" and path.name == "manifest.json", path  # to be without one is not to be complete
        path.write_bytes(whole)
    assert newest_intact(run, print) == newest


@pytest.mark.parametrize("item", ["params", "config", "tokenizer", "progress"])
def test_a_damaged_model_is_not_loaded(finished, tmp_path, item):
    model = shutil.copytree(finished / "best_model", tmp_path / "best_model")
    assert load(model) is not None
    flip(max((path for path in (model / item).rglob("*") if path.is_file()), key=lambda path: path.stat().st_size))
    with pytest.raises(UserError, match=rf"best_model is damaged: {item}/\S+ is not as it was saved; name another"):
        load(model)


def test_the_run_goes_on_from_the_checkpoint_before(finished, tmp_path, corpus, capsys):
    """The newest checkpoint is damaged, the final model too: both come back as they were, bit for bit."""
    run = shutil.copytree(finished, tmp_path / "run")
    for folder in (run / "checkpoint_6", run / "final_model"):
        flip(next((folder / "params").rglob("manifest.ocdbt")))
    config = make_config(tmp_path, corpus, **STEPS)
    trainer = Trainer(config)
    assert trainer.current_step == 4 and not trainer.finished
    assert "checkpoint_6 is damaged: params/" in capsys.readouterr().err
    trainer.train()
    assert len(list(run.glob("aside_*/checkpoint_6"))) == 1, "the damaged one is kept"
    assert Trainer(config).finished
    for name in ("checkpoint_6", "final_model", "best_model"):
        assert damage(run / name) is None
        assert same_arrays(run / name, finished / name), name


def same_arrays(mine: Path, theirs: Path) -> bool:
    import jax
    import numpy as np
    import orbax.checkpoint as ocp

    with ocp.StandardCheckpointer() as checkpointer:
        a, b = (jax.tree.leaves(checkpointer.restore((path / "params").resolve())) for path in (mine, theirs))
    return len(a) == len(b) and all(np.array_equal(x, y) for x, y in zip(a, b, strict=True))

"""Numbers that are not: in gradients, parameters, the loss scale; and losses that jump."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import pytest
from conftest import make_config, trainer_on

import jaxlm.train.step
from jaxlm import Trainer
from jaxlm.config import TrainingConfig
from jaxlm.errors import RunFailed
from jaxlm.monitor.anomalies import LossSpikes

SMALL = {"model.n_layers": 1, "model.d_model": 16}


def poison_gradients(monkeypatch, steps):
    """Makes one gradient of each of these updates (from 1) not a number."""
    make = jaxlm.train.step.make_gradients

    def poisoned(*arguments):
        gradients_of = make(*arguments)

        def with_nan(params, batch, key, factor):
            loss, gradients = gradients_of(params, batch, key, factor)
            keys = jax.vmap(jax.random.fold_in, (None, 0))(jax.random.key(TrainingConfig().seed), jnp.array(steps) - 1)
            bad = (key == keys).any()
            final = gradients["final_norm"]["scale"]
            gradients["final_norm"]["scale"] = jnp.where(bad, final.at[0].set(jnp.nan), final)
            return loss, gradients

        return with_nan

    monkeypatch.setattr(jaxlm.train.step, "make_gradients", poisoned)


def test_skipped_updates_are_named_and_too_many_end_the_run(tmp_path, corpus, monkeypatch, capsys):
    """Named with their documents; only those that follow each other count."""
    poison_gradients(monkeypatch, [3, 4, *range(8, 100)])
    options = {"training.max_steps": 6, "training.logging_steps": 5, "training.eval_steps": 6}
    trainer = trainer_on(1, make_config(tmp_path / "few", corpus, **SMALL, **options))
    trainer.train()
    said = capsys.readouterr().err
    for step in (3, 4):
        assert f"step {step}: skipped, its loss or gradient is not finite; it was to learn from documents " in said
    assert said.count(": skipped") == 2
    assert int(trainer.state.skipped) == 2
    assert all(bool(jnp.isfinite(x).all()) for x in jax.tree.leaves(trainer.state.params))
    options = {"training.max_steps": 100, "training.save_steps": 5, "training.max_skipped_steps": 4}
    with pytest.raises(
        RunFailed, match=r"step 12: 5 updates in a row .*max_skipped_steps 4.*last checkpoint is .*checkpoint_10\."
    ):
        trainer_on(1, make_config(tmp_path / "many", corpus, **SMALL, **options)).train()


def test_the_named_documents_are_those_of_the_batch(tmp_path, corpus):
    from jaxlm.data.loader import documents_of_step, train_batches

    trainer = Trainer(make_config(tmp_path, corpus))
    batches = train_batches(trainer.text.rows, 42, trainer.resolved.batches, 0)
    offsets = trainer.text.rows.document_offsets
    for step in range(12):  # over the end of an epoch
        batch = next(batches)
        documents = documents_of_step(trainer.text.rows, 42, trainer.resolved.batches, step)
        told = {int(token) for d in documents for token in trainer.text.rows.tokens[offsets[d] : offsets[d + 1]]}
        assert set(batch["tokens"][batch["segments"] > 0].tolist()) <= told
        assert len(documents) <= int(batch["segments"].max(-1).sum())
    batches.close()


def test_a_loss_scale_that_is_no_number_ends_the_run(tmp_path, corpus):
    float16 = {"training.use_amp": True, "training.amp_dtype": "float16"}
    trainer = trainer_on(1, make_config(tmp_path, corpus, **SMALL, **float16))
    scale = dataclasses.replace(trainer.state.loss_scale, scale=jnp.float32(math.nan), tolerance=jnp.int32(1))
    trainer.state = dataclasses.replace(trainer.state, loss_scale=scale)
    with pytest.raises(RunFailed, match="overflows at the lowest loss scale"):
        trainer.train()


def test_an_overflow_at_a_fixed_loss_scale_is_skipped(tmp_path, corpus, capsys):
    """It does not end the run; too many of them do, with the way out."""
    float16 = {"training.use_amp": True, "training.amp_dtype": "float16", "training.loss_scale": 1e30}
    config = make_config(tmp_path, corpus, **SMALL, **float16, **{"training.max_skipped_steps": 2})
    with pytest.raises(
        RunFailed, match=r"3 updates in a row .* nothing was saved yet.*lower training\.loss_scale, or 0"
    ):
        trainer_on(1, config).train()
    assert capsys.readouterr().err.count(": skipped") == 3


def test_spikes_are_flagged_and_noise_is_not():
    spikes = LossSpikes()
    quiet = [4 + 0.1 * math.sin(i) - 0.01 * i for i in range(60)]
    assert not any(spikes.look(loss) for loss in quiet)
    assert spikes.look(math.nan) is None
    assert "loss spike: 6.0000" in spikes.look(6.0)
    assert spikes.look(3.4) is None

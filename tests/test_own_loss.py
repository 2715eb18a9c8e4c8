"""A loss of the user's own: summed as the cross entropy is, whatever the grouping, the layout and the packing."""

import dataclasses
import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import make_config, slow, trainer_on
from test_step import HALF, STILL, T, assert_close, config_of, make_batch, masked, regroup

from jaxlm import Trainer
from jaxlm.__main__ import run as command
from jaxlm.errors import UserError
from jaxlm.parallel.mesh import make_mesh
from jaxlm.report.runs import read_run
from jaxlm.train.assemble import Resolved, assemble
from jaxlm.train.loss import learned
from jaxlm.train.numbers import at_rate, run_numbers


def plain(model, batch, keys):
    """The cross entropy, in the plainest way."""
    log_probs = jax.nn.log_softmax(model.logits(model.hidden_states(batch, keys)))
    return -jnp.take_along_axis(log_probs, batch["targets"][..., None], -1)[..., 0], {}


def smoothed(model, batch, keys):
    """Label smoothing, with the mean probability of the targets; not a number where nothing is learned."""
    logits = model.logits(model.hidden_states(batch, keys))
    log_probs = jax.nn.log_softmax(logits)
    of_target = jnp.take_along_axis(log_probs, batch["targets"][..., None], -1)[..., 0]
    probable = jnp.where(learned(batch), jnp.exp(of_target), 0.0).sum(), learned(batch).sum()
    return jnp.where(learned(batch), -0.9 * of_target - 0.1 * log_probs.mean(-1), jnp.nan), {"probability": probable}


def planted_mean(model, batch, keys):
    losses, extras = plain(model, batch, keys)
    return losses * T / learned(batch).sum().astype(jnp.float32), extras


SGD = {"optimizer": "sgd"}
NUMBERS = run_numbers(config_of(**SGD).training)


def assembled(own, config=None, devices=1, stage=0):
    config = config or config_of(HALF, **SGD)
    training = dataclasses.replace(config.training, zero_stage=stage)
    resolved = Resolved(
        dataclasses.replace(config, training=training), make_mesh(jax.devices()[:devices], (1, devices, 1))
    )
    return assemble(resolved, own_loss=own)


def update(assembly, batch):
    """(whole parameters after it, metrics) of an update."""
    state, metrics = assembly.jit_step()(assembly.init(NUMBERS), batch, at_rate(NUMBERS, 0.1))
    return jax.device_get(assembly.to_whole(state.params)), {name: float(x) for name, x in metrics.items()}


BATCH = masked(make_batch())


@pytest.fixture(scope="module")
def whole():
    return update(assembled(smoothed), BATCH)


def test_the_plain_cross_entropy_gives_the_losses_of_the_built_in_one():
    own, theirs = (assembled(loss, config_of(STILL, **SGD)) for loss in (plain, None))
    (mine, metrics), (params, expected) = update(own, BATCH), update(theirs, BATCH)
    assert metrics == pytest.approx(expected, rel=1e-5)
    assert_close(mine, params, 1e-5)
    batch, params = {name: x[0] for name, x in BATCH.items()}, theirs.init(NUMBERS).params
    loss, count, extras = own.eval_step(params, batch)
    nats, targets = theirs.eval_step(params, batch)
    assert (float(loss), int(count), extras) == (pytest.approx(float(nats), rel=1e-5), int(targets), {})


@pytest.mark.parametrize(
    ("devices", "stage", "k"),
    [slow(1, 0, 4), slow(4, 0, 1), slow(4, 1, 4), (4, 2, 4), slow(4, 3, 1), (4, 3, 4)],
)
def test_micro_batches_and_layouts_change_nothing(devices, stage, k, whole):
    """With dropout, and micro-batches and devices of which some have no target; the other metrics, too."""
    params, metrics = update(assembled(smoothed, devices=devices, stage=stage), regroup(BATCH, k))
    assert metrics == pytest.approx(whole[1], rel=1e-4) and 0 < metrics["train/probability"] < 1
    assert_close(params, whole[0], 1e-5)


@pytest.mark.slow
def test_a_planted_mean_is_noticed():
    """A loss that divides by the count of its own micro-batch is no sum; the test above would fail."""
    one, four = (update(assembled(planted_mean), regroup(make_batch(), k))[1]["loss"] for k in (1, 4))
    assert abs(one - four) > 0.1 * four


def test_packed_documents_have_the_losses_of_documents_apart():
    own = assembled(smoothed, config_of(STILL, **SGD))
    params = own.init(NUMBERS).params
    rng = np.random.default_rng(0)
    first, second = (rng.integers(3, 61, n).astype(np.int32) for n in (9, 14))

    def rows(*documents):
        found = {
            name: np.zeros((len(documents), T), np.int32) for name in ("tokens", "targets", "segments", "positions")
        }
        for row, together in enumerate(documents):
            at = 0
            for segment, ids in enumerate(together, 1):
                place = slice(at, at := at + len(ids) - 1)
                found["tokens"][row, place], found["targets"][row, place] = ids[:-1], ids[1:]
                found["segments"][row, place], found["positions"][row, place] = segment, np.arange(len(ids) - 1)
        return found

    packed, apart = (own.eval_step(params, rows(*each)) for each in ([(first, second)], [(first,), (second,)]))
    assert float(packed[0]) == pytest.approx(float(apart[0]), rel=1e-5)
    assert int(packed[1]) == int(apart[1]) == 21
    assert_close(packed[2], apart[2], 1e-5)


@pytest.mark.slow
def test_a_run_goes_on_exactly_and_with_no_other_loss(tmp_path, corpus, capfd):
    options = {"training.layer_norm_steps": 2, "training.eval_steps": 2, "training.save_steps": 2}
    options |= {"model.n_layers": 1, "model.d_model": 16, "model.dropout": 0.1}
    run = lambda name, **more: trainer_on(  # noqa: E731
        1, make_config(tmp_path / name, corpus, **options | more), compute_loss=smoothed
    )
    run("a").train()
    assert "kernels: blockwise attention, own loss (smoothed)" in (said := capfd.readouterr().err)
    assert "step 4: validation loss 5." in said and ", validation probability 0." in said
    run("b", **{"training.stop_at_step": 2}).train()
    with pytest.raises(UserError, match=r'compute_loss was "smoothed", is null\. Set it back'):
        command("resume", [str(tmp_path / "b" / "run")])
    with pytest.raises(UserError, match=r'compute_loss was "smoothed", is "plain"\. Set it back'):
        Trainer(make_config(tmp_path / "b", corpus, **options), compute_loss=plain)
    again = run("b")
    again.train()
    a, b = ([json.loads(line) for line in (tmp_path / x / "run/metrics.jsonl").read_text().splitlines()] for x in "ab")
    timed = {"train/tokens_per_second", "train/mfu", "train/host_memory_gib"}
    kept = lambda rows: [{name: x for name, x in row.items() if name not in timed} for row in rows]  # noqa: E731
    assert kept(a) == kept(b)
    assert {"train/probability", "eval/probability", "eval/loss"} <= a[-1].keys()
    assert not {"eval/perplexity", "eval/bits_per_byte"} & a[-1].keys()
    norms = [x for name, x in a[1].items() if name.startswith("gradients/")]
    assert math.hypot(*norms) == pytest.approx(a[1]["train/grad_norm"], rel=1e-5)
    assert read_run(tmp_path / "a" / "run").key_figures["Own loss"] == "smoothed"
    evaluated = again.evaluate()
    assert [evaluated[name] for name in ("loss", "probability")] == [a[-1]["eval/loss"], a[-1]["eval/probability"]]


def scalar(model, batch, keys):
    losses, extras = plain(model, batch, keys)
    return losses.mean(), extras


RETURNED = [
    (
        scalar,
        r"compute_loss \(scalar\) returns a scalar, and a mean of a micro-batch is no part of a sum",
    ),
    (lambda *x: plain(*x)[0].sum(), r"compute_loss \(<lambda>\) returns a scalar"),
    (lambda *x: plain(*x)[0], r"returns something else; return \(losses, metrics\)"),
    (lambda *x: (plain(*x)[0][:, 1:], {}), r"returns losses float32 \[8, 23\], not float32 \[8, 24\]"),
    (lambda *x: (plain(*x)[0].astype("bfloat16"), {}), r"returns losses bfloat16 \[8, 24\], not float32"),
    (lambda *x: (plain(*x)[0], {"perplexity": (1.0, 1.0)}), "the metric perplexity is jaxlm's own"),
    (lambda *x: (plain(*x)[0], {"accuracy": 1.0}), "the metric accuracy is not two scalars"),
    (lambda *x: (plain(*x)[0], {"accuracy": (x[1]["tokens"], 1)}), "the metric accuracy is not two scalars"),
]


@pytest.mark.parametrize(("own", "message"), RETURNED)
def test_what_is_no_loss_of_tokens_is_one_line(own, message):
    with pytest.raises(UserError, match=message):
        assembled(own)


def test_an_option_of_the_cross_entropy_has_no_use_beside_another_loss():
    for name, value in (("z_loss", 1e-4), ("loss_chunk_mib", 8)):
        with pytest.raises(UserError, match=rf"training\.{name} \(.*\) is of the cross entropy, not of compute_loss"):
            assembled(plain, config_of(STILL, **{name: value}))


def test_a_loss_that_has_changed_is_compiled_anew():
    """No program of it is kept for the next run: what it closes over may be another value by then."""
    assert assembled(plain) is not assembled(plain)

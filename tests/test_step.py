"""The update: accumulation, dropout, skipping, clipping, compute types."""

import dataclasses
import functools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from conftest import slow
from flax import nnx

from jaxlm.config import Config, DataConfig, ModelConfig, TrainingConfig
from jaxlm.model.transformer import Block
from jaxlm.ops.scheduling import CPU_PART_TOKENS, scan_micro_batches, sum_over_rows
from jaxlm.parallel.mesh import make_mesh
from jaxlm.train.assemble import Resolved, assemble
from jaxlm.train.numbers import run_numbers
from jaxlm.train.schedules import build_schedule

VOCAB, T, ROWS = 61, 24, 16
MODEL = ModelConfig(vocab_size=VOCAB, d_model=32, n_heads=2, n_layers=2, d_ff=64, max_seq_len=T, scan_layers=True)
STILL = dataclasses.replace(MODEL, dropout=0.0, attention_dropout=0.0)
HALF = dataclasses.replace(MODEL, dropout=0.5, attention_dropout=0.5)
TRAINING = TrainingConfig(use_amp=False, learning_rate=1e-2, warmup_steps=0, eps=1e-4)


def config_of(model=MODEL, **training):
    return Config(model=model, training=dataclasses.replace(TRAINING, **training), data=DataConfig(max_length=T))


def make_batch(rows=ROWS, seed=0):
    """[1, rows, T]; rows hold one to three documents and uneven padding, so that micro-batches differ in weight."""
    rng = np.random.default_rng(seed)
    segments = np.sort(rng.integers(1, 4, (rows, T)), axis=1)
    for row, n in enumerate(rng.integers(2, T + 1, rows)):
        segments[row, n:] = 0
    tokens, targets = rng.integers(3, VOCAB, (2, rows, T))
    positions = np.tile(np.arange(T), (rows, 1))
    arrays = {"tokens": tokens, "targets": targets, "segments": segments, "positions": positions}
    batch = {name: array.astype(np.int32)[None] for name, array in arrays.items()}
    return batch | {"rows": np.arange(rows, dtype=np.int32)[None]}


def regroup(batch, k):
    return {name: x.reshape(k, -1, *x.shape[2:]) for name, x in batch.items()}


@functools.cache
def start(config, mesh_shape=(1, 1, 1), stage=0, offload=False):
    """The step, compiled when it is first called, and the first state, on the first devices of a mesh."""
    assembly = assembled(config, mesh_shape, stage, offload)
    return step_with(config, step_of(assembly)), assembly.init(run_numbers(config.training))


def trace_anew(monkeypatch):
    """From here on, no step is one that was traced before."""
    for cached in (start, step_of):
        monkeypatch.setitem(globals(), cached.__name__, cached.__wrapped__)


def step_with(config, jitted):
    """The update that `jitted` makes, with the learning rate of its time."""
    schedule, numbers = build_schedule(config.training, 100), run_numbers(config.training)
    return lambda state, batch: jitted(state, batch, numbers | {"learning_rate": np.float32(schedule(int(state.step)))})


@functools.cache
def step_of(assembly):
    return assembly.jit_step(donate=False)


def assembled(config, mesh_shape=(1, 1, 1), stage=0, offload=False):
    training = dataclasses.replace(config.training, zero_stage=stage, offload_optimizer=offload)
    mesh = make_mesh(jax.devices()[: math.prod(mesh_shape)], mesh_shape)
    return assemble(Resolved(dataclasses.replace(config, training=training), mesh))


def run(config, batches, *layout):
    step, state = start(config, *layout)
    losses = []
    for batch in batches:
        state, metrics = step(state, batch)
        losses.append(float(metrics["loss"]))
    return state, losses, metrics


def assert_close(a, b, tolerance):
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_allclose(x, y, rtol=tolerance, atol=tolerance)


def assert_equal(a, b):
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_array_equal(x, y)


@pytest.mark.parametrize(("optimizer", "k"), [("adamw", 8), slow("sgd", 2)])
def test_accumulation_equals_one_large_batch(optimizer, k):
    """K micro-batches, of unequal numbers of targets and with dropout, equal one batch K times as large."""
    config = config_of(optimizer=optimizer)
    batches = [make_batch(seed=s) for s in range(3)]
    whole, whole_losses, whole_metrics = run(config, batches)
    parts, losses, metrics = run(config, [regroup(b, k) for b in batches])
    np.testing.assert_allclose(losses, whole_losses, rtol=1e-5)
    assert float(metrics["grad_norm"]) == pytest.approx(float(whole_metrics["grad_norm"]), rel=1e-3)
    assert_close(parts.params, whole.params, 1e-5)
    assert jax.tree.structure(parts) == jax.tree.structure(whole)  # a checkpoint of one continues with the other


def masked(batch, seed=0):
    """Some of the targets of each row are learned; of the first three rows of every four, none."""
    mask = np.random.default_rng(seed).random(batch["targets"].shape) < 0.5
    mask[:, np.arange(mask.shape[1]) % 4 < 3] = False
    return batch | {"loss_mask": mask}


def test_what_is_not_learned_weighs_as_padding():
    """In one batch, and in micro-batches of which three of four have no target; where rows are learned whole or not."""
    config = config_of(STILL)
    batches = [masked(make_batch(seed=s), s) for s in range(3)]
    whole, whole_losses, _ = run(config, batches)
    parts, losses, _ = run(config, [regroup({n: x[:, order(x)] for n, x in b.items()}, 4) for b in batches])
    np.testing.assert_allclose(losses, whole_losses, rtol=1e-5)
    assert_close(parts.params, whole.params, 1e-5)
    batch = make_batch()
    half = np.zeros_like(batch["targets"], bool)
    half[:, ::2] = True
    padded = batch | {"segments": np.where(half, batch["segments"], 0)}
    assert_close(run(config, [batch | {"loss_mask": half}])[0].params, run(config, [padded])[0].params, 1e-6)


def order(x):
    """Rows so that those of each kind of `masked` come together: the last micro-batch of four has all the targets."""
    return np.argsort(np.arange(x.shape[1]) % 4, kind="stable")


def test_each_target_counts_for_itself():
    """Losses of single targets add up to that of all; the sum over the vocabulary is as in the plainest formula."""
    assembly = assembled(config_of(STILL))
    params = assembly.init(run_numbers(TRAINING)).params
    batch = {name: x[0] for name, x in make_batch().items()}
    evaluate = lambda mask: assembly.eval_step(params, batch | {"loss_mask": mask})  # noqa: E731
    mask = np.zeros(batch["targets"].shape, bool)
    mask[2, 5] = True
    nats, count = evaluate(mask)
    rest, others = evaluate(~mask)
    everything, targets = assembly.eval_step(params, batch)
    present = bool(batch["segments"][2, 5])
    assert (int(count), int(others)) == (present, int(targets) - present)
    assert float(nats) + float(rest) == pytest.approx(float(everything), rel=1e-5)
    network = nnx.merge(assembly.graphdef, assembly.to_whole(params))
    hidden = network(batch["tokens"], batch["segments"], batch["positions"])
    logits = hidden[2, 5].astype(jnp.float32) @ network.output_matrix().T.astype(jnp.float32)
    expected = jax.nn.logsumexp(logits) - logits[batch["targets"][2, 5]]
    assert float(nats) == pytest.approx(float(expected) * present, rel=1e-4)


def test_an_update_without_a_target_changes_nothing():
    config = config_of(STILL, weight_decay=0.1)
    step, state = start(config)
    state, _ = step(state, masked(make_batch()))  # so that there is momentum
    after, metrics = step(state, make_batch() | {"loss_mask": np.zeros((1, ROWS, T), bool)})
    assert np.isnan(float(metrics["loss"]))
    assert (int(after.skipped), int(after.step)) == (1, 2)
    assert_equal((after.params, after.opt_state), (state.params, state.opt_state))


def test_unweighted_accumulation_would_be_noticed():
    """The fault that the test above is for: weighing micro-batches equally, whatever targets they hold."""
    batch = make_batch(seed=1)
    _, (whole, *_), _ = run(config_of(STILL), [batch])
    parts = regroup(batch, 8)
    per_part = [run(config_of(STILL), [{n: x[i : i + 1] for n, x in parts.items()}])[1][0] for i in range(8)]
    assert abs(np.mean(per_part) - whole) > 1e-3


def test_multisteps_is_what_sums_micro_batches(monkeypatch):
    """A wrong sum in optax.MultiSteps is noticed with several micro-batches; a single one does without it."""
    config, batch = config_of(STILL, optimizer="sgd", max_grad_norm=None), make_batch()
    whole, _, _ = run(config, [batch])
    right = optax.MultiSteps.update

    def wrong(self, *arguments, **options):
        updates, state = right(self, *arguments, **options)
        return jax.tree.map(lambda u: 1.01 * u, updates), state

    monkeypatch.setattr(optax.MultiSteps, "update", wrong)
    trace_anew(monkeypatch)
    assert_close(run(config, [batch])[0].params, whole.params, 1e-6)
    with pytest.raises(AssertionError):
        assert_close(run(config, [regroup(batch, 4)])[0].params, whole.params, 1e-5)


def test_an_overflow_in_one_micro_batch_skips_that_update_alone():
    """float16, micro-batch 2 of 4: nothing but the counters changes, and nothing of it stays in the accumulator."""
    untied = dataclasses.replace(STILL, tie_embeddings=False)
    config = config_of(untied, use_amp=True, amp_dtype="float16", loss_scale=2.0**8)
    step, state = start(config)
    batch = regroup(make_batch(), 4)
    poison = VOCAB - 1  # a token of that micro-batch alone, whose embedding exceeds float16
    batch["tokens"] = np.where(batch["tokens"] == poison, 3, batch["tokens"])
    large = dataclasses.replace(state, params=jax.tree.map(jnp.array, state.params))
    large.params["token_embedding"] = large.params["token_embedding"].at[poison].set(1e5)
    overflowing = {name: x.copy() for name, x in batch.items()}
    overflowing["tokens"][1] = poison
    after, metrics = step(large, overflowing)
    assert (int(after.skipped), int(after.step)) == (1, 1) and not np.isfinite(float(metrics["grad_norm"]))
    for new, old in zip(
        jax.tree.leaves((after.params, after.opt_state)), jax.tree.leaves((large.params, large.opt_state)), strict=True
    ):
        np.testing.assert_array_equal(new, old)
    batch["targets"] = np.where(batch["targets"] == poison, 3, batch["targets"])
    following, metrics = step(after, batch)
    fresh, _ = step(dataclasses.replace(large, step=after.step, skipped=after.skipped), batch)
    assert int(following.skipped) == 1 and np.isfinite(float(metrics["loss"]))
    assert_equal(following, fresh)


def test_dropout_belongs_to_the_row():
    """Rows keep their masks however they are grouped; another step, seed or row index gets other ones."""
    batch = make_batch()
    order = np.random.default_rng(9).permutation(ROWS)
    shuffled = {name: x[:, order] for name, x in batch.items()}
    loss = lambda batch, model=HALF: run(config_of(model, optimizer="sgd"), [batch])[1][0]  # noqa: E731
    assert loss(shuffled) == pytest.approx(loss(batch), rel=1e-6)
    assert loss(regroup(shuffled, 4)) == pytest.approx(loss(batch), rel=1e-6)
    assert abs(loss(shuffled | {"rows": batch["rows"]}) - loss(batch)) > 1e-4
    step, state = start(config_of(HALF, optimizer="sgd"))
    later = dataclasses.replace(state, step=state.step + 1)
    assert abs(float(step(later, batch)[1]["loss"]) - loss(batch)) > 1e-4
    for without in ("dropout", "attention_dropout"):  # both kinds are honoured
        assert abs(loss(batch, dataclasses.replace(HALF, **{without: 0.0})) - loss(batch)) > 1e-4


def test_parts_beside_each_other_equal_all_rows_at_once(monkeypatch):
    """What a CPU does with large batches, here with a small one: the same loss and update, dropout and all."""
    config, batches = config_of(HALF, optimizer="sgd"), [make_batch(seed=s) for s in range(3)]
    whole, whole_losses, _ = run(config, batches)
    monkeypatch.setattr("jaxlm.ops.scheduling.CPU_PART_TOKENS", ROWS * T // 4)
    trace_anew(monkeypatch)
    parts, losses, _ = run(config, batches)
    np.testing.assert_allclose(losses, whole_losses, rtol=1e-5)
    assert_close(parts.params, whole.params, 1e-5)
    assert not all(np.array_equal(*pair) for pair in zip(*map(jax.tree.leaves, (parts, whole)), strict=True))


@pytest.mark.parametrize(
    ("platform", "rows", "tokens", "devices", "parts"),
    [
        ("cpu", 16, 1, 1, 4),
        ("cpu", 6, 1, 1, 3),
        ("cpu", 7, 1, 1, 1),
        ("cpu", 16, 1, 2, 1),
        ("cpu", 16, 0.25, 1, 4),
        ("cpu", 16, 0.125, 1, 2),
        ("cpu", 16, 0.1, 1, 1),
        ("gpu", 16, 1, 1, 1),
    ],
)
def test_parts_are_equal_and_large(platform, rows, tokens, devices, parts):
    batch = {"tokens": jnp.arange(rows * int(tokens * CPU_PART_TOKENS)).reshape(rows, -1)}
    seen = []

    def sums(_, part):
        jax.debug.callback(seen.append, part["tokens"], ordered=True)
        return jnp.zeros(()), jnp.ones(())

    _, count = sum_over_rows(sums, {}, batch, platform, devices)
    jax.effects_barrier()
    assert len(seen) == count == parts
    np.testing.assert_array_equal(np.concatenate(seen), batch["tokens"])


def test_a_block_is_traced_once(monkeypatch):
    """For all layers, parts and micro-batches: otherwise an update of configs/small.py begins 10 seconds later."""
    monkeypatch.setattr("jaxlm.ops.scheduling.CPU_PART_TOKENS", ROWS * T // 8)
    calls, whole = [], Block.__call__
    monkeypatch.setattr(Block, "__call__", lambda self, *a: calls.append(1) or whole(self, *a))
    assembly = assembled(config_of(dataclasses.replace(MODEL, scan_layers=False)))
    assembly.jit_step().trace(assembly.abstract_state, regroup(make_batch(), 2), assembly.abstract_numbers)
    assert len(calls) == 1


@pytest.mark.parametrize("k", [1, 8])
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_non_finite_update_changes_nothing(k, bad):
    config = config_of()
    step, state = start(config)
    state, _ = step(state, regroup(make_batch(), k))
    poisoned = jax.tree.map(jnp.array, state)
    poisoned.params["blocks"]["mlp"]["up"]["kernel"] = (
        poisoned.params["blocks"]["mlp"]["up"]["kernel"].at[0, 0, 0].set(bad)
    )
    after, metrics = step(poisoned, regroup(make_batch(seed=1), k))
    for new, old in zip(
        jax.tree.leaves((after.params, after.opt_state)),
        jax.tree.leaves((poisoned.params, poisoned.opt_state)),
        strict=True,
    ):
        np.testing.assert_array_equal(new, old)
    assert int(after.skipped) == 1 == int(metrics["skipped"]) and int(after.step) == 2
    healthy = dataclasses.replace(after, params=state.params)
    recovered, metrics = step(healthy, regroup(make_batch(seed=2), k))
    assert int(recovered.skipped) == 1 and np.isfinite(float(metrics["loss"]))
    assert not np.array_equal(recovered.params["token_embedding"], state.params["token_embedding"])


@pytest.mark.parametrize(
    ("optimizer", "rate"),
    [
        ("adamw", 1e-2),
        ("muon", 1e-2),
        slow("adam", 1e-2),
        slow("sgd", 1.0),
        slow("lion", 2e-3),
        slow("lamb", 3e-2),
        slow("adafactor", 0.3),
        slow("optax.adabelief", 1e-2),
    ],
)
def test_the_loss_falls(optimizer, rate):
    batch = make_batch()
    _, losses, _ = run(config_of(STILL, optimizer=optimizer, learning_rate=rate), [batch] * 40)
    assert losses[0] == pytest.approx(np.log(VOCAB), rel=0.05) and losses[-1] < 0.7 * losses[0]


def test_z_loss_moves_the_model_and_not_the_reported_loss():
    """The first loss is the cross entropy, whatever the weight; the gradient is that of the sum."""
    batch = make_batch()
    (_, plain, metrics), (_, with_z, z_metrics) = (run(config_of(STILL, z_loss=z), [batch] * 2) for z in (0.0, 1.0))
    assert with_z[0] == pytest.approx(plain[0], rel=1e-6)
    assert abs(with_z[1] - plain[1]) > 1e-4
    assert float(z_metrics["grad_norm"]) > 1.1 * float(metrics["grad_norm"])


def test_clipping_is_global():
    config = config_of(STILL, optimizer="sgd", beta1=0.0, weight_decay=0.0, max_grad_norm=0.01)
    before = start(config)[1]
    after, _, metrics = run(config, [make_batch()])
    moved = optax.tree.norm(jax.tree.map(lambda a, b: a - b, after.params, before.params))
    assert float(metrics["grad_norm"]) > 0.01  # logged as it was before clipping
    assert float(moved) == pytest.approx(0.01 * TRAINING.learning_rate, rel=1e-4)


@pytest.mark.parametrize("amp_dtype", ["bfloat16", "float16"])
def test_16_bit_computation_stays_near_float32(amp_dtype):
    """Tiny as it is: XLA on CPU fails on some 16-bit products of small matrices, which the step must not contain."""
    batches = [make_batch(seed=s) for s in range(3)]
    _, expected, _ = run(config_of(), batches)
    _, losses, metrics = run(config_of(use_amp=True, amp_dtype=amp_dtype), batches)
    assert losses != expected
    np.testing.assert_allclose(losses, expected, rtol=1e-2)
    assert float(metrics["loss_scale"]) == (2.0**16 if amp_dtype == "float16" else 1)


@pytest.mark.parametrize("platform", ["cpu", "gpu"])
def test_micro_batches_come_once_and_in_order(platform):
    add = lambda total, batch: (10 * total + batch["rows"][0], None)  # noqa: E731
    batch = {"rows": jnp.array([[1], [2], [3]]), "tokens": jnp.zeros((3, 1, 4), jnp.int32)}
    assert scan_micro_batches(add, jnp.int32(0), batch, platform) == 123


def test_micro_batches_are_not_sliced_within_loops():
    """Where a CPU reads from a place that changes, LLVM made scalar code: softmax took ten times as long."""
    assembly, batch = assembled(config_of(STILL)), regroup(make_batch(), 4)
    program = assembly.jit_step().lower(assembly.abstract_state, batch, assembly.abstract_numbers).compile().as_text()
    assert "s32[4,4,24]" in program
    assert not re.search(r"= s32\[1,4,24\]\S* dynamic-slice\(", program)

"""Batches on the devices, a few ahead of the update that is computed; those of the held-out text, evaluated."""

from collections.abc import Iterator

import jax
import numpy as np

from jaxlm.data.loader import AnyRows, Rows, eval_batches, train_batches
from jaxlm.data.mixture import Mixture
from jaxlm.errors import UserError
from jaxlm.monitor.metrics import Throughput
from jaxlm.monitor.watchdog import Watchdog
from jaxlm.parallel.mesh import EVAL_BATCH, TRAIN_BATCH, put_batch, row_shards, rows_of_process
from jaxlm.parallel.split import Params
from jaxlm.run.text import Text
from jaxlm.train.accumulate import Batch
from jaxlm.train.assemble import Assembly, Resolved
from jaxlm.train.evaluate import evaluate_batches
from jaxlm.train.step import TrainState

STEPS_AHEAD = 2  # updates dispatched before the oldest is waited for: the host stays ahead, a stop signal is not late


class StopsWaiting(Exception):
    """Raised while a row is waited for, by what is called meanwhile: the run is to be stopped."""


class BatchFeeder:
    """Iterates over the batches of updates `steps`, numbered from 0; over fewer, if StopsWaiting comes between."""

    def __init__(
        self, resolved: Resolved, rows: AnyRows, steps: range, throughput: Throughput, watchdog: Watchdog
    ) -> None:
        self.resolved, self.rows, self.steps, self.batches = resolved, rows, steps, resolved.batches
        self.given_up = False
        self.throughput, self.watchdog = throughput, watchdog
        self._dispatched: list[tuple[int, jax.Array]] = []

    def __iter__(self) -> Iterator[Batch]:
        mesh, batches = self.resolved.mesh, self.batches
        stream = self.rows, self.resolved.config.training.seed, batches
        own = rows_of_process(mesh, batches.rows)
        host_batches = train_batches(*stream, self.steps.start, own, self.resolved.anneal_row)
        try:
            for _ in self.steps:
                try:
                    batch = next(host_batches)
                except StopsWaiting:
                    self.given_up = True
                    return
                # Counted in this process's rows; the others' are as full.
                processes = batches.rows / batch["rows"].shape[1]
                self.throughput.tokens += int(np.count_nonzero(batch["segments"]) * processes)
                yield put_batch(batch, mesh, TRAIN_BATCH)
        finally:
            host_batches.close()

    def taken(self, step: int) -> dict[str, float]:
        """What the updates up to `step` have taken: train/epoch where the text has an end, see `Mixture.metrics`."""
        position = self.batches.position(step)
        epochs = self.rows.epochs(position)
        of_sources = self.rows.metrics(position, self.resolved.anneal_row) if isinstance(self.rows, Mixture) else {}
        return ({} if epochs is None else {"train/epoch": epochs}) | of_sources

    def dispatched(self, step: int, result: jax.Array) -> None:
        """Update `step` is on its way to `result`; waits until no more than STEPS_AHEAD others are."""
        self._dispatched.append((step, result))
        if len(self._dispatched) > STEPS_AHEAD:
            done, result = self._dispatched.pop(0)
            result.block_until_ready()
            self.watchdog.updated(done)
            if self.batches.micro_batches(done) != self.batches.micro_batches(done - 1):
                self.watchdog.forget_usual()


def evaluate_state(
    assembly: Assembly, state: TrainState, resolved: Resolved, text: Text, watchdog: Watchdog
) -> dict[str, float]:
    """`evaluate_batches` of the held-out text, and the same under `average_...` of the average, if there is one.

    Raises:
      UserError: no text was held out.
    """

    def evaluate(params: Params) -> dict[str, float]:
        batches = {name: _batches_to_evaluate(resolved, rows, watchdog) for name, rows in text.eval_rows.items()}
        return evaluate_batches(assembly.eval_step, params, batches, text.eval_bytes)

    if not text.eval_rows:
        raise UserError("data.validation_fraction (0): no text is held out that could be evaluated")
    metrics = evaluate(state.params)
    if not assembly.averages:
        return metrics
    of_average = evaluate(assembly.average(state))
    return metrics | {f"average_{name}": value for name, value in of_average.items() if name != "tokens"}


def _batches_to_evaluate(resolved: Resolved, rows: Rows, watchdog: Watchdog) -> Iterator[Batch]:
    """Every row once, on the devices."""
    batch_size = resolved.config.training.batch_size * row_shards(resolved.mesh)
    for batch in eval_batches(rows, batch_size, rows_of_process(resolved.mesh, batch_size)):
        yield put_batch(batch, resolved.mesh, EVAL_BATCH)
        watchdog.alive()

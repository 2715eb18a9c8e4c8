"""Whether the numbers of a run are well: losses that jump, updates that were skipped, runs that only skip."""

from collections.abc import Callable
from pathlib import Path

import jax

from jaxlm.data.loader import AnyRows, documents_of_step
from jaxlm.errors import Diverged
from jaxlm.monitor.anomalies import LossSpikes, SkippedUpdates
from jaxlm.train.assemble import Resolved
from jaxlm.train.precision import scales_loss, scales_loss_dynamically
from jaxlm.train.step import TrainState

SHOWN_DOCUMENTS = 12  # of a skipped update


class NumbersJudge:
    """Judges the metrics of updates, when they are logged.

    Args:
      state: that the run starts or goes on with.
      report: takes a line about what is wrong.
      newest_checkpoint: names the newest one, if there is any.
    """

    def __init__(
        self,
        resolved: Resolved,
        rows: AnyRows,
        state: TrainState,
        report: Callable[[str], None],
        newest_checkpoint: Callable[[], Path | None],
    ) -> None:
        self.resolved, self.rows, self.report, self.newest_checkpoint = resolved, rows, report, newest_checkpoint
        self._skipped = SkippedUpdates(int(state.skipped))
        self._exhausted = int(state.loss_scale.exhausted)
        self._spikes = LossSpikes()

    def note(self, step: int, metrics: dict[str, jax.Array]) -> None:
        """Remembers an update's metrics without waiting for them."""
        self._skipped.note(step, metrics["skipped"])

    def check(self, step: int, values: dict[str, float]) -> None:
        """Says what is wrong with the updates since the last check.

        Args:
          values: the metrics of update `step`.

        Raises:
          Diverged: float16 has no smaller scale to try, or too many updates in a row were skipped.
        """
        spike = self._spikes.look(values["loss"])
        if spike is not None:
            self.report(f"step {step}: {spike}")
        for skipped in self._skipped.read():
            stream = self.rows, self.resolved.config.training.seed, self.resolved.batches
            documents = documents_of_step(*stream, skipped - 1, self.resolved.anneal_row)
            names = ", ".join(map(str, documents[:SHOWN_DOCUMENTS])) + ", ..." * (len(documents) > SHOWN_DOCUMENTS)
            self.report(
                f"step {skipped}: skipped, its loss or gradient is not finite; it was to learn from documents {names} "
                f"({len(documents)}, numbered from 0) of the training text"
            )
        self._end_if_hopeless(step, values)

    def _end_if_hopeless(self, step: int, values: dict[str, float]) -> None:
        training = self.resolved.config.training
        if scales_loss_dynamically(training):
            if values["scale_exhausted"] <= self._exhausted:
                return
            what = f"float16 overflows at the lowest loss scale ({values['loss_scale']:g})"
            cure = "training.amp_dtype bfloat16, or a lower training.learning_rate"
        else:
            if self._skipped.in_a_row <= training.max_skipped_steps:
                return
            limit = f"training.max_skipped_steps {training.max_skipped_steps}"
            what = f"{self._skipped.in_a_row} updates in a row were not finite ({limit})"
            cure = "a lower training.loss_scale, or 0" if scales_loss(training) else "a lower training.learning_rate"
        newest = self.newest_checkpoint()
        last = "nothing was saved yet" if newest is None else f"the last checkpoint is {newest}"
        raise Diverged(f"step {step}: {what}; {last}. Start over with {cure}, and --fresh")

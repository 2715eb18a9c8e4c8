"""All that a run measures of its updates on request."""

from collections.abc import Callable

from jaxlm.config import Config
from jaxlm.monitor.gradients import LayerNorms, NoiseScale
from jaxlm.monitor.histograms import HistogramWriter
from jaxlm.monitor.metrics import MetricsTracker, Throughput
from jaxlm.monitor.watchdog import Watchdog
from jaxlm.train.accumulate import Batch
from jaxlm.train.assemble import Assembly
from jaxlm.train.numbers import Numbers
from jaxlm.train.step import TrainState


class Probes:
    """The probes that the configuration asks for; `report` takes the line about the noise scale."""

    def __init__(
        self,
        config: Config,
        assembly: Assembly,
        total_steps: int,
        tracker: MetricsTracker,
        throughput: Throughput,
        watchdog: Watchdog,
        report: Callable[[str], None],
    ) -> None:
        training, rest = config.training, (total_steps, tracker, throughput, watchdog)
        self._noise = NoiseScale(assembly, training.noise_scale_steps, *rest)
        self._others = (
            HistogramWriter(assembly, training.histogram_steps, *rest),
            LayerNorms(assembly, training.layer_norm_steps, *rest),
        )
        self._report = report

    def before_update(self, step: int, state: TrainState, batch: Batch, numbers: Numbers) -> None:
        """Each one's measurement of update `step`, from 1, if it is due; `state` is that before it."""
        for probe in self._others:
            probe.before_update(step, state, batch, numbers)
        before = self._noise.measured
        self._noise.before_update(step, state, batch, numbers)
        if self._noise.measured > before:
            self._report(f"step {step}: {self._advice(batch)}")

    def _advice(self, batch: Batch) -> str:
        update, scale, n = batch["tokens"].size, self._noise.tokens, self._noise.measured
        of = f"an update has {update:,} (from {n} measurement{'s' * (n > 1)})"
        if scale is None:
            return f"the gradient noise scale is not known yet, it is far above the update's {update:,} tokens"
        if scale > 2 * update:
            advice = "a larger batch makes each update count for more"
        elif scale < update / 2:
            advice = "a smaller batch needs hardly more updates"
        else:
            advice = "the batch suits it"
        return f"gradient noise scale {scale:,.0f} tokens, {of}: {advice}"

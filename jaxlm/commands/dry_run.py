"""A run up to its first update and no further, of which nothing is written: `jaxlm train --dry_run`, `jaxlm doctor`."""

import math
from collections.abc import Sequence
from typing import Any

import jax

from jaxlm.config.validate import LARGEST_INT
from jaxlm.errors import RunFailed, Stopped
from jaxlm.monitor.metrics import memory_gib
from jaxlm.monitor.sinks import Sink, check_own_sinks
from jaxlm.parallel.processes import say
from jaxlm.run.result import Result
from jaxlm.train.assemble import Resolved
from jaxlm.trainer import Trainer

QUIET = dict.fromkeys(("profile_steps", "histogram_steps", "noise_scale_steps", "layer_norm_steps", "max_time")) | {
    "eval_on_start": False,
    "eval_steps": LARGEST_INT,
}


class DryRun(Trainer):
    """All checks of a start, and the next update; the run's folder is left as it was."""

    def __init__(self, resolved: Resolved, **options: Any) -> None:
        super().__init__(resolved.with_fields({f"training.{name}": value for name, value in QUIET.items()}), **options)
        self.last_step = min(self.current_step + 1, self.last_step)

    def train(self) -> Result:
        """Makes the update, if there is one left. Raises RunFailed if its loss is not finite."""
        with self._lock:
            if self.finished or self.current_step < self.last_step:
                result = super().train()
            else:
                say(f"dry run: the run is at step {self.current_step}, and no update is left before it stops")
                result = self._result()
        self._lock.put_back()
        return result

    def _open_sinks(self) -> Sequence[Sink]:
        check_own_sinks(self.config)
        return []

    def _nothing(self, path: object = None, *, average: bool = False) -> None:
        """Of all that a run writes."""

    save_checkpoint = save_model = _write_report = _nothing

    def _end(self, stopping: bool) -> Result:
        if stopping:
            raise Stopped("the dry run has written nothing; start it again")
        loss = float(self.step_metrics["loss"])
        if not math.isfinite(loss):
            raise RunFailed(f"dry run: the loss of update {self.current_step} is {loss}; look at model and precision")
        gib = next(iter(memory_gib(jax.local_devices()).values()))  # of a device, else of the process
        say(
            f"dry run: update {self.current_step} works, loss {loss:.4f}, {gib:.2f} GiB of memory at most; "
            f"nothing was written to {self.folder}"
        )
        return self._result()

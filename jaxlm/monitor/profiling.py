"""A trace of some updates (training.profile_steps), for TensorBoard's profile page or Perfetto."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax

from jaxlm.config import profiled_steps
from jaxlm.errors import UserError
from jaxlm.parallel.processes import is_leader, say


class Profiler:
    """Traces the updates named by `steps` ("A:B", or None) into `folder`/plugins/profile, in the first process.

    Raises:
      UserError: the run ends before the first of them.
    """

    def __init__(self, steps: str | None, folder: Path, last_step: int) -> None:
        self.folder, self.running = folder, False
        self.first, self.last = (0, 0) if steps is None or not is_leader() else profiled_steps(steps)
        if self.first > last_step:
            raise UserError(f"training.profile_steps ({steps}) begins after the run's last update, {last_step}")
        self.last = min(self.last, last_step)

    @contextmanager
    def update(self, step: int, before: Any) -> Iterator[None]:
        """Around the call that starts update `step`; `before` is what those before it result in."""
        if step == self.first:
            jax.block_until_ready(before)
            jax.profiler.start_trace(self.folder, create_perfetto_trace=True)
            self.running = True
        with jax.profiler.StepTraceAnnotation("update", step_num=step):
            yield

    def stop_after(self, step: int, results: Any) -> None:
        """Ends the trace if `step`, whose `results` are awaited, is the last one of it."""
        if self.running and step == self.last:
            jax.block_until_ready(results)
            self.close()

    def close(self) -> None:
        """Writes what was traced; without a trace, does nothing."""
        if self.running:
            self.running = False
            jax.profiler.stop_trace()
            written = max(self.folder.glob("plugins/profile/*"))
            say(f"profile of updates {self.first} to {self.last}: {written} (see docs/profiling.md)")

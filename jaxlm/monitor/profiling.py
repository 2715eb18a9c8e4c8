"""A trace of some updates (training.profile_steps), for TensorBoard's profile page or Perfetto."""

from pathlib import Path

import jax

from jaxlm.config.validate import profiled_steps
from jaxlm.parallel.processes import is_leader, say


class Profiler:
    """Traces the updates named by `steps` ("A:B", or None) into `folder`/plugins/profile, in the first process."""

    def __init__(self, steps: str | None, folder: Path, last_step: int) -> None:
        self.folder, self.running = folder, False
        self.first, last = (0, 0) if steps is None or not is_leader() else profiled_steps(steps)
        self.last = min(last, last_step)

    def update(self, step: int, before: object) -> jax.profiler.StepTraceAnnotation:
        """A context for the call that starts update `step`; `before`: the arrays that the updates before it compute."""
        if self.first <= step <= self.last and not self.running:  # a run may go on in the midst of them
            self.first = step
            jax.block_until_ready(before)
            jax.profiler.start_trace(self.folder, create_perfetto_trace=True)
            self.running = True
        return jax.profiler.StepTraceAnnotation("update", step_num=step)

    def stop_after(self, step: int, results: object) -> None:
        """Ends the trace if `step` is its last update, after waiting for `results`, the arrays that it computes."""
        if self.running and step == self.last:
            jax.block_until_ready(results)
            self.close()

    def close(self) -> None:
        """Writes the trace, if one is running."""
        if self.running:
            self.running = False
            jax.profiler.stop_trace()
            written = max(self.folder.glob("plugins/profile/*"))
            say(f"profile of updates {self.first} to {self.last}: {written} (see docs/profiling.md)")

"""What users add to a run without subclassing `Trainer`: hooks, called as things happen."""

import sys
import weakref
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

from jaxlm.config import Config, nearest
from jaxlm.errors import UserError, printable
from jaxlm.monitor.metrics import MetricsTracker
from jaxlm.monitor.sinks import Row
from jaxlm.monitor.watchdog import Watchdog
from jaxlm.run.result import Result
from jaxlm.train.step import TrainState


class Running(Protocol):
    """What a hook may use of the run, which is its `Trainer`.

    Attributes:
      current_step: updates made.
      total_steps: updates of the whole run.
      folder: the run's.
      state: after the last update; the next one takes its arrays over, so copy what you keep. Reading them waits for
        the device.
      metrics_tracker: its `update(values, run.current_step)` adds to this step's row, which is written after all hooks.
    """

    current_step: int
    total_steps: int
    folder: Path
    state: TrainState
    metrics_tracker: MetricsTracker

    @property
    def config(self) -> Config: ...

    def stop(self, reason: str) -> None: ...

    def evaluate(self) -> dict[str, float]: ...

    def save_checkpoint(self) -> None: ...

    def save_model(self, path: Path) -> None: ...

    def generate_text(self, prompt: str) -> Any: ...


class Hook:
    """Methods that a run calls as things happen; override those that you need.

    All processes of a run call their own hooks. What all of them have to do together (`run.evaluate`, the saves) they
    must do at the same step. An exception ends the run once this update is saved: the same command goes on.
    """

    def on_start(self, run: Running) -> None:
        """Before the first update of this start; metrics that are added come in the next row."""

    def on_update(self, run: Running) -> None:
        """After each update, which the device may still be computing."""

    def on_log(self, run: Running, row: Row) -> None:
        """After training metrics were logged: `row` is {name: value} of this step so far."""

    def on_evaluate(self, run: Running, metrics: dict[str, float]) -> None:
        """After an evaluation of the run's own: `metrics` as `Trainer.evaluate` returns them."""

    def on_save(self, run: Running, path: Path) -> None:
        """After a checkpoint was saved at `path`. Training waits until it is written, only where this is overridden."""

    def on_end(self, run: Running, result: Result) -> None:
        """When all is saved and all rows are written, of a run that has finished or was stopped.

        Called once: the same command again, of a finished run, calls nothing.
        """


class Hooks:
    """The hooks of a run. The first exception in one is kept, asks the run to stop, and silences them all.

    Raises:
      UserError: one is no hook, or has a method that nothing would call.
    """

    def __init__(self, hooks: Sequence[Hook], run: Running, watchdog: Watchdog) -> None:
        self._hooks, self._run, self._watchdog = hooks, weakref.ref(run), watchdog  # a run ends when it is let go
        self._error: BaseException | None = None
        for hook in hooks:
            if not isinstance(hook, Hook):
                raise UserError(f"hooks ({hook!r}): is no object of a class derived from jaxlm.Hook")
            for name in dir(hook):
                if name.startswith("on_") and not hasattr(Hook, name):
                    raise UserError(f"hooks ({type(hook).__name__}.{name}): never called{nearest(name, dir(Hook))}")

    def call(self, method: str, *payload: object) -> None:
        """Calls `method` of each hook."""
        run = self._run()
        if run is None or self._error is not None:
            return
        for hook in self._hooks:
            try:
                with self._watchdog.during(f"{type(hook).__name__}.{method}"):
                    getattr(hook, method)(run, *payload)
            except (Exception, SystemExit, KeyboardInterrupt) as error:
                self._error = error
                what = f"{type(hook).__name__}.{method} raised {type(error).__name__} ({printable(error)})"
                self._what = f"{what} at step {run.current_step}"
                run.stop(what)
                return

    def listen(self, method: str) -> bool:
        """Whether any hook has a `method` of its own."""
        return any(vars(Hook)[method] is not getattr(type(hook), method) for hook in self._hooks)

    def raise_error(self, going_on: str) -> None:
        """Raises what a hook has raised, if one has: the user's own error, after a line that names hook and update."""
        if self._error is not None:
            how = "stopped" if isinstance(self._error, SystemExit) else "failed"
            print(f"{how}: {self._what}; {going_on}", file=sys.stderr, flush=True)
            raise self._error

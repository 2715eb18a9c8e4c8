"""The progress line of a run."""

import os
import sys
import time

from tqdm import tqdm

from jaxlm.monitor.notebook import LiveCurve, in_notebook
from jaxlm.monitor.sinks import Row

PROGRESS_FORMATS = {
    "train/loss": "loss {:.4f}",
    "train/tokens_per_second": "{:,.0f} tokens/s",
    "eval/loss": "eval loss {:.4f}",
}
# Metrics of the program's own that the line leaves out.
NOT_SHOWN = ("train/", "eval/", "gradients/", "updates/", "parameters/")


class Progress:
    """The progress line on stderr: a bar on a terminal of some size, a line a row elsewhere, none unless `shown`.

    In a notebook the cell shows a bar and the losses' curve instead.
    """

    def __init__(self, start_step: int, last_step: int, shown: bool = True) -> None:
        self.last_step, self.shown = last_step, shown
        self.live = LiveCurve(start_step, last_step) if shown and in_notebook() else None
        self.bar = tqdm(
            total=last_step,
            initial=start_step,
            unit="step",
            file=sys.stderr,
            dynamic_ncols=True,
            # A terminal may say that it has no lines or columns, as in some containers: tqdm shows nothing there.
            disable=not (shown and sys.stderr.isatty() and all(os.get_terminal_size(sys.stderr.fileno()))),
            bar_format="{l_bar}{bar}| {n_fmt}/{total_fmt} [{elapsed}<{remaining}{postfix}]",
        )
        # Step and time of the first row, then of the first evaluation, and which: what these compile is not counted.
        self._first: tuple[int, float, bool] | None = None

    def advance(self, step: int) -> None:
        """Moves the bar to `step`, the updates done."""
        self.bar.update(step - self.bar.n)
        if self.live is not None:
            self.live.advance(step)

    def line(self, text: str) -> None:
        """Writes a line above the bar."""
        if self.shown:
            self.bar.write(text, file=sys.stderr)

    def write(self, row: Row, step: int) -> None:
        """Shows the row of a step: loss, speed, and what users added."""
        parts = [pattern.format(row[name]) for name, pattern in PROGRESS_FORMATS.items() if name in row]
        parts += [f"{name} {value:.4g}" for name, value in row.items() if not name.startswith(NOT_SHOWN)]
        if self.live is not None:
            self.live.write(row, step, ", ".join(parts))
            return
        if not self.bar.disable:
            self.bar.set_postfix_str(", ".join(parts))
            return
        if self._first is None or ("eval/loss" in row and not self._first[2]):
            self._first = step, time.monotonic(), "eval/loss" in row
        done, seconds = step - self._first[0], time.monotonic() - self._first[1]
        if done:
            parts.append(f"left {self.bar.format_interval((self.last_step - step) * seconds / done)}")
        self.line("  ".join([f"step {step}/{self.last_step}", *parts]))

    def close(self) -> None:
        self.bar.close()
        if self.live is not None:
            self.live.draw()

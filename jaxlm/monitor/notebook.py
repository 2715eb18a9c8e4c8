"""A run's progress in a notebook: a bar and the curve of its losses, drawn again in place."""

import math
import sys
import time
from html import escape

from jaxlm.monitor.sinks import Row

WIDTH, HEIGHT, POINTS = 480, 120, 300  # pixels; most points of a curve
MARGIN = 40  # pixels on the left, for the limits
SECONDS_BETWEEN = 0.3  # two drawings
CURVES = {"train/loss": "#4e79a7", "eval/loss": "#e15759"}


def in_notebook() -> bool:
    """Whether this is IPython with a kernel, whose front end shows HTML."""
    ipython = sys.modules.get("IPython")  # it is imported wherever it runs
    return ipython is not None and hasattr(ipython.get_ipython(), "kernel")


class LiveCurve:
    """What a cell shows while its run trains, from update `start_step` to `last_step`."""

    def __init__(self, start_step: int, last_step: int) -> None:
        from IPython.display import HTML, display

        self._start, self._step, self._last, self._status = start_step, start_step, last_step, ""
        self._series: dict[str, list[tuple[int, float]]] = {name: [] for name in CURVES}
        self._html, self._drawn = HTML, -SECONDS_BETWEEN
        self._handle = display(HTML(self.html()), display_id=True)

    def advance(self, step: int) -> None:
        """Moves the bar to `step`, the updates done."""
        self._step = step
        if time.monotonic() - self._drawn >= SECONDS_BETWEEN:
            self.draw()

    def write(self, row: Row, step: int, status: str) -> None:
        """Takes a step's losses; `status` is shown beside the bar."""
        self._status = status
        for name, points in self._series.items():
            if name in row and math.isfinite(row[name]):
                points.append((step, row[name]))

    def draw(self) -> None:
        self._drawn = time.monotonic()
        self._handle.update(self._html(self.html()))

    def html(self) -> str:
        share = self._step / max(self._last, 1)
        bar = f'<progress max="1" value="{share:.4f}" style="width:{WIDTH}px"></progress>'
        return f"<div>{bar} {self._step:,}/{self._last:,} {escape(self._status)}<br>{self._curves()}</div>"

    def _curves(self) -> str:
        """The losses over the steps, as SVG; nothing before there are two."""
        every = [point for points in self._series.values() for point in points]
        if len(every) < 2:
            return ""
        low, high = min(loss for _, loss in every), max(loss for _, loss in every)
        right, up = WIDTH / max(self._last - self._start, 1), HEIGHT / ((high - low) or 1)
        lines = []
        for name, points in self._series.items():
            thin = points[:: -(-len(points) // POINTS) or 1]
            places = " ".join(f"{(step - self._start) * right:.1f},{(high - loss) * up:.1f}" for step, loss in thin)
            line = f'<polyline points="{places}" fill="none" stroke="{CURVES[name]}" stroke-width="1.5"/>'
            dot = (
                f'<circle cx="{places.partition(",")[0]}" cy="{places.partition(",")[2]}" r="2" fill="{CURVES[name]}"/>'
            )
            lines.append(line if len(thin) > 1 else dot if thin else "")
        lines += [
            f'<text x="{2 - MARGIN}" y="{y}" font-size="10" fill="gray">{x:.3f}</text>'
            for x, y in ((high, 10), (low, HEIGHT))
        ]
        names = ", ".join(f'<span style="color:{color}">{name}</span>' for name, color in CURVES.items())
        box = f"{-MARGIN} -2 {MARGIN + WIDTH} {HEIGHT + 4}"
        size = f'width="{MARGIN + WIDTH}" height="{HEIGHT + 4}" viewBox="{box}"'
        return f'<svg xmlns="http://www.w3.org/2000/svg" {size}>{"".join(lines)}</svg><br>{names}'

"""Line charts as SVG that needs no script; the points go along as JSON, for the values under a pointer."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from jaxlm.report.elements import Element, brief, data, element, number

Points = Sequence[tuple[float, float]]
WIDTH, HEIGHT = 360, 214  # of a chart, in the units of the drawing: about pixels on a phone
LEFT, RIGHT, TOP, BOTTOM = 46, 352, 8, 184  # of the plot
SMOOTHED_FROM = 60  # points
SYMBOLS = {
    "skipped": "\N{MULTIPLICATION X}",
    "not finite": "\N{MULTIPLICATION X}",
    "spike": "\N{BLACK DOWN-POINTING SMALL TRIANGLE}",
}


@dataclass(frozen=True)
class Line:
    label: str
    points: Points  # in order; NaN is a gap
    colour: int  # of the style sheet, from 0
    marked: bool = False  # a dot a point, where they are few
    noisy: bool = False  # smoothed, where they are many


@dataclass(frozen=True)
class Chart:
    title: str
    unit: str
    lines: Sequence[Line]
    resumes: Sequence[tuple[int, int]] = ()  # (step, colour)
    signs: Sequence[tuple[int, str, int]] = ()  # (step, kind, colour)
    both_scales: bool = False  # a switch to a logarithmic axis of steps


def figure(chart: Chart, key: str, columns: int) -> Element:
    """The chart with its title and legend.

    Args:
      key: unique in the page.
      columns: of each line, at most two points a column are kept.
    """
    scales = [False, True] if chart.both_scales else [False]
    drawings = [_drawing(chart, log_x, columns) for log_x in scales]
    switch: list[Element] = []
    if chart.both_scales:
        for i, label in enumerate(("steps", "steps, logarithmic")):
            chosen = {"checked": "checked"} if i == 0 else {}
            switch.append(element("input", type="radio", name=key, id=f"{key}-{i}", class_=f"scale{i}", **chosen))
            switch.append(element("label", label, for_=f"{key}-{i}"))
    return element(
        "figure",
        element("figcaption", element("b", chart.title), ", " + chart.unit if chart.unit else None),
        *switch,
        *drawings,
        _legend(chart),
        class_="chart" + " both" * chart.both_scales,
    )


def _legend(chart: Chart) -> Element:
    items = [
        element("li", element("span", class_=f"key c{line.colour % 8} d{line.colour // 8 % 3}"), line.label)
        for line in chart.lines
    ]
    kinds = dict.fromkeys(kind for _, kind, _ in chart.signs)
    items += [element("li", element("span", SYMBOLS[kind], class_="sign"), kind) for kind in kinds]
    if chart.resumes:
        items.append(element("li", element("span", class_="key resume"), "resumed"))
    if any(map(_is_smoothed, chart.lines)):
        items.append(element("li", "bold: smoothed", class_="faint"))
    return element("ul", *items, class_="legend")


# ---- Scales ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Scale:
    """From values to places, linear or logarithmic."""

    low: float
    high: float
    start: float
    end: float
    log: bool = False

    def __call__(self, value: float) -> float:
        low, high = (math.log10(self.low), math.log10(self.high)) if self.log else (self.low, self.high)
        value = math.log10(max(value, self.low)) if self.log else value
        return self.start + (value - low) / (high - low) * (self.end - self.start)

    def ticks(self, count: int) -> list[float]:
        if self.log and self.high / self.low > 8:
            decades = range(math.floor(math.log10(self.low)), math.ceil(math.log10(self.high)) + 1)
            factors = (1,) if len(decades) > 3 else (1, 3) if len(decades) > 2 else (1, 2, 5)
            every = max(1, round(len(decades) / 6))
            found = [factor * 10.0**decade for decade in decades[::every] for factor in factors]
        else:
            step = _round_up((self.high - self.low) / count)
            first = math.ceil(self.low / step - 1e-9)
            found = [i * step for i in range(first, math.floor(self.high / step + 1e-9) + 1)]
        return [float(f"{value:.12g}") for value in found if self.low * (1 - 1e-9) <= value <= self.high * (1 + 1e-9)]


def _round_up(value: float) -> float:
    """The next of 1, 2, 2.5, 5 times a power of ten."""
    power = 10.0 ** math.floor(math.log10(value))
    return next(factor * power for factor in (1, 2, 2.5, 5, 10) if factor * power >= value * (1 - 1e-9))


def y_scale(lines: Sequence[Line]) -> Scale:
    """From 0 where that is near; logarithmic where a few values would flatten all others."""
    values = sorted(y for line in lines for _, y in line.points if math.isfinite(y))
    if not values:
        return Scale(0, 1, BOTTOM, TOP)
    low, high, middle = values[0], values[-1], values[len(values) // 2]
    if low > 0 and high > 20 * middle:
        return Scale(low, high, BOTTOM, TOP, log=True)
    if low >= 0 and low < 0.4 * high:
        low = 0.0
    if high - low < 1e-9 * max(abs(high), 1e-30):  # all the same
        low, high = (low - 0.1 * abs(low) - 1e-12, high + 0.1 * abs(high) + 1e-12) if low else (0.0, 1.0)
    step = _round_up((high - low) / 5)
    half = step / 2  # the ends of the axis need no tick
    return Scale(math.floor(low / half + 1e-9) * half, math.ceil(high / half - 1e-9) * half, BOTTOM, TOP)


def x_scale(lines: Sequence[Line], log: bool) -> Scale:
    steps = [x for line in lines for x, _ in line.points]
    low, high = (max(1, min(steps)), max(steps)) if log else (0, max(steps))
    return Scale(low, max(high, low + 1), LEFT, RIGHT, log)


# ---- Lines -----------------------------------------------------------------------------------------------------------


def thinned(points: Points, scale: Scale, columns: int) -> list[tuple[float, float]]:
    """The least and the greatest of every column, in order, and the first and last point; all, if they are few."""
    if len(points) <= 2 * columns:
        return list(points)
    kept: list[tuple[float, float]] = []
    column: list[tuple[float, float]] = []
    place = None
    for point in points:
        here = int((scale(point[0]) - LEFT) / (RIGHT - LEFT) * columns)
        if here != place:
            kept += _extremes(column)
            column, place = [], here
        column.append(point)
    kept += _extremes(column)
    return [points[0]] * (kept[0] != points[0]) + kept + [points[-1]] * (kept[-1] != points[-1])


def _extremes(column: Points) -> list[tuple[float, float]]:
    known = [point for point in column if math.isfinite(point[1])]
    if not known:
        return list(column[:1])
    least, greatest = min(known, key=lambda p: p[1]), max(known, key=lambda p: p[1])
    return sorted({least, greatest})


def smoothed(points: Points) -> list[tuple[float, float]]:
    """Means over about a fiftieth of the points, as many before as behind, so that nothing is shifted."""
    widest = max(2, len(points) // 100)
    sums, counts = [0.0], [0]
    for _, y in points:
        known = math.isfinite(y)
        sums.append(sums[-1] + (y if known else 0.0))
        counts.append(counts[-1] + known)
    found = []
    for i, (x, _) in enumerate(points):
        half = min(widest, i, len(points) - 1 - i)
        count = counts[i + half + 1] - counts[i - half]
        found.append((x, (sums[i + half + 1] - sums[i - half]) / count if count else math.nan))
    return found


def _is_smoothed(line: Line) -> bool:
    return line.noisy and len(line.points) >= SMOOTHED_FROM


def _path(points: Points, x: Scale, y: Scale) -> str:
    """The path of a line, in pieces where values are missing; a piece of one point is a dot."""
    parts: list[str] = []
    pen_down = False
    for i, (step, value) in enumerate(points):
        if not math.isfinite(value):
            pen_down = False
            continue
        here = f"{x(step):.1f} {min(max(y(value), TOP - 6), BOTTOM + 6):.1f}"
        alone = not pen_down and (i + 1 == len(points) or not math.isfinite(points[i + 1][1]))
        parts.append(f"M{here}h.01" if alone else ("L" if pen_down else "M") + here)
        pen_down = True
    return "".join(parts)


def _drawing(chart: Chart, log_x: bool, columns: int) -> Element:
    lines = [line for line in chart.lines if line.points]
    x, y = x_scale(lines, log_x), y_scale(lines)
    few = [(line, thinned(line.points, x, columns)) for line in lines]
    last = max(line.points[-1][0] for line in lines)
    axis = "logarithmic steps" if log_x else "steps"
    label = f"{chart.title}, {chart.unit}, over {axis} to {last:,}: " + "; ".join(map(_in_words, lines))
    hover = {
        "x": [x.low, x.high, x.start, x.end, log_x],
        "y": [y.low, y.high, y.start, y.end, y.log],
        "lines": [
            {
                "label": line.label,
                "colour": line.colour % 8,
                "x": [step for step, value in points if math.isfinite(value)],
                "y": [float(f"{value:.5g}") for _, value in points if math.isfinite(value)],
            }
            for line, points in few
        ],
    }
    return element(
        "div",
        element(
            "svg",
            *_axes(x, y),
            *_resumes(chart, x),
            *(part for line, points in few for part in _strokes(line, points, x, y, columns)),
            *_signs(chart, x),
            viewBox=f"0 0 {WIDTH} {HEIGHT}",
            role="img",
            aria_label=label,
            tabindex="0",
        ),
        element("script", data(hover), type="application/json"),
        class_="drawing" + (" log" if log_x else ""),
    )


def _in_words(line: Line) -> str:
    known = [value for _, value in line.points if math.isfinite(value)]
    return f"{line.label} {number(known[0])} to {number(known[-1])}" if known else f"{line.label} not known"


def _axes(x: Scale, y: Scale) -> Iterator[Element]:
    for value in y.ticks(5):
        at = f"{y(value):.1f}"
        yield element("path", d=f"M{LEFT} {at}H{RIGHT}", class_="grid")
        yield element("text", brief(value), x=LEFT - 5, y=at, dy=".32em", text_anchor="end")
    for value in x.ticks(5):
        at = f"{x(value):.1f}"
        anchor = "end" if x(value) > RIGHT - 8 else "middle"
        yield element("path", d=f"M{at} {BOTTOM}v4", class_="axis")
        yield element("text", brief(value), x=at, y=BOTTOM + 15, text_anchor=anchor)
    yield element("path", d=f"M{LEFT} {BOTTOM}H{RIGHT}", class_="axis")
    yield element("text", "step", x=(LEFT + RIGHT) / 2, y=HEIGHT - 1, text_anchor="middle", class_="name")


def _resumes(chart: Chart, x: Scale) -> Iterator[Element]:
    for step, colour in chart.resumes:
        if x.low <= step <= x.high:
            yield element("path", d=f"M{x(step):.1f} {TOP}V{BOTTOM}", class_=f"resume c{colour % 8}")


def _strokes(line: Line, few: Points, x: Scale, y: Scale, columns: int) -> Iterator[Element]:
    style = f"line c{line.colour % 8} d{line.colour // 8 % 3}"
    smooth = _is_smoothed(line)
    yield element("path", d=_path(few, x, y), class_=style + " raw" * smooth)
    if smooth:
        yield element("path", d=_path(thinned(smoothed(line.points), x, columns // 2), x, y), class_=style)
    if line.marked and len(line.points) <= 40:
        for step, value in few:
            if math.isfinite(value):
                yield element(
                    "circle", cx=f"{x(step):.1f}", cy=f"{y(value):.1f}", r="2", class_=f"dot c{line.colour % 8}"
                )


def _signs(chart: Chart, x: Scale) -> Iterator[Element]:
    for step, kind, colour in chart.signs:
        if x.low <= step <= x.high:
            place: dict[str, Any] = {"x": f"{x(step):.1f}", "y": TOP + 6, "text_anchor": "middle"}
            yield element("text", SYMBOLS[kind], class_=f"sign c{colour % 8}", **place)

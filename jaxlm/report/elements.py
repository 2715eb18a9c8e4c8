"""HTML as a tree, so that no text is ever taken for markup; and numbers as people read them."""

import json
import math
import re
from typing import Any
from xml.etree import ElementTree

Element = ElementTree.Element
UNPRINTABLE = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ud800-\udfff\ufffe\uffff]")


def element(tag: str, *children: Element | str | None, **attributes: Any) -> Element:
    """A tag with children (none: left out) and attributes: `class_` is class, `aria_label` aria-label."""
    names = {name: name.rstrip("_").replace("_", "-") for name in attributes}
    made = Element(tag, {names[name]: printable(str(value)) for name, value in attributes.items()})
    last: Element | None = None
    for child in children:
        if isinstance(child, Element):
            made.append(child)
            last = child
        elif child is not None and last is None:
            made.text = (made.text or "") + printable(child)
        elif child is not None and last is not None:
            last.tail = (last.tail or "") + printable(child)
    return made


def printable(text: str) -> str:
    """`text` with the replacement character for what HTML can't hold."""
    return UNPRINTABLE.sub("\N{REPLACEMENT CHARACTER}", text)


def data(values: Any) -> str:
    """JSON that may stand in a <script>."""
    return json.dumps(values, separators=(",", ":"), allow_nan=False).replace("<", "\\u003c")


def document(root: Element) -> str:
    return "<!DOCTYPE html>\n" + ElementTree.tostring(root, encoding="unicode", method="html") + "\n"


def number(value: float | None, digits: int = 4) -> str:
    """`value` to some significant digits: 12,345 or 4.592 or 3e-05; a dash where there is none."""
    if value is None or math.isnan(value):
        return "\N{EN DASH}"
    if value == int(value) if math.isfinite(value) else False:
        return f"{int(value):,}" if abs(value) < 1e15 else f"{value:.{digits - 1}e}"
    if abs(value) >= 10 ** (digits - 1):
        return f"{value:,.0f}"
    return f"{value:.{digits}g}"


def brief(value: float) -> str:
    """`value` for an axis: 1.5M, 20k, 0.25, 5e-4."""
    for factor, sign in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e4, "k")):
        if abs(value) >= factor:
            return f"{value / (1e3 if sign == 'k' else factor):g}{sign}"
    if value and abs(value) < 1e-3:
        mantissa, exponent = f"{value:.2e}".split("e")
        return f"{float(mantissa):g}e{int(exponent)}"
    return f"{value:g}"


def duration(seconds: float) -> str:
    """Such as 12 min 30 s."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours:,} h {minutes} min"
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"

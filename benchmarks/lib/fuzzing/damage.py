"""Damage to files and values, drawn from a random generator that the input's number seeds."""

import json
import random
import typing
from dataclasses import fields
from typing import Any

from jaxlm.config import SECTIONS

FIELDS = {
    f"{name}.{field.name}": (field, typing.get_type_hints(section)[field.name])
    for name, section in SECTIONS.items()
    for field in fields(section)
}
FIELDS_OF = {name: [dotted.partition(".")[2] for dotted in FIELDS if dotted.startswith(name)] for name in SECTIONS}
TEXTS = (
    "", " ", "none", "NULL", "true", "0", "-1", "1e5", "1e999", "nan", "-inf", "0x10", "1_000", "²", "a,b", ",", "[",
    "[]", "[1]", '["a", "b"]', "[[]]", "{}", "~", "~nobody_of_that_name/x", "..", "/", "a\0b", "\ud800", "\udcff", "\n",
    "é漢🙂", "\ufeff", "a\rb", "--", "-x", "=", "%s", "9" * 5000, "[" * 5000, "x" * 5000, "checkpoint-10.pt", "a.txt",
)  # fmt: skip
NUMBERS = (0, -1, 1, 2, 2**15, 2**24, 2**31 - 1, 2**31, 2**63, -(2**63), 10**40, 0.5, -0.0, 1e-320, 3.5e38, 1e308)
OTHERS = (None, True, False, float("nan"), float("inf"), -float("inf"), [], [[]], ["a"], ["a", 1], {}, {"a": {"b": []}})
RAW_JSON = ("9" * 5000, "[" * 100_000, '{"a":' * 50_000, "1e999", "-", "01", "'a'", "//", '"\\ud800"', '"\\u0000"', "")


class Defect(Exception):
    """An input that was neither loaded nor refused as it should be."""


def damaged_bytes(rng: random.Random, content: bytes) -> bytes:
    """`content` as disks, editors and interrupted copies leave it."""
    content = bytearray(content)
    for _ in range(rng.choice((1, 1, 1, 2, 5))):
        at = rng.randrange(len(content) + 1)
        match rng.randrange(8):
            case 0 if content:
                content[at % len(content)] ^= 1 << rng.randrange(8)
            case 1 if content:
                content[at % len(content)] = rng.randrange(256)
            case 2:
                del content[at:]
            case 3:
                del content[at : at + rng.choice((1, 10, 1000))]
            case 4:
                parts = b"\xff", b"\xc3", b"\0", b"\r", b"\n", b'"', b"\xed\xa0\x80", b"\xef\xbb\xbf", b"\0" * 4096
                content[at:at] = rng.choice(parts)
            case 5:
                content[at:at] = content[at : at + rng.choice((1, 20, 2000))]
            case 6 if rng.random() < 0.3:
                content[:] = rng.choice((b"", b"\n", b"\xff\xfe", rng.randbytes(200), bytes(content[::-1])))
            case 7 if rng.random() < 0.3:
                text = content.decode(errors="replace")
                content[:] = text.encode(rng.choice(("utf-16", "utf-8-sig", "latin-1", "utf-32-le")), "replace")
    return bytes(content)


def misspelt(rng: random.Random, name: str) -> str:
    at = rng.randrange(len(name) + 1)
    return name[:at] + rng.choice(("x", "", "_", ".", " ", "é", "\0")) + name[at + rng.randrange(2) :]


def junk(rng: random.Random) -> Any:
    return rng.choice(rng.choice((TEXTS, NUMBERS, OTHERS)))


def damage_leaf(rng: random.Random, values: dict[str, Any]) -> None:
    """Renames, replaces, adds or removes something somewhere in `values`."""
    while (inner := [value for value in values.values() if isinstance(value, dict) and value]) and rng.random() < 0.8:
        values = rng.choice(inner)
    name = rng.choice(list(values)) if values else "a"
    match rng.randrange(6):
        case 0:
            values[misspelt(rng, name)] = values.pop(name, None)
        case 1:
            values[rng.choice(("new", "", "auto", *FIELDS))] = junk(rng)
        case 2:
            values.pop(name, None)
        case _:
            values[name] = junk(rng)


def as_json(rng: random.Random, values: dict[str, Any]) -> bytes:
    text = json.dumps(values)
    if rng.random() < 0.1:  # what json.dumps would not write
        colon = rng.choice([i for i, c in enumerate(text) if c == ":"] or [0])
        text = text[: colon + 1] + rng.choice(RAW_JSON) + text[colon + 1 + rng.choice((0, 5)) :]
    content = text.encode()
    return damaged_bytes(rng, content) if rng.random() < 0.25 else content

"""docs/options.md is the declarations in jaxlm/config/schema.py; `python tests/test_options.py` rewrites it."""

import dataclasses
import typing
from collections.abc import Iterator
from pathlib import Path

from jaxlm.config import SECTIONS, shown, type_name

PAGE = Path(__file__).parents[1] / "docs" / "options.md"
TITLES = {"model": "The model", "training": "Training", "data": "Data"}


def entries() -> Iterator[str]:
    """A heading for each field, whose anchor is its name without the dot, and what its declaration says."""
    for name, section in SECTIONS.items():
        yield f"## {TITLES[name]}"
        hints = typing.get_type_hints(section)
        for field in dataclasses.fields(section):
            choices = f" One of: {', '.join(field.metadata['choices'])}." if field.metadata["choices"] else ""
            kind, default = type_name(hints[field.name]), shown(field.default)
            yield f"### `{name}.{field.name}`"
            yield f"{kind}, default `{default}`: {field.metadata['help']}.{choices}"


def page(text: str) -> str:
    """`text` with its sections replaced by those of the declarations."""
    return text.partition("## ")[0] + "\n\n".join(entries()) + "\n"


def test_the_page_of_options_is_current() -> None:
    text = PAGE.read_text(encoding="utf-8")
    assert text == page(text)


if __name__ == "__main__":
    PAGE.write_text(page(PAGE.read_text(encoding="utf-8")), encoding="utf-8")

"""docs/options.md is the declarations in jaxlm/config/schema.py; `python tests/test_options.py` rewrites it."""

import dataclasses
import typing
from pathlib import Path

from jaxlm.config import SECTIONS, shown, type_name

PAGE = Path(__file__).parents[1] / "docs" / "options.md"


def option_rows():
    for name, section in SECTIONS.items():
        hints = typing.get_type_hints(section)
        for field in dataclasses.fields(section):
            choices = f" ({', '.join(field.metadata['choices'])})" if field.metadata["choices"] else ""
            kind, default = type_name(hints[field.name]), shown(field.default)
            yield f"| `{name}.{field.name}` | {kind} | `{default}` | {field.metadata['help']}{choices} |"


def page(text: str) -> str:
    """`text` with the table's rows replaced by those of the declarations."""
    head, _, _ = text.partition("| `model.")
    return head + "\n".join(option_rows()) + "\n"


def test_the_page_of_options_is_current():
    text = PAGE.read_text(encoding="utf-8")
    assert text == page(text)


if __name__ == "__main__":
    PAGE.write_text(page(PAGE.read_text(encoding="utf-8")), encoding="utf-8")

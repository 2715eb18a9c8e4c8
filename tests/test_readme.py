"""The README's table of options is the declarations in config.py."""

import dataclasses
import typing
from pathlib import Path

from jaxlm.cli import _shown
from jaxlm.config import SECTIONS, type_name


def option_rows():
    for name, section in SECTIONS.items():
        hints = typing.get_type_hints(section)
        for field in dataclasses.fields(section):
            choices = f" ({', '.join(field.metadata['choices'])})" if field.metadata["choices"] else ""
            kind, default = type_name(hints[field.name]), _shown(field.default) or '""'
            yield f"| `{name}.{field.name}` | {kind} | `{default}` | {field.metadata['help']}{choices} |"


def test_the_readmes_table_is_current():
    readme = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")
    table = [line for line in readme.splitlines() if line.startswith(tuple(f"| `{name}." for name in SECTIONS))]
    assert table == list(option_rows())


if __name__ == "__main__":  # prints the table, to be pasted
    print("\n".join(option_rows()))

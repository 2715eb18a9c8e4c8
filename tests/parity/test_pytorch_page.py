"""The tables of docs/pytorch.md name every argument of the real classes, and no other."""

import dataclasses
import re
from pathlib import Path

from transformers import TrainingArguments
from trl import SFTConfig

PAGE = Path(__file__).parents[2] / "docs" / "pytorch.md"
ARGUMENTS = {field.name for field in dataclasses.fields(TrainingArguments) if field.init}


def named_between(start: str, end: str) -> list[str]:
    """The names in the first column of a table, sorted."""
    table = PAGE.read_text(encoding="utf-8").split(start)[1].split(end)[0]
    rows = [row for row in table.splitlines() if row.startswith("| `")]
    return sorted(name for row in rows for name in re.findall(r"`(\w+)`", row.split("|")[1]))


def test_the_table_of_training_arguments_is_complete() -> None:
    assert named_between("<!-- arguments:", "<!-- end of the arguments -->") == sorted(ARGUMENTS)


def test_the_table_of_sft_arguments_is_complete() -> None:
    own = {field.name for field in dataclasses.fields(SFTConfig) if field.init} - ARGUMENTS
    assert named_between("<!-- sft:", "<!-- end of sft -->") == sorted(own)

"""The table of docs/pytorch.md names every argument of the real TrainingArguments, and no other."""

import dataclasses
import re
from pathlib import Path

from transformers import TrainingArguments

PAGE = Path(__file__).parents[2] / "docs" / "pytorch.md"


def test_the_table_is_complete():
    table = PAGE.read_text(encoding="utf-8").split("<!-- arguments:")[1].split("<!-- end of the arguments -->")[0]
    named = [
        name
        for row in table.splitlines()
        if row.startswith("| `")
        for name in re.findall(r"`(\w+)`", row.split("|")[1])
    ]
    assert sorted(named) == sorted(field.name for field in dataclasses.fields(TrainingArguments) if field.init)

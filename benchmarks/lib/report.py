"""Result files: dated JSON with machine and versions, rewritten as results come in, and read again for tables."""

import datetime
import json
import os
import re
import shlex
from pathlib import Path
from typing import Any

from lib.machine import commit, machine, say, without_paths

RESULTS = Path(__file__).resolve().parents[1] / "results"


class Report:
    """A result file, <folder>/<benchmark>_<date>_<machine>.json; `write` after each result, so that nothing is lost.

    `device` is what was measured, where that is not the CPU, for the file's name.

    Attributes: `content`, what is written: what kind of benchmark, when, how, where, and `results`.
    """

    def __init__(
        self, benchmark: str, command: list[str], folder: Path = RESULTS, *, device: str | None = None, **facts: Any
    ) -> None:
        now, here = datetime.datetime.now(datetime.UTC), machine()
        slug = re.sub(r"[^a-z0-9]+", "-", (device or here["cpu"]).lower()).strip("-")
        where = slug if device else f"{slug}_{here['cores']}cores"
        folder.mkdir(parents=True, exist_ok=True)
        self.path = folder / f"{benchmark}_{now:%Y-%m-%dT%H%M}_{where}.json"
        self.content: dict[str, Any] = {
            "benchmark": benchmark,
            "date": now.isoformat(timespec="seconds"),
            "command": without_paths(shlex.join(["python", *command])),
            "commit": commit(),
            "machine": here,
            **facts,
            "results": [],
        }

    def write(self) -> None:
        """Writes the file anew, whole or not at all."""
        part = self.path.with_name(f".{self.path.name}.part")
        part.write_text(json.dumps(self.content, indent=1) + "\n", encoding="utf-8")
        part.replace(self.path)

    def close(self) -> None:
        """Writes it, and says where."""
        self.write()
        say(f"written: {os.path.relpath(self.path)}")


def markdown(heads: list[str], rows: list[list[str]]) -> str:
    """A Markdown table; a head that begins with ">" is of a column of numbers."""
    bar = ["---:" if head.startswith(">") else "---" for head in heads]
    names = [head.removeprefix(">") for head in heads]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in [names, bar, *rows])

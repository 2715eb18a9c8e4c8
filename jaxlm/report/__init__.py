"""The report of a run, or of several compared: one HTML file that shows everything its folder knows."""

import os
from collections.abc import Callable, Sequence
from pathlib import Path

from jaxlm.errors import UserError
from jaxlm.report.page import page
from jaxlm.report.runs import read_runs

FILE = "report.html"
# What a folder of files that people, crashes and older versions have written can make the report stumble over.
STUMBLES = (ArithmeticError, AttributeError, LookupError, OSError, TypeError, ValueError)


def write_report(folders: Sequence[Path], out: Path) -> None:
    """Writes the report of the runs in `folders` to `out`, whole or not at all.

    Raises:
      UserError: a folder holds no run or no rows, or `out` can't be written.
    """
    html = page(read_runs(folders))
    part = out.with_name(f".{out.name}.{os.getpid()}")
    try:
        part.write_text(html, encoding="utf-8")
        part.replace(out)
    except OSError as error:
        raise UserError(f"{out}: cannot be written ({error.strerror}); name another file with --out") from error


def write_report_of_run(folder: Path, say: Callable[[str], None]) -> None:
    """Writes report.html into a run's folder; what goes wrong is said, and costs the report only."""
    if not (folder / "metrics.jsonl").is_file() or not (folder / "metrics.jsonl").stat().st_size:
        return  # it ended before its first row
    try:
        write_report([folder], folder / FILE)
        say(f"report: {folder / FILE}")
    except UserError as error:
        say(f"no report: {error}")
    except STUMBLES as error:
        say(f"no report: {type(error).__name__}: {error}; please report this; the run is not affected")

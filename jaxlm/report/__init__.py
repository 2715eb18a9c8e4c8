"""The report of a run, or of several compared: one HTML file that shows everything its folder knows."""

from collections.abc import Callable, Sequence
from html import escape
from pathlib import Path

from jinja2 import TemplateError

from jaxlm.data.atomic import atomic_write
from jaxlm.errors import UserError, one_line
from jaxlm.report.page import page
from jaxlm.report.runs import read_run, read_runs

FILE = "report.html"


def write_report(folders: Sequence[Path], out: Path) -> None:
    """Writes the report of the runs in `folders` to `out`, whole or not at all.

    Raises:
      UserError: a folder holds no run or no rows, a file in it is not as jaxlm writes it, or `out` can't be written.
    """
    try:
        html = page(read_runs(folders))
    except (OSError, ArithmeticError, AttributeError, LookupError, TypeError, ValueError, TemplateError) as error:
        where, what = ", ".join(map(str, folders)), f"{type(error).__name__}: {one_line(error)}"
        raise UserError(f"{where}: a file there is not as jaxlm writes it, please report this ({what})") from error
    try:
        atomic_write(out, html)
    except OSError as error:
        raise UserError(f"{out}: cannot be written ({error.strerror}); name another file with --out") from error


def frame(folder: Path) -> str:
    """The report of the run in `folder` as HTML to stand in a notebook. Raises UserError as `write_report`."""
    return f'<iframe srcdoc="{escape(page([read_run(folder)]))}" style="width:100%;height:600px;border:0"></iframe>'


def write_report_of_run(folder: Path, say: Callable[[str], None]) -> None:
    """Writes report.html into a run's folder. A failure is told through `say`, and never ends the run."""
    if not (folder / "metrics.jsonl").is_file() or not (folder / "metrics.jsonl").stat().st_size:
        return  # it ended before its first row
    try:
        write_report([folder], folder / FILE)
        say(f"report: {folder / FILE}")
    except UserError as error:
        say(f"no report: {error}; the run is not affected")

"""Writes one HTML file that shows a run, or several compared, and prints its path."""

import argparse
from pathlib import Path

from jaxlm.commands.parser import Parser, path


def add_options(parser: Parser) -> None:
    parser.add_argument("runs", nargs="+", type=path, metavar="RUN", help="a run's folder, or a folder of runs")
    parser.add_argument(
        "--out", type=path, metavar="FILE", help="default: report.html, in the run's folder, or here for several runs"
    )


def run(arguments: argparse.Namespace) -> None:
    from jaxlm.report import FILE, write_report

    folders: list[Path] = arguments.runs
    out = arguments.out or (folders[0] / FILE if len(folders) == 1 else Path(FILE))
    write_report(folders, out)
    print(out)

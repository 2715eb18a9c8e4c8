"""The program `jaxlm COMMAND ...`, which is `python -m jaxlm` too; scripts/COMMAND.py do the same."""

import os
import sys
from functools import partial
from typing import Any, NoReturn

from jaxlm import __version__
from jaxlm.commands import cli, completion, estimate_memory, evaluate, export, generate, report, train

COMMANDS: dict[str, Any] = {
    "train": train,
    "evaluate": evaluate,
    "generate": generate,
    "export": export,
    "report": report,
    "estimate_memory": estimate_memory,
    "completion": completion,
}


def main(name: str | None = None) -> NoReturn:
    """Runs the command called `name`, or the one that the command line names first, and ends the process."""
    if name is None and "_ARGCOMPLETE" in os.environ:  # the shell asks what may come next
        import argcomplete

        argcomplete.autocomplete(program(), always_complete_options="long")
    cli.main(partial(_dispatch, name, sys.argv[1:]))


def _dispatch(name: str | None, arguments: list[str]) -> None:
    if name is not None:
        run(name, arguments)
        return
    word = arguments[0] if arguments else "--help"
    name = word.replace("-", "_")
    if name in COMMANDS:
        run(name, arguments[1:], prog=f"jaxlm {word}")
    elif word.startswith("-"):
        program().parse_args([word])
    else:
        raise cli.UserError(f"{word}: unknown command{cli.nearest(name, COMMANDS)}; jaxlm --help lists all")


def run(name: str, arguments: list[str], prog: str | None = None) -> None:
    """Runs a command in this process; raises what `cli.main` turns into an exit code."""
    parser = cli.Parser(COMMANDS[name].__doc__, prog)
    COMMANDS[name].add_options(parser)
    COMMANDS[name].run(parser.parse_args(arguments))


def program() -> cli.Parser:
    """The parser of the whole command line."""
    parser = cli.Parser("Trains language models in JAX: from raw text to a trained Transformer.", prog="jaxlm")
    parser.add_argument("--version", action="version", version=f"jaxlm {__version__}")
    commands = parser.add_subparsers(metavar="COMMAND", title="commands", description="jaxlm COMMAND --help says more")
    for name, command in COMMANDS.items():
        first_sentence = command.__doc__.partition(". ")[0].rstrip(".")
        command.add_options(commands.add_parser(name, help=first_sentence, description=command.__doc__))
    return parser


if __name__ == "__main__":
    main()

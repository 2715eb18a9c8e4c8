"""The program `jaxlm COMMAND ...`, which is `python -m jaxlm` too; scripts/COMMAND.py do the same."""

import os
import sys
from types import ModuleType
from typing import NoReturn

from jaxlm import __version__
from jaxlm.commands import (
    chat,
    completion,
    doctor,
    estimate_memory,
    evaluate,
    export,
    generate,
    inspect,
    plan,
    report,
    resume,
    sweep,
    train,
)
from jaxlm.commands.exits import run_and_exit
from jaxlm.commands.parser import Parser
from jaxlm.config import nearest
from jaxlm.errors import UserError

COMMANDS = {
    module.__name__.rpartition(".")[2]: module
    for module in (
        train,
        resume,
        sweep,
        evaluate,
        generate,
        chat,
        export,
        inspect,
        report,
        plan,
        estimate_memory,
        doctor,
        completion,
    )
}


def main(name: str | None = None) -> NoReturn:
    """Runs the command called `name`, or the one that the command line names first, and ends the process."""
    if name is None and "_ARGCOMPLETE" in os.environ:  # the shell asks what may come next
        import argcomplete

        argcomplete.autocomplete(program(), always_complete_options="long")
    run_and_exit(lambda: run(name, sys.argv[1:]) if name else run_named(sys.argv[1:] or ["--help"]))


def run_named(arguments: list[str]) -> None:
    """Runs the command that the first argument names, or acts on an option of the program itself."""
    name = arguments[0].replace("-", "_")
    if name == "help":
        arguments = [*arguments[1:2], "--help"]
        name = arguments[0].replace("-", "_")
    elif name == "version":
        arguments = ["--version"]
    if name in COMMANDS:
        run(name, arguments[1:], prog=f"jaxlm {arguments[0]}")
    elif arguments[0].startswith("-"):
        program().parse_args(arguments[:1])
    else:
        raise UserError(f"{arguments[0]}: unknown command{nearest(name, COMMANDS)}; jaxlm --help lists all")


def run(name: str, arguments: list[str], prog: str | None = None) -> None:
    """Runs a command in this process; raises what `run_and_exit` turns into an exit code."""
    command: ModuleType = COMMANDS[name]
    parser = Parser(command.__doc__ or "", prog=prog)
    command.add_options(parser)
    command.run(parser.parse_args(arguments))


def program() -> Parser:
    """The parser of the whole command line."""
    parser = Parser("Trains language models in JAX: from raw text to a trained Transformer.", prog="jaxlm")
    parser.add_argument("--version", action="version", version=f"jaxlm {__version__}")
    commands = parser.add_subparsers(metavar="COMMAND", title="commands", description="jaxlm COMMAND --help says more")
    for name, command in COMMANDS.items():
        description = command.__doc__ or ""
        first_sentence = description.partition(". ")[0].rstrip(".")
        command.add_options(commands.add_parser(name, help=first_sentence, description=description))
    return parser


if __name__ == "__main__":
    main()

"""Prints what makes a shell complete commands, options and their values: eval "$(jaxlm completion bash)"."""

import argparse

from jaxlm.commands.parser import Parser

SHELLS = {  # shell: how it is switched on for good
    "bash": "echo 'eval \"$(jaxlm completion bash)\"' >> ~/.bashrc",
    "zsh": "echo 'eval \"$(jaxlm completion zsh)\"' >> ~/.zshrc",
    "fish": "jaxlm completion fish > ~/.config/fish/completions/jaxlm.fish",
}


def add_options(parser: Parser) -> None:
    parser.add_argument(
        "shell",
        choices=SHELLS,
        metavar="|".join(SHELLS),
        help="; ".join(f"{shell}: {line}" for shell, line in SHELLS.items()),
    )


def run(arguments: argparse.Namespace) -> None:
    import argcomplete

    print(argcomplete.shellcode(["jaxlm"], False, arguments.shell))

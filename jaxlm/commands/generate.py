"""Prints what a saved model makes of prompts: text on standard output, all else on standard error."""

import argparse
import os
import sys

from jaxlm.commands.parser import Parser, add_field, add_model_folder, convert
from jaxlm.config import DataConfig
from jaxlm.errors import UserError
from jaxlm.generation.options import FIELDS, make_options
from jaxlm.generation.text import read_prompts


def add_options(parser: Parser) -> None:
    add_model_folder(parser)
    parser.add_argument(
        "--prompt",
        action="append",
        metavar="TEXT",
        help="text to continue; may be repeated (default: none, a new text)",
    )
    parser.add_argument(
        "--prompts_file", metavar="FILE", help='a prompt a line; .jsonl: {"text": PROMPT} a line; -: standard input'
    )
    parser.add_argument("--interactive", action="store_true", help="continue the lines that are typed, one by one")
    parser.add_argument(
        "--stream", metavar="VALUE", default="auto", help="show a text as it comes: true, false or auto (on a terminal)"
    )
    parser.add_argument(
        "--json", action="store_true", help="a JSON object a text: prompt, text, tokens, finish_reason, logprob"
    )
    for name, field in FIELDS.items():
        if name == "stop":
            text = f"{field.metadata['help']} (text; default: none)"
            parser.add_argument("--stop", action="append", metavar="TEXT", default=argparse.SUPPRESS, help=text)
        else:
            add_field(parser, name, field)


def run(arguments: argparse.Namespace) -> None:
    given = {name: value for name, value in vars(arguments).items() if name in FIELDS}
    texts = {name: text for name, text in given.items() if name != "stop"}  # which is a list, as it may be repeated
    options = make_options(**given | {name: convert(f"--{name}", x, FIELDS[name].type) for name, x in texts.items()})
    stream = None if arguments.stream == "auto" else convert("--stream", arguments.stream, bool)
    if arguments.interactive and (arguments.prompt or arguments.prompts_file or arguments.json or stream is False):
        raise UserError("--interactive takes no --prompt, --prompts_file, --json or --stream false; leave them out")
    for prompt in filter(os.path.isfile, arguments.prompt or []):
        print(f"--prompt ({prompt}): is taken as text, though a file; --prompts_file reads files", file=sys.stderr)
    prompts = [] if arguments.interactive else read_prompts(arguments.prompt or [], arguments.prompts_file)

    from jaxlm.commands.console import converse, show_texts
    from jaxlm.data.tokens import cache_root
    from jaxlm.ops.compiler import keep_programs
    from jaxlm.parallel.devices import find_devices
    from jaxlm.run.load import load

    find_devices()
    loaded = load(arguments.model)
    keep_programs(cache_root(DataConfig()) / "compiled")
    if arguments.interactive:
        converse(loaded, options)
    else:
        show_texts(loaded, prompts, options, stream=stream, as_json=arguments.json)

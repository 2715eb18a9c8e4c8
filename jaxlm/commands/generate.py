"""Prints what a saved model makes of prompts: text on standard output, all else on standard error."""

import argparse

from jaxlm.commands import cli
from jaxlm.generation import options as generation_options
from jaxlm.generation.prompts import read_prompts


def add_options(parser: cli.Parser) -> None:
    cli.add_model_folder(parser)
    parser.add_argument(
        "--prompt",
        action="append",
        metavar="TEXT",
        help="text to go on from; may be repeated (default: none, a new text)",
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
    generation_options.add_options(parser)


def run(arguments: argparse.Namespace) -> None:
    options = generation_options.options_from(arguments)
    stream = None if arguments.stream == "auto" else cli.convert("--stream", arguments.stream, bool)
    if arguments.interactive and (arguments.prompt or arguments.prompts_file or arguments.json or stream is False):
        raise cli.UserError("--interactive takes no --prompt, --prompts_file, --json or --stream false; leave them out")
    prompts = [] if arguments.interactive else read_prompts(arguments.prompt or [], arguments.prompts_file)

    from jaxlm.commands.console import converse, open_model, show_texts

    loaded = open_model(arguments.model)
    if arguments.interactive:
        converse(loaded, options)
    else:
        show_texts(loaded, prompts, options, stream=stream, as_json=arguments.json)

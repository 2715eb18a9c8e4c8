"""Talks with a saved model, by its chat template: answers on standard output, all else on standard error."""

import argparse
import dataclasses

from jaxlm.commands.parser import Parser, add_field, add_model_folder, convert
from jaxlm.config import DataConfig
from jaxlm.generation.options import FIELDS, make_options

OPTIONS = [name for name in FIELDS if name not in ("num_samples", "num_beams", "length_penalty", "batch_size", "stop")]


def add_options(parser: Parser) -> None:
    add_model_folder(parser)
    parser.add_argument("--system", metavar="TEXT", help="what the model is told before the conversation")
    parser.add_argument(
        "--chat_template", metavar="FILE", help="a file of Jinja, or plain (default: the model's own template)"
    )
    for name in OPTIONS:
        add_field(parser, name, FIELDS[name])


def run(arguments: argparse.Namespace) -> None:
    given = {name: text for name, text in vars(arguments).items() if name in OPTIONS}
    options = make_options(**{name: convert(f"--{name}", x, FIELDS[name].type) for name, x in given.items()})

    from jaxlm.commands.console import Chat, converse
    from jaxlm.data.chat_tokens import chat_template, with_template
    from jaxlm.data.tokens import cache_root
    from jaxlm.ops.compiler import keep_programs
    from jaxlm.parallel.devices import find_devices
    from jaxlm.run.load import load

    find_devices()
    loaded = load(arguments.model)
    template = chat_template(DataConfig(chat_template=arguments.chat_template), loaded.tokenizer)
    loaded = dataclasses.replace(loaded, tokenizer=with_template(loaded.tokenizer, template))
    keep_programs(cache_root(DataConfig()) / "compiled")
    converse(loaded, options, Chat(arguments.system))

"""Prints a saved model's loss on its run's held-out text or on another, as a JSON object on stdout's last line."""

import argparse
import json
import os

from jaxlm.commands.parser import Parser, add_config_options, add_model_folder, overrides
from jaxlm.data.files import find_files
from jaxlm.errors import UserError


def add_options(parser: Parser) -> None:
    add_model_folder(parser)
    parser.add_argument(
        "--files",
        nargs="+",
        action="extend",
        metavar="PATTERN",
        help="evaluate on all of these files (as data.validation_files)",
    )
    parser.add_argument("--batch_size", type=int, metavar="N", help="rows evaluated at once (default: the training's)")
    add_config_options(parser, ["data"])


def run(arguments: argparse.Namespace) -> None:
    given = overrides(arguments)
    if arguments.files and "data.validation_files" in given:
        raise UserError("--files and --data.validation_files both name the text; leave one out")
    find_files([path for path in arguments.files or () if not os.path.isdir(os.path.expanduser(path))], "--files")

    from jaxlm.monitor.sinks import finite
    from jaxlm.parallel.devices import find_devices
    from jaxlm.run.evaluate import evaluate

    find_devices()
    data = {name.removeprefix("data."): value for name, value in given.items()}
    found = evaluate(arguments.model, arguments.files or (), batch_size=arguments.batch_size, **data)
    print(json.dumps({name: finite(value) if isinstance(value, float) else value for name, value in found.items()}))

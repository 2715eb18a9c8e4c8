"""Prints a saved model's loss on its run's held-out text or on another, as a JSON object on stdout's last line."""

import argparse
import json
import sys

from jaxlm.commands.parser import Parser, add_config_options, add_model_folder, overrides
from jaxlm.errors import UserError


def add_options(parser: Parser) -> None:
    add_model_folder(parser)
    parser.add_argument(
        "--files", nargs="+", metavar="PATTERN", help="evaluate on all of these files (as data.validation_files)"
    )
    parser.add_argument("--batch_size", type=int, metavar="N", help="rows evaluated at once (default: the training's)")
    add_config_options(parser, ["data"])


def run(arguments: argparse.Namespace) -> None:
    given = overrides(arguments)
    if arguments.files and "data.validation_files" in given:
        raise UserError("--files and --data.validation_files both name the text; leave one out")
    if arguments.files:
        given["data.validation_files"] = tuple(arguments.files)
    if arguments.batch_size is not None and arguments.batch_size < 1:
        raise UserError(f"--batch_size ({arguments.batch_size}) must be at least 1")

    from jaxlm.parallel.devices import find_devices
    from jaxlm.run.evaluate import TEXT, evaluate_model, text_to_evaluate
    from jaxlm.run.load import load

    find_devices()
    loaded = load(arguments.model)
    if loaded.progress is None and not given.keys() & set(TEXT):
        raise UserError(f"--model ({arguments.model}): no run of jaxlm's, so it has no held-out text; give --files")
    data = text_to_evaluate(loaded.config, given)
    batch_size = arguments.batch_size or loaded.config.training.batch_size
    result = evaluate_model(loaded, data, batch_size, lambda line: print(line, file=sys.stderr))
    print(json.dumps(result))

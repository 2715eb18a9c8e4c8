"""Prints a saved model's loss on the validation text, as a JSON object on stdout's last line."""

import argparse
import dataclasses
import json
import sys

from jaxlm.commands.parser import Parser, add_config_options, add_model_folder, overrides
from jaxlm.config import replace_fields
from jaxlm.errors import UserError


def add_options(parser: Parser) -> None:
    add_model_folder(parser)
    parser.add_argument("--batch_size", type=int, metavar="N", help="rows evaluated at once (default: the training's)")
    add_config_options(parser, ["data"])


def run(arguments: argparse.Namespace) -> None:
    changes = overrides(arguments)
    if arguments.batch_size is not None and arguments.batch_size < 1:
        raise UserError(f"--batch_size ({arguments.batch_size}) must be at least 1")

    from jaxlm.parallel.devices import find_devices
    from jaxlm.run.evaluate import evaluate_model
    from jaxlm.run.load import load

    find_devices()
    loaded = load(arguments.model)
    if loaded.progress is None and not changes:
        raise UserError(f"--model ({arguments.model}): no run of jaxlm's, so it has no held-out text; name one")
    data = replace_fields(loaded.config, changes).data
    if "data.validation_files" in changes and "data.train_files" not in changes:
        data = dataclasses.replace(data, train_files=data.validation_files)  # evaluating needs no training text
    batch_size = arguments.batch_size or loaded.config.training.batch_size
    result = evaluate_model(loaded, data, batch_size, lambda line: print(line, file=sys.stderr))
    print(json.dumps(result))

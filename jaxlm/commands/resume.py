"""Goes on with a run as the config.json in its folder says; options change what may change on the way."""

import argparse
import os
from pathlib import Path

from jaxlm.commands.parser import Parser, add_config_options, overrides
from jaxlm.commands.train import add_start_options, start
from jaxlm.config import load_config, replace_fields
from jaxlm.errors import UserError


def add_options(parser: Parser) -> None:
    parser.add_argument("run", metavar="RUN", help="a run's folder (training.checkpoint_dir)")
    add_start_options(parser)
    add_config_options(parser)


def run(arguments: argparse.Namespace) -> None:
    folder = Path(arguments.run).expanduser()
    if not os.path.isfile(folder / "config.json"):
        run = folder.parent if os.path.isfile(folder.parent / "config.json") else "a run's training.checkpoint_dir"
        raise UserError(f"{folder}: no run's folder, it has no config.json; name {run}")
    config = load_config(str(folder / "config.json"))
    # Where and how an earlier start went on is none of this one's business.
    here = {"checkpoint_dir": arguments.run, "resume_from_checkpoint": None, "stop_at_step": None, "allow_change": ()}
    config = replace_fields(config, {f"training.{name}": value for name, value in here.items()})
    given = overrides(arguments)
    if (other := given.get("training.checkpoint_dir", arguments.run)) != arguments.run:
        raise UserError(f"--training.checkpoint_dir ({other}): a run goes on in its folder, {folder}; leave it out")
    start(replace_fields(config, given), arguments)

"""Trains a language model. The same command again goes on where an unfinished run stopped."""

import argparse
from typing import TYPE_CHECKING

from jaxlm.commands.parser import Parser, add_config_file, add_config_options, config_from, convert
from jaxlm.config import Config, replace_fields
from jaxlm.data.files import check_names

if TYPE_CHECKING:
    import jax


def add_options(parser: Parser) -> None:
    add_config_file(parser)
    parser.add_argument("--fresh", action="store_true", help="start over; the old folder is moved aside, not deleted")
    add_start_options(parser)
    add_config_options(parser)


def add_start_options(parser: Parser) -> None:
    """Adds what says how a run starts or goes on."""
    parser.add_argument("--resume_from_checkpoint", metavar="PATH", help="checkpoint folder to start from, or latest")
    text = "fields that you decide to change in the middle of the run (training.allow_change), such as "
    parser.add_argument("--allow_change", metavar="FIELD,...", help=text + "training.learning_rate")
    text = "check everything, compile, make one update, write nothing but the caches, and say how it went"
    parser.add_argument("--dry_run", action="store_true", help=text)
    several = parser.add_argument_group(
        "several processes",
        "one a host; give all three, to each process; not needed with SLURM's srun, Open MPI 4, or Kubernetes jobs "
        "(needs the kubernetes package)",
    )
    several.add_argument("--coordinator_address", metavar="HOST:PORT", help="a free port of process 0's host")
    several.add_argument("--num_processes", type=int, metavar="N", help="how many there are")
    several.add_argument("--process_id", type=int, metavar="I", help="which one this is, from 0")


def run(arguments: argparse.Namespace) -> None:
    start(config_from(arguments), arguments, arguments.fresh)


def start(config: Config, arguments: argparse.Namespace, fresh: bool = False) -> None:
    """Trains as `config` and the options of `add_start_options` say."""
    if arguments.resume_from_checkpoint is not None:
        config = replace_fields(config, {"training.resume_from_checkpoint": arguments.resume_from_checkpoint})
    if arguments.allow_change is not None:
        allowed = convert("--allow_change", arguments.allow_change, tuple[str, ...])
        config = replace_fields(config, {"training.allow_change": allowed})

    def devices(config: Config) -> list["jax.Device"]:
        if arguments.num_processes is None:  # else the other processes would wait for this one
            check_names(config.data)  # before JAX is imported, so that a mistake shows at once
        from jaxlm.parallel.devices import start_backend
        from jaxlm.parallel.processes import start

        start(arguments.coordinator_address, arguments.num_processes, arguments.process_id)
        return start_backend(config.training)

    from jaxlm.run.setup import resolve

    resolved = resolve(config, devices, fresh)

    if arguments.dry_run:
        from jaxlm.commands.dry_run import DryRun

        DryRun(resolved, fresh=fresh).train()
    else:
        from jaxlm.trainer import Trainer

        Trainer(resolved, fresh=fresh).train()

"""Prints the memory that each device needs for training, part by part; runs on any machine."""

import argparse
import dataclasses
import functools
import json
import os
from typing import Any

from jaxlm.commands.parser import Parser, add_config_file, add_config_options, config_from, parse_size, set_completer
from jaxlm.errors import UserError
from jaxlm.parallel import gpus


def add_options(parser: Parser) -> None:
    add_config_file(parser)
    parser.add_argument(
        "--devices", type=int, metavar="N", help="devices of all hosts together (default: training.world_size, or 1)"
    )
    parser.add_argument("--zero_stage", metavar="S", help="short for --training.zero_stage")
    gpu = parser.add_argument("--gpu", metavar="NAME", help=f"a GPU, to say what fits it: {', '.join(gpus.GPUS)}")
    set_completer(gpu, lambda _: gpus.GPUS)
    parser.add_argument(
        "--memory",
        metavar="SIZE",
        help="memory of a device instead of --gpu, such as 80GB: G, GB, M and MB are powers of ten, GiB and MiB of two",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object, in bytes, instead of the table")
    add_config_options(parser)


def run(arguments: argparse.Namespace) -> None:
    if arguments.gpu is not None and arguments.memory is not None:
        raise UserError(f"--memory ({arguments.memory}) and --gpu ({arguments.gpu}) say the same; give one")
    short, dotted = arguments.zero_stage, "training.zero_stage"
    if short is not None and vars(arguments).setdefault(dotted, short) != short:
        raise UserError(f"--zero_stage ({short}) and --{dotted} ({vars(arguments)[dotted]}) differ; give one")
    config = config_from(arguments)
    size = None if arguments.gpu is None else gpus.memory_of(arguments.gpu)
    if arguments.memory is not None:
        size = parse_size("--memory", arguments.memory, low=2**20)
    devices = arguments.devices if arguments.devices is not None else config.training.world_size or 1
    os.environ["JAX_PLATFORMS"] = "cpu"  # nothing is computed on the GPUs that may be here

    from jaxlm.plan import memory, show
    from jaxlm.plan.targets import TARGETS, plugin, usual_hosts

    gpu = (arguments.gpu or "H100").strip().upper()
    try:
        plugin()
    except UserError as error:
        why: str | None = str(error)
    else:
        why = None if gpu in TARGETS else f"a program can't be compiled for {gpu}"
    if why is None:
        takes = functools.partial(memory.compiled_memory, gpu=gpu, devices=devices, hosts=usual_hosts(devices))
    else:
        takes = functools.partial(memory.estimate, n_devices=devices)
    found = takes(config)
    result: dict[str, Any] = {
        "devices": devices,
        **dataclasses.asdict(found),
        "total": found.total,
        "compiled": not why,
    }
    lines = [f"{devices} device{'s' * (devices > 1)}, each:", *show.memory(found)]
    if size is not None:
        usable = memory.usable(size, config.training.memory_fraction)
        most = memory.largest_batch_size(config, usable, lambda larger: takes(larger).total)
        result |= {"memory": size, "usable": usable, "fits": found.total <= usable, "largest_batch_size": most}
        lines += [
            f"{'fits' if result['fits'] else 'does not fit'} into {show.size(usable)}, {usable / size:.0%} of the "
            "device's memory, which JAX takes (training.memory_fraction)",
            f"largest training.batch_size: {most or 'none, not even 1'}",
        ]
    lines.append(f"method: compiled for {gpu} (docs/plan.md)" if why is None else f"{memory.APPROXIMATION}; {why}")
    print(json.dumps(result) if arguments.json else "\n".join(lines))

"""Says what a run will take on GPUs that are not here. Compiles its update for them, without a GPU, and prints memory,
predicted time, where the time goes, and what to change."""

import argparse
import json
import os

from jaxlm.commands.parser import Parser, add_config_file, add_config_options, config_from, path, set_completer
from jaxlm.config import shown
from jaxlm.errors import UserError


def add_options(parser: Parser) -> None:
    add_config_file(parser)
    text = "A100-40GB or -80GB, H100, H100 PCIe, H200, B200, L4, L40S, RTX 3090 or RTX 4090 (default: H100)"
    gpu = parser.add_argument("--gpu", metavar="NAME", default="H100", help=text)
    set_completer(gpu, lambda _: ("A100-80GB", "H100", "H200", "B200", "L4", "L40S", "RTX 4090"))
    text = "GPUs of all hosts together (default: training.world_size, or 1)"
    parser.add_argument("--devices", type=int, metavar="N", help=text)
    parser.add_argument("--hosts", type=int, metavar="H", help="(default: one for each 8 GPUs)")
    text = "try batch sizes, ZeRO stages and recomputation at the same global batch, and print the best ten"
    parser.add_argument("--search", action="store_true", help=text)
    text = "programs that --search compiles at most (default: 16)"
    parser.add_argument("--trials", type=int, default=16, metavar="N", help=text)
    text = "write the best configuration that --search finds to FILE, as JSON"
    parser.add_argument("--write", type=path, metavar="FILE", help=text)
    parser.add_argument("--price_per_gpu_hour", type=float, metavar="PRICE", help="to say what the run costs")
    text = "list the kernels that take longest, with their lines in the source"
    parser.add_argument("--per_kernel", action="store_true", help=text)
    text = "write the compiled program into DIR, for training.compiled_program"
    parser.add_argument("--save", type=path, metavar="DIR", help=text)
    text = "choose products as a GPU of this kind has found best: autotuning.txt of a run, see training.keep_autotuning"
    parser.add_argument("--autotuning", type=path, metavar="FILE", help=text)
    parser.add_argument("--hlo", type=path, metavar="FILE", help="write the optimized program's text to FILE")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of the tables")
    add_config_options(parser)


def run(arguments: argparse.Namespace) -> None:
    config = config_from(arguments)
    devices = arguments.devices if arguments.devices is not None else config.training.world_size or 1
    if arguments.trials < 1:
        raise UserError(f"--trials ({arguments.trials}) must be at least 1")
    for name in ("save", "hlo", "autotuning"):
        if arguments.search and vars(arguments)[name] is not None:
            raise UserError(f"--{name} is of one program, and --search makes several: leave it out")
    if arguments.save is not None and (schedule := config.training.batch_schedule):
        raise UserError(f"--save is of an update of one size: leave training.batch_schedule ({shown(schedule)}) out")
    for name in ("price_per_gpu_hour", "per_kernel"):
        if vars(arguments)[name] and (arguments.search or arguments.json):
            raise UserError(f"--{name} is for the tables of one plan: leave out --search and --json")
    if arguments.write is not None and not arguments.search:
        raise UserError("--write is for --search: give both")
    os.environ["JAX_PLATFORMS"] = "cpu"  # the program is for GPUs that are not here; those that are stay free
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")  # the compiler warns that it has nothing to tune on

    from jaxlm.plan import show
    from jaxlm.plan.plan import plan_of
    from jaxlm.plan.predict import Cluster
    from jaxlm.plan.program import compile_update, resolve_for
    from jaxlm.plan.targets import target_name, usual_hosts

    hosts = arguments.hosts if arguments.hosts is not None else usual_hosts(devices)
    gpu = target_name(arguments.gpu)
    cluster = Cluster(gpu, devices, hosts)
    if arguments.search:
        from jaxlm.plan.search import search, write_config

        found = search(config, cluster, arguments.trials)
        print(json.dumps([trial.to_json() for trial in found]) if arguments.json else show.trials(found))
        if arguments.write is not None:
            write_config(config, found[0], arguments.write)
        return
    resolved = resolve_for(config, gpu, devices, hosts)
    compiled = compile_update(resolved, gpu, hosts, arguments.save, arguments.autotuning)
    if arguments.hlo is not None:
        try:
            arguments.hlo.write_text(compiled.text, encoding="utf-8")
        except OSError as error:
            raise UserError(f"--hlo ({arguments.hlo}) can't be written: {error.strerror}") from error
    made, prediction = plan_of(resolved, compiled, cluster)
    if arguments.json:
        print(json.dumps(made.to_json()))
    else:
        print(show.plan(made, arguments.price_per_gpu_hour))
        if arguments.per_kernel:
            print("\n" + show.slowest(prediction))
    if not made.fits:
        raise UserError(
            f"it needs {show.size(made.memory_bytes)} of each {gpu}, and there are {show.size(made.usable_bytes)}: "
            "jaxlm plan --search looks for settings that fit"
        )

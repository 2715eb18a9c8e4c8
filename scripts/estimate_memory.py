"""Memory a GPU of a run, without one: python scripts/estimate_memory.py --config FILE [--devices N] [--gpu NAME]"""

import dataclasses
import json
from typing import Any

from jaxlm import cli


def estimate_memory() -> None:
    parser = cli.Parser("Prints the memory that each device needs for training, part by part; runs on any machine.")
    parser.add_argument("--config", required=True, metavar="FILE", help="configuration, .py or .json")
    parser.add_argument(
        "--devices", type=int, default=1, metavar="N", help="devices of all hosts together (default: 1)"
    )
    parser.add_argument("--zero_stage", metavar="S", help="short for --training.zero_stage")
    parser.add_argument("--gpu", metavar="NAME", help="a GPU by name, such as A100-80GB, to say what fits it")
    parser.add_argument("--memory", metavar="SIZE", help="memory of a device instead of --gpu: 80GB, 79.6GiB")
    parser.add_argument("--json", action="store_true", help="print one JSON object, in bytes, instead of the table")
    cli.add_config_options(parser)
    arguments = parser.parse_args()
    known = arguments.gpu is not None, arguments.memory is not None
    if all(known):
        raise cli.UserError(f"--memory ({arguments.memory}) and --gpu ({arguments.gpu}) say the same; give one")
    config = cli.config_from(arguments)
    if arguments.zero_stage is not None:
        stage = cli.convert("--zero_stage", arguments.zero_stage, int | None)
        config = cli.replace_fields(config, {"training.zero_stage": stage})

    from jaxlm import memory

    estimate = memory.estimate(config, arguments.devices)
    result: dict[str, Any] = {"devices": arguments.devices, **dataclasses.asdict(estimate), "total": estimate.total}
    result["compiled"] = memory.compiled_on_gpus(config, arguments.devices)
    if any(known):
        size = memory.memory_of(arguments.gpu) if known[0] else memory.parse_memory(arguments.memory)
        result |= {"memory": size, "usable": memory.usable(size), "fits": estimate.total <= memory.usable(size)}
        result["largest_batch_size"] = memory.largest_batch_size(config, arguments.devices, size)
    print(json.dumps(result) if arguments.json else memory.table(result))


if __name__ == "__main__":
    cli.main(estimate_memory)

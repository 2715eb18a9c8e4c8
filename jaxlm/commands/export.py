"""Writes a saved model as a folder that transformers opens, without code of ours; adapters are merged into it."""

import argparse
import sys
from pathlib import Path

from jaxlm.commands.parser import Parser, add_model_folder, parse_size, path
from jaxlm.config.fields import check_choice
from jaxlm.errors import UserError


def add_options(parser: Parser) -> None:
    add_model_folder(parser)
    parser.add_argument("--to", type=path, required=True, metavar="DIR", help="folder to write; a new one, or empty")
    parser.add_argument(
        "--max_shard_size", default="5GB", metavar="SIZE", help="of a file of parameters, such as 500MB (default: 5GB)"
    )
    parser.add_argument(
        "--dtype", default="float32", metavar="TYPE", help="float32, bfloat16 or float16 (default: float32)"
    )
    parser.add_argument("--adapter", action="store_true", help="the adapters alone, as a folder for PEFT")
    parser.add_argument("--repo_id", metavar="NAME", help="name on the Hub, for the model card (default: that of --to)")
    parser.add_argument("--license", metavar="ID", help="of the model card, such as mit (default: the base model's)")
    parser.add_argument("--language", metavar="CODES", help="of the model card: en,de (default: the base model's)")


def run(arguments: argparse.Namespace) -> None:
    source, to = Path(arguments.model), arguments.to

    from jaxlm.interop.export import DTYPES, HUB_NAME, check_target, export, export_adapter
    from jaxlm.parallel.devices import find_devices
    from jaxlm.run.load import load

    max_shard_size = parse_size("--max_shard_size", arguments.max_shard_size)
    check_choice("--dtype", arguments.dtype, DTYPES)
    check_target(to)
    if arguments.repo_id is not None and not HUB_NAME.fullmatch(arguments.repo_id):
        raise UserError(f"--repo_id ({arguments.repo_id}) is no name on the Hub; write OWNER/NAME")
    languages = list(filter(None, (arguments.language or "").split(",")))
    card = {"repo_id": arguments.repo_id or to.name, "license": arguments.license, "language": languages}
    find_devices()
    loaded, options = load(source), {"max_shard_size": max_shard_size, "dtype": arguments.dtype}
    if arguments.adapter:
        defaults = {"dtype": "float32", "max_shard_size": "5GB", "repo_id": None, "license": None, "language": None}
        for name, default in defaults.items():
            if (value := getattr(arguments, name)) != default:
                raise UserError(f"--{name} ({value}) has no use beside --adapter; leave it out")
        export_adapter(loaded, loaded.folder or source, to)
        print(f"{to}: written for PEFT", file=sys.stderr)
        return
    kind = export(loaded, loaded.folder or source, to, **options, **card)
    print(f"{to}: written for transformers as {kind}", file=sys.stderr)

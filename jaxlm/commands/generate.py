"""Prints continuations of a prompt by a saved model."""

import argparse
import sys

from jaxlm import cli


def add_options(parser: cli.Parser) -> None:
    cli.add_model_folder(parser)
    parser.add_argument(
        "--prompt", default="", metavar="TEXT", help="text to go on from (default: the start of a document)"
    )
    parser.add_argument("--max_new_tokens", type=int, default=128, metavar="N", help="default: 128")
    parser.add_argument("--temperature", type=float, default=0.8, metavar="X", help="0: greedy (default: 0.8)")
    parser.add_argument(
        "--top_k", type=int, default=0, metavar="K", help="sample among the K likeliest; 0: all (default)"
    )
    parser.add_argument(
        "--top_p",
        type=float,
        default=1.0,
        metavar="P",
        help="... among the likeliest of joint probability P (default: 1)",
    )
    parser.add_argument("--num_samples", type=int, default=1, metavar="N", help="default: 1")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="equal seeds give equal samples (default: 0)")


def run(arguments: argparse.Namespace) -> None:
    options = dict(vars(arguments))
    folder, prompt = options.pop("model"), options.pop("prompt")

    from jaxlm.checkpoint import load
    from jaxlm.distributed import find_devices
    from jaxlm.generate import check_sampling, generate_text

    check_sampling(**options)
    find_devices()
    loaded = load(folder)
    for number, text in enumerate(generate_text(loaded.model, loaded.tokenizer, prompt, **options)):
        if number:
            print("-" * 40, file=sys.stdout)
        print(text)

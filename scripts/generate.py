"""Text from a saved model: python scripts/generate.py --model DIR --prompt TEXT"""

import sys

from jaxlm import cli


def generate() -> None:
    parser = cli.Parser("Prints continuations of a prompt by a saved model.")
    parser.add_argument("--model", required=True, metavar="DIR", help="best_model, final_model or a checkpoint")
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
    arguments = vars(parser.parse_args())
    folder, prompt = arguments.pop("model"), arguments.pop("prompt")

    from jaxlm.checkpoint import load
    from jaxlm.distributed import find_devices
    from jaxlm.generate import check_sampling, generate_text

    check_sampling(**arguments)
    find_devices()
    loaded = load(folder)
    for number, text in enumerate(generate_text(loaded.model, loaded.tokenizer, prompt, **arguments)):
        if number:
            print("-" * 40, file=sys.stdout)
        print(text)


if __name__ == "__main__":
    cli.main(generate)

"""Conversations to tune a model on, made up: python examples/sums.py --to sums.jsonl

Each is a sum of two numbers, and sometimes a second one that goes on from it.
"""

import argparse
import json
import random
from collections.abc import Iterator
from pathlib import Path


def conversations(count: int, largest: int) -> Iterator[list[dict[str, str]]]:
    numbers = random.Random(0)
    for _ in range(count):
        a, b, c = (numbers.randint(0, largest) for _ in range(3))
        turns = [(f"What is {a} + {b}?", f"It is {a + b}.")]
        if numbers.random() < 0.3:
            turns.append((f"And {c} more?", f"Then it is {a + b + c}."))
        yield [
            {"role": role, "content": text}
            for turn in turns
            for role, text in zip(("user", "assistant"), turn, strict=True)
        ]


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--to", type=Path, default=Path("sums.jsonl"), help="file to write (default: sums.jsonl)")
    parser.add_argument("--count", type=int, default=4000, help="conversations (default: 4000)")
    parser.add_argument("--largest", type=int, default=9, help="number in a question (default: 9)")
    options = parser.parse_args(arguments)
    rows = (json.dumps({"messages": turns}) + "\n" for turns in conversations(options.count, options.largest))
    options.to.write_text("".join(rows), encoding="utf-8")


if __name__ == "__main__":
    main()

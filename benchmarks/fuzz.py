"""Feeds damaged configurations, command lines, DeepSpeed files and text to the code that loads them.

    python benchmarks/fuzz.py --inputs 5000 [--seed N] [--seconds N] [--only NUMBER] [--out FOLDER]

Each input must either load or be refused with a UserError that says something; anything else (another exception,
more than SECONDS_EACH, tokens that are not the text) is a defect. Input NUMBER of seed N is the same every time.
Its files are kept under --out where it is a defect, and where it ends this process. Exit code 1: there are defects.
"""

import argparse
import collections
import faulthandler
import os
import random
import resource
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lib.fuzzing import configurations, texts
from lib.fuzzing.damage import Defect

from jaxlm.errors import UserError, printable

OUT = Path(tempfile.gettempdir()) / "jaxlm-fuzz"
SECONDS_EACH = 20
MEMORY = 16 * 2**30  # of addresses: what asks for more is refused, not killed

KINDS: dict[str, Callable[[random.Random, Path], None]] = {
    "JSON configuration": configurations.json_config,
    "Python configuration": configurations.python_config,
    "command line": configurations.command_line,
    "DeepSpeed file": configurations.deepspeed_file,
    "text": texts.text,
}


@contextmanager
def time_limit(seconds: int) -> Iterator[None]:
    def late(*_: Any) -> None:
        raise Defect(f"took more than {seconds} s")

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def outcome(kind: str, rng: random.Random, folder: Path) -> tuple[str, str]:
    """("loaded" or "refused", message), or ("defect", why)."""
    try:
        with time_limit(SECONDS_EACH):
            KINDS[kind](rng, folder)
        return "loaded", ""
    except UserError as error:
        said = printable(error)
        return ("refused", said) if said else ("defect", "a message without words")
    except (KeyboardInterrupt, GeneratorExit):
        raise
    except BaseException:  # whatever else it is, SystemExit and a panic of a library included, is what is looked for
        return "defect", traceback.format_exc()


def run(seed: int, numbers: Iterable[int], out: Path, seconds: float = float("inf")) -> collections.Counter:
    """{(kind, outcome): inputs}; defects are printed and kept under `out`."""
    found: collections.Counter[tuple[str, str]] = collections.Counter()
    end = time.monotonic() + seconds
    for number in numbers:
        if time.monotonic() > end:
            break
        kind = list(KINDS)[number % len(KINDS)]
        folder = out / f"{seed}-{number}"
        shutil.rmtree(folder, ignore_errors=True)  # of an earlier run
        folder.mkdir(parents=True)
        result, why = outcome(kind, random.Random(f"{seed}-{number}"), folder)
        found[kind, result] += 1
        if result == "defect":
            (folder / "defect.txt").write_text(why, errors="backslashreplace")
            print(f"DEFECT: {kind}, --seed {seed} --only {number}, kept in {folder}:\n{why}", flush=True)
        else:
            shutil.rmtree(folder)
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--inputs", type=int, default=5000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--seconds", type=float, default=float("inf"), help="end after so long")
    parser.add_argument("--only", type=int, metavar="NUMBER", help="this input alone")
    parser.add_argument("--out", type=Path, default=OUT, help=f"folder for the files of defects ({OUT})")
    arguments = parser.parse_args()
    faulthandler.enable()
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    numbers = range(arguments.inputs) if arguments.only is None else [arguments.only]
    start = time.monotonic()
    found = run(arguments.seed, numbers, arguments.out, arguments.seconds)
    print(f"{found.total()} inputs, seed {arguments.seed}, {time.monotonic() - start:.0f} s")
    for kind in KINDS:
        counts = {result: found[kind, result] for result in ("loaded", "refused", "defect")}
        print(f"{kind:>22}: " + ", ".join(f"{count} {result}" for result, count in counts.items()))
    if arguments.out.is_dir() and not os.listdir(arguments.out):
        arguments.out.rmdir()
    return int(any(result == "defect" for _, result in found))


if __name__ == "__main__":
    sys.exit(main())

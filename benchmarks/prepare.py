"""Preparation alone: killed again and again, in little memory, shared: python benchmarks/prepare.py [--only PART ...]

kills    `prepare` is killed (SIGKILL) at random moments and started again, until it ends; its files must be those of
         one that nobody disturbed, byte for byte. Rounds follow each other until the kills are done.
memory   `prepare` of a text of `--size` bytes, in a process that may have `--limit` bytes of memory (RLIMIT_DATA)
sharing  `prepare` of a text of `--shared` bytes by one process of one thread, then by as many as there are cores, with
         one cache folder, in turn; their files must be the same, byte for byte
streaming  of that text, the seconds until the first batch is there, without data.streaming and with it, in turn

The text is the standard library, repeated with other names in it, one document a file. README.md, next to this file,
has the method.
"""

import argparse
import contextlib
import json
import random
import resource
import signal
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from lib.machine import cores, own_versions, say
from lib.report import RESULTS, Report
from lib.worker import answer_part, peak_bytes
from lib.workers import in_a_process

KILL_TEXT = 2**24  # bytes
KILL_SHARD = 2**20  # characters: a kill should find some shards whole, and one that is not
SHARED_SHARD = 2**23  # characters: enough shards for each process
LONGEST_WAIT = 6  # seconds from the start of tokenizing to a kill


def write_text(path: Path, size: int) -> None:
    """A .jsonl file of at least `size` bytes."""
    texts = [file.read_text(errors="ignore") for file in sorted(Path(sysconfig.get_path("stdlib")).glob("*/*.py"))]
    with path.open("w", encoding="utf-8") as file:
        for copy in range(10**9):
            for number, text in enumerate(texts):
                changed = text.replace("self", f"self{copy}").replace("name", f"name{number}")
                file.write(json.dumps({"text": changed}) + "\n")
                if file.tell() > size:
                    return


def once(options: dict[str, Any]) -> dict[str, Any]:
    """`prepare`; says on stderr when it begins to tokenize."""
    from jaxlm.config import DataConfig
    from jaxlm.data import shards
    from jaxlm.data.tokens import prepare

    shards.SHARD_CHARACTERS = options["shard"] or shards.SHARD_CHARACTERS
    if options["limit"]:
        resource.setrlimit(resource.RLIMIT_DATA, (options["limit"], options["limit"]))
    data = DataConfig(
        train_files=(options["text"],),
        tokenizer_path=options["tokenizer"],
        cache_dir=options["cache"],
        preprocessing_num_workers=options["threads"],
    )
    start = time.perf_counter()
    made = prepare(data, options["vocab_size"], None, say)
    return {
        "folder": str(made.train.folder),
        "documents": len(made.train) + len(made.validation),
        "tokens": len(made.train.tokens) + len(made.validation.tokens),
        "seconds": time.perf_counter() - start,
        "peak_bytes": peak_bytes(),
    }


def contents(folder: str) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in Path(folder).iterdir()}


def killed(spec: dict[str, Any], wait: float) -> bool:
    """Starts `once`, and kills it `wait` seconds after it began to tokenize; whether it was still at work."""
    command = [sys.executable, __file__, "--part", "once", json.dumps(spec)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, errors="replace")
    while (line := process.stderr.readline()) and not line.startswith("documents:"):
        pass
    try:
        process.wait(wait)
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGKILL)
    process.stderr.close()
    code = process.wait()
    if code not in (0, -signal.SIGKILL):
        raise SystemExit(f"a start ended with {code}")
    return code != 0


def whole_shards(cache: Path) -> int:
    """Those that a killed start has left."""
    return len([*cache.glob("tokens/.*.part/*-*.json")])


def kills(options: dict[str, Any], spec: dict[str, Any], folder: Path) -> list[dict[str, Any]]:
    """Rounds of kills, and what whole shards each kill found."""
    write_text(folder / "text.jsonl", KILL_TEXT)
    spec = spec | {"text": str(folder / "text.jsonl"), "shard": KILL_SHARD, "limit": None}
    undisturbed = in_a_process(__file__, "once", spec | {"cache": str(folder / "undisturbed")}, {})
    expected, rng = contents(undisturbed["folder"]), random.Random(options["seed"])
    found, equal = list[list[int]](), 0
    while sum(map(len, found)) < options["kills"]:
        cache = folder / str(len(found))
        found.append([])
        while sum(map(len, found)) < options["kills"] and killed(
            spec | {"cache": str(cache)}, rng.uniform(0, LONGEST_WAIT)
        ):
            found[-1].append(whole_shards(cache))
            say(f"kill {sum(map(len, found))}: {found[-1][-1]} whole shards")
        ended = in_a_process(__file__, "once", spec | {"cache": str(cache)}, {})
        equal += contents(ended["folder"]) == expected and len(list(Path(ended["folder"]).parent.iterdir())) == 1
        say(f"round {len(found)}: {equal} of {len(found)} byte-equal")
    shards = {"shard_characters": KILL_SHARD, "whole_shards_at_each_kill": found}
    result = {"part": "kills", "kills": sum(map(len, found)), "rounds": len(found), "byte_equal": equal, **shards}
    return [result | {"utf8_bytes": KILL_TEXT, "tokens": undisturbed["tokens"]}]


def memory(options: dict[str, Any], spec: dict[str, Any], folder: Path) -> list[dict[str, Any]]:
    say("writing the text")
    write_text(folder / "text.jsonl", options["size"])
    spec = spec | {"text": str(folder / "text.jsonl"), "shard": None, "cache": str(folder / "cache")}
    made = in_a_process(__file__, "once", spec, {})
    sizes = {"file_bytes": (folder / "text.jsonl").stat().st_size, "limit_bytes": options["limit"]}
    return [{"part": "memory", **sizes} | {name: made[name] for name in made if name != "folder"}]


def sharing(options: dict[str, Any], spec: dict[str, Any], folder: Path) -> list[dict[str, Any]]:
    write_text(folder / "text.jsonl", options["shared"])
    spec = spec | {"text": str(folder / "text.jsonl"), "shard": SHARED_SHARD, "limit": None, "threads": 1}
    seconds, made = dict[int, list[float]](), list[dict[str, bytes]]()
    for repeat in range(options["repeats"]):
        for count in (1, cores()):
            cache = folder / f"{repeat}-{count}"
            command = [sys.executable, __file__, "--part", "once", json.dumps(spec | {"cache": str(cache)})]
            start = time.perf_counter()
            quiet: dict[str, Any] = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
            started = [subprocess.Popen(command, **quiet) for _ in range(count)]
            if any(codes := [process.wait() for process in started]):
                raise SystemExit(f"processes ended with {codes}")
            seconds.setdefault(count, []).append(time.perf_counter() - start)
            (path,) = cache.glob("tokens/*")
            made.append(contents(str(path)))
            say(f"{count} processes: {seconds[count][-1]:.1f} s")
    facts = {"utf8_bytes": options["shared"], "shard_characters": SHARED_SHARD, "threads_of_each": 1}
    equal = {"byte_equal": sum(each == made[0] for each in made), "rounds": len(made)}
    return [{"part": "sharing", "processes": n, "seconds": each, **facts, **equal} for n, each in seconds.items()]


def first_batch(options: dict[str, Any]) -> dict[str, Any]:
    """Seconds from the text and a tokenizer to the first batch of 32 rows."""
    from jaxlm.config import Config, DataConfig, ModelConfig
    from jaxlm.config.batches import Batches
    from jaxlm.data.loader import train_batches
    from jaxlm.run.text import prepare_text

    data = DataConfig(
        train_files=(options["text"],),
        validation_fraction=0,
        tokenizer_path=options["tokenizer"],
        cache_dir=options["cache"],
        preprocessing_num_workers=options["threads"],
        streaming=options["streaming"],
    )
    start = time.perf_counter()
    rows = prepare_text(Config(ModelConfig(), data=data), None).rows
    with contextlib.closing(train_batches(rows, 0, Batches(32), 0)) as batches:
        next(batches)
    return {"seconds": time.perf_counter() - start}


def streaming(options: dict[str, Any], spec: dict[str, Any], folder: Path) -> list[dict[str, Any]]:
    write_text(folder / "text.jsonl", options["shared"])
    seconds = dict[bool, list[float]]()
    for repeat in range(options["repeats"]):
        for how in (False, True):
            job = spec | {
                "text": str(folder / "text.jsonl"),
                "cache": str(folder / f"{repeat}-{how}"),
                "streaming": how,
            }
            seconds.setdefault(how, []).append(in_a_process(__file__, "first_batch", job, {})["seconds"])
    facts = {"utf8_bytes": options["shared"]}
    return [{"part": "streaming", "streaming": how, "seconds": each, **facts} for how, each in seconds.items()]


PARTS: dict[str, Callable[[dict[str, Any], dict[str, Any], Path], list[dict[str, Any]]]] = {
    "kills": kills,
    "memory": memory,
    "sharing": sharing,
    "streaming": streaming,
}


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, usage="%(prog)s [options]"
    )
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS), help="what to do (default: all)")
    parser.add_argument("--kills", type=int, default=20, help="default: 20")
    parser.add_argument("--seed", type=int, default=0, help="of the moments to kill at (default: 0)")
    parser.add_argument("--size", type=int, default=4 * 10**9, help="bytes of the text (default: 4 GB)")
    parser.add_argument("--limit", type=int, default=1_500_000_000, help="bytes of memory (default: 1.5 GB)")
    parser.add_argument("--shared", type=int, default=5 * 10**8, help="bytes of the other text (default: 0.5 GB)")
    parser.add_argument("--repeats", type=int, default=3, help="of both measurements with it (default: 3)")
    parser.add_argument("--threads", type=int, default=cores(), help="default: the cores")
    parser.add_argument("--vocab_size", type=int, default=4096, help="of the tokenizer (default: 4096)")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the JSON file (default: results/)")
    options = vars(parser.parse_args(arguments))
    report = Report(
        "prepare", ["benchmarks/prepare.py", *arguments], options["out"], versions=own_versions("numpy", "tokenizers")
    )
    with tempfile.TemporaryDirectory() as folder:
        spec = {name: options[name] for name in ("threads", "vocab_size", "limit")}
        write_text(Path(folder) / "learned.jsonl", 2**22)
        learned = spec | {"text": str(Path(folder) / "learned.jsonl"), "cache": str(Path(folder) / "learned")}
        in_a_process(__file__, "once", learned | {"tokenizer": None, "shard": None}, {})
        (spec["tokenizer"],) = map(str, (Path(folder) / "learned" / "tokenizers").iterdir())
        for part in options["only"]:
            (Path(folder) / part).mkdir()
            report.content["results"] += PARTS[part](options, spec, Path(folder) / part)
            report.write()
    print(json.dumps(report.content["results"], indent=1))
    report.close()
    if any(result.get("byte_equal") != result.get("rounds") for result in report.content["results"]):
        raise SystemExit("NOT byte-equal")


if __name__ == "__main__":
    if sys.argv[1:2] == ["--part"]:
        answer_part({"once": once, "first_batch": first_batch})
    else:
        main(sys.argv[1:])

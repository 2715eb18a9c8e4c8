"""The data pipeline alone: python benchmarks/data.py [--only PART ...]

tokenizing   `prepare` (read, split, tokenize, write) against the bare tokenizers library, same text, same threads
packing      rows for millions of documents, each strategy: seconds, and memory against the documents' lengths
loading      batches of the small model from the embedded corpus: tokens/s of one process
mixing       the same from a mixture of three sources, random tokens in 10,000, 3,000 and 1,000 rows, at 0.6, 0.3, 0.1
larger       the same from a file of random tokens larger than the memory that the process may have

Each measurement runs in a process of its own. README.md, next to this file, has the method.
"""

import argparse
import contextlib
import resource
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from lib.machine import cores, own_versions, say
from lib.report import RESULTS, Report
from lib.tables import table
from lib.worker import answer_part, forget_peak, peak_bytes, status_bytes
from lib.workers import in_a_process

from jaxlm.config import DataConfig, TrainingConfig
from jaxlm.parallel.devices import start_backend

Result = TypeVar("Result")

SEED = 0
CHUNK = 2**24  # random tokens made at a time
PLANS = 3  # of each strategy of packing


# -------------------------------------------------------------------------------------------- tokenizing


def tokenizing(options: dict[str, Any]) -> list[dict[str, Any]]:
    """The whole pipeline, with the tokenizer there, and the library's `encode_batch_fast` on the same documents."""
    from jaxlm.data.sources import open_source
    from jaxlm.data.tokens import prepare

    start_backend(TrainingConfig())  # as in a run: it says how malloc works
    with tempfile.TemporaryDirectory() as folder:
        data = data_config(options, cache_dir=folder, preprocessing_num_workers=options["threads"])
        tokenizer = prepare(data, options["vocab_size"], None, say).tokenizer  # also the warm-up of the threads
        source = open_source(data)
        texts = [document.text for part in source.parts.values() for document in part()]
        size = sum(len(text.encode()) for text in texts)
        tokenizer.save(Path(folder) / "kept")

        def whole(cache: Path) -> int:
            own = data_config(
                options,
                cache_dir=str(cache),
                tokenizer_path=str(Path(folder) / "kept"),
                preprocessing_num_workers=options["threads"],
            )
            made = prepare(own, options["vocab_size"], None, say)
            return len(made.train.tokens) + len(made.validation.tokens) - 2 * (len(made.train) + len(made.validation))

        seconds: dict[str, list[float]] = {"tokenizers library": [], "jaxlm": []}
        for repeat in range(options["repeats"]):
            bare_tokens, bare_seconds = timed(lambda: bare(tokenizer.to_json(), texts))
            tokens, own_seconds = timed(lambda repeat=repeat: whole(Path(folder) / f"again{repeat}"))
            if tokens != bare_tokens:
                raise SystemExit(f"jaxlm made {tokens} tokens, the tokenizers library {bare_tokens}")
            seconds["tokenizers library"].append(bare_seconds)
            seconds["jaxlm"].append(own_seconds)
    settings = {"threads": options["threads"], "utf8_bytes": size, "documents": len(texts), "tokens": tokens}
    return [{"part": "tokenizing", "what": what, **settings, "seconds": times} for what, times in seconds.items()]


def bare(tokenizer_json: str, texts: list[str]) -> int:
    """Tokenizes as the library's documentation shows, all texts in one call, each as one piece; how many tokens."""
    import tokenizers

    backend = tokenizers.Tokenizer.from_str(tokenizer_json)
    backend.encode_special_tokens = True  # "<bos>" in a text is five characters
    return sum(len(encoding) for encoding in backend.encode_batch_fast(texts, add_special_tokens=False))


def data_config(options: dict[str, Any], **more: Any) -> DataConfig:
    text = options["text"]
    chosen = {"train_files": text} if text else {"dataset_name": "python-stdlib", "dataset_config": None}
    return DataConfig(max_length=options["seq_len"], packing_strategy="first_fit", **chosen, **more)


def timed(act: Callable[[], Result]) -> tuple[Result, float]:
    """What `act` returns, and its seconds."""
    start = time.perf_counter()
    result = act()
    return result, time.perf_counter() - start


# -------------------------------------------------------------------------------------------- packing


def random_lengths(documents: int, mean: int) -> np.ndarray:
    """int64 [documents]: log-normal, as the lengths of web pages are, from 2 tokens on."""
    sigma = 1.0
    drawn = np.random.default_rng(SEED).lognormal(np.log(mean) - sigma**2 / 2, sigma, documents)
    return np.maximum(drawn, 2).astype(np.int64)


def packing(options: dict[str, Any]) -> list[dict[str, Any]]:
    """One strategy, PLANS times; `peak_bytes` is what the first added to the most memory that the process had before.

    The first is what a run waits for, which may be for memory more than for the plan; the others have it already.
    """
    from jaxlm.data.packing import plan

    strategy, max_length = options["strategy"], options["seq_len"]
    plan(np.arange(0, 200, 20), max_length, 2, strategy, True)  # compiles what is compiled
    offsets = np.append(0, np.cumsum(random_lengths(options["documents"], options["mean_length"])))
    before = status_bytes("VmRSS")
    forget_peak()
    made, first = timed(lambda: plan(offsets, max_length, 2, strategy, True))
    facts = {"documents": options["documents"], "lengths_bytes": 8 * options["documents"], "max_length": max_length}
    facts |= {"rows": len(made), "full": made.efficiency, "peak_bytes": peak_bytes() - before}
    del made
    later = [timed(lambda: plan(offsets, max_length, 2, strategy, True))[1] for _ in range(PLANS - 1)]
    return [{"part": "packing", "what": strategy, **facts, "seconds": [first, *later]}]


# -------------------------------------------------------------------------------------------- loading


def loading(options: dict[str, Any]) -> list[dict[str, Any]]:
    """Batches of the embedded corpus, for as long as asked."""
    from jaxlm.data.loader import Rows
    from jaxlm.data.packing import plan_cached
    from jaxlm.data.tokens import prepare

    data = data_config(options)
    train = prepare(data, options["vocab_size"], None, say).train
    plan = plan_cached(train, data, say)
    rate = flow(Rows(train, plan), options)
    return [{"part": "loading", "what": "embedded corpus", "rows": len(plan), **rate, "peak_bytes": peak_bytes()}]


def mixing(options: dict[str, Any]) -> list[dict[str, Any]]:
    """Batches of a mixture with annealing, from both sides of where it begins."""
    from jaxlm.data.loader import Rows
    from jaxlm.data.mixture import Mixture
    from jaxlm.data.packing import plan
    from jaxlm.data.tokens import TokenDocuments

    parts = {}
    for name, rows in (("large", 10_000), ("middle", 3000), ("small", 1000)):
        folder = Path(options["folder"]) / name
        folder.mkdir()
        write_tokens(folder, 2 * rows * options["seq_len"], options["mean_length"])
        documents = TokenDocuments(folder, "train", np.dtype(np.uint16))
        parts[name] = Rows(documents, plan(documents.offsets, options["seq_len"], 2, "first_fit", True))
    mixture = Mixture(parts, [[6, 3, 1], [1, 6, 3]])
    facts = {"rows": len(mixture), "updates_before_annealing": 100}
    rate = flow(mixture, options, anneal_row=100 * options["rows_a_batch"])
    return [{"part": "mixing", "what": "three sources", **facts, **rate, "peak_bytes": peak_bytes()}]


def flow(rows: Any, options: dict[str, Any], **more: Any) -> dict[str, Any]:
    """Takes batches for `options["seconds"]`; tokens/s, padding counted, as in the speed of training."""
    from jaxlm.config.batches import Batches
    from jaxlm.data.loader import train_batches

    with contextlib.closing(train_batches(rows, SEED, Batches(options["rows_a_batch"]), 0, **more)) as batches:
        for _ in range(3):
            next(batches)
        start, cpu, tokens = time.perf_counter(), time.process_time(), 0
        while time.perf_counter() - start < options["seconds"]:
            tokens += next(batches)["tokens"].size
        seconds = time.perf_counter() - start
        used = (time.process_time() - cpu) / seconds
    return {"tokens_per_second": tokens / seconds, "tokens": tokens, "cores_used": used}


# -------------------------------------------------------------------------------------------- larger than memory


def write_tokens(folder: Path, size: int, mean: int) -> None:
    """<folder>/train.*, as jaxlm.data.tokens describes them: random uint16 tokens, `size` bytes of them."""
    rng = np.random.default_rng(SEED)
    total = size // 2
    with (folder / "train.tokens").open("wb") as file:
        for low in range(0, total, CHUNK):
            rng.integers(3, 2**16, min(CHUNK, total - low), np.uint16).tofile(file)
    lengths = random_lengths(2 * total // mean, mean)
    ends = np.cumsum(lengths)
    ends = ends[: np.searchsorted(ends, total)]
    np.save(folder / "train.offsets.npy", np.array([0, *ends[:-1], total], np.int64))
    np.save(folder / "train.bytes.npy", 4 * np.diff([0, *ends[:-1], total]))


def larger(options: dict[str, Any]) -> list[dict[str, Any]]:
    """Batches of a corpus of `size` bytes in a process that may have `limit` bytes beyond what Python and NumPy take.

    The limit is RLIMIT_DATA: memory that the process allocates. Pages of a file that is mapped read-only don't count;
    they belong to the kernel, which drops them when it needs the room. That the limit holds is shown by reading the
    file into memory, which has to fail.
    """
    import grain  # noqa: F401  (its own memory is not the corpus's)

    from jaxlm.data.loader import Rows
    from jaxlm.data.packing import plan
    from jaxlm.data.tokens import TokenDocuments

    folder, limit = Path(options["folder"]), options["limit"]
    plan(np.arange(0, 200, 20), options["seq_len"], 2, "first_fit", True)  # compiles what is compiled
    before = status_bytes("VmData")
    resource.setrlimit(resource.RLIMIT_DATA, (before + limit, before + limit))
    documents = TokenDocuments(folder, "train", np.dtype(np.uint16))
    try:
        np.fromfile(folder / "train.tokens", np.uint16)
        raise SystemExit(f"the limit of {limit} bytes does not hold: a file of {options['size']} fits")
    except MemoryError:
        pass
    made = plan(documents.offsets, options["seq_len"], 2, "first_fit", True)
    rate = flow(Rows(documents, made), options)
    facts = {
        "documents": len(documents),
        "rows": len(made),
        "file_bytes": options["size"],
        "limit_bytes": before + limit,
    }
    memory = {"own_bytes": status_bytes("RssAnon"), "file_pages_bytes": status_bytes("RssFile")}
    memory["limit_bytes"] = before + limit
    return [{"part": "larger", "what": "random tokens", **facts, **rate, **memory}]


# -------------------------------------------------------------------------------------------- the command

PARTS: dict[str, Callable[[dict[str, Any]], list[dict[str, Any]]]] = {
    "tokenizing": tokenizing,
    "packing": packing,
    "loading": loading,
    "mixing": mixing,
    "larger": larger,
}
STRATEGIES = ("greedy", "first_fit", "best_fit", "concat")  # of packing


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, usage="%(prog)s [options]"
    )
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS), help="what to measure (default: all)")
    parser.add_argument("--threads", type=int, default=cores(), help="for tokenizing (default: the cores)")
    parser.add_argument("--repeats", type=int, default=3, help="of tokenizing (default: 3)")
    parser.add_argument("--documents", type=int, default=10**7, help="to pack (default: 10 million)")
    parser.add_argument("--mean_length", type=int, default=400, help="of a random document (default: 400 tokens)")
    parser.add_argument("--seq_len", type=int, default=512, help="tokens a row (default: 512)")
    parser.add_argument("--rows_a_batch", type=int, default=32, help="of an update (default: 32)")
    parser.add_argument("--seconds", type=float, default=10, help="to load for (default: 10)")
    parser.add_argument("--size", type=int, default=2 * 2**30, help="bytes of the large corpus (default: 2 GiB)")
    parser.add_argument("--limit", type=int, default=2**29, help="bytes of memory to read it (default: 512 MiB)")
    parser.add_argument("--vocab_size", type=int, default=4096, help="of the tokenizer (default: 4096)")
    parser.add_argument("--text", nargs="+", metavar="FILE", help="text, instead of the standard library")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the JSON file (default: results/)")
    options = parser.parse_args(arguments)
    if options.limit >= options.size:
        parser.error("--limit must be below --size")
    return options


def main(arguments: list[str]) -> None:
    options = parse(arguments)
    spec = {name: value for name, value in vars(options).items() if name not in ("only", "out")}
    threads = {"RAYON_NUM_THREADS": str(options.threads), "TOKENIZERS_PARALLELISM": "true"}
    versions = own_versions("numpy", "numba", "tokenizers", "grain")
    report = Report("data", ["benchmarks/data.py", *arguments], options.out, versions=versions)
    for part in options.only:
        for strategy in STRATEGIES if part == "packing" else [""]:
            say(f"{part} {strategy}")
            with tempfile.TemporaryDirectory() as folder:
                if part == "larger":
                    write_tokens(Path(folder), options.size, options.mean_length)
                results = in_a_process(__file__, part, spec | {"strategy": strategy, "folder": folder}, threads)
            report.content["results"] += results
            report.write()
    print(table(report.content))
    report.close()


if __name__ == "__main__":
    if sys.argv[1:2] == ["--part"]:
        answer_part(PARTS)
    else:
        main(sys.argv[1:])

"""Feeds damaged configurations, command lines, DeepSpeed files and text to the code that loads them.

    python benchmarks/fuzz.py --inputs 5000 [--seed N] [--seconds N] [--only NUMBER] [--out FOLDER]

Each input must either load or be refused with a UserError that says something; anything else (another exception,
more than SECONDS_EACH, tokens that are not the text) is a defect. Input NUMBER of seed N is the same every time.
Its files are kept under --out where it is a defect, and where it ends this process. Exit code 1: there are defects.
"""

import argparse
import collections
import csv
import faulthandler
import io
import json
import os
import random
import re
import resource
import shutil
import signal
import sys
import tempfile
import time
import traceback
import types
import typing
import warnings
from collections.abc import Callable
from contextlib import contextmanager, redirect_stdout
from dataclasses import fields
from pathlib import Path
from typing import Any

import pyarrow
from pyarrow import parquet

from jaxlm.commands.parser import Parser, add_config_options, config_from
from jaxlm.config import (
    SECTIONS,
    Config,
    DataConfig,
    from_dict,
    load_config,
    replace_fields,
    to_dict,
    validate,
    with_derived,
)
from jaxlm.data.documents import Document, LeftOut
from jaxlm.data.files import READERS
from jaxlm.data.loader import Rows
from jaxlm.data.packing import plan_cached
from jaxlm.data.sources import open_source
from jaxlm.data.tokens import prepare
from jaxlm.errors import UserError, printable
from jaxlm.interop import deepspeed

OUT = Path(tempfile.gettempdir()) / "jaxlm-fuzz"
SECONDS_EACH = 20
MEMORY = 16 * 2**30  # of addresses: what asks for more is refused, not killed

FIELDS = {
    f"{name}.{field.name}": (field, typing.get_type_hints(section)[field.name])
    for name, section in SECTIONS.items()
    for field in fields(section)
}
TEXTS = (
    "", " ", "none", "NULL", "true", "0", "-1", "1e5", "1e999", "nan", "-inf", "0x10", "1_000", "²", "a,b", ",", "[",
    "[]", "[1]", '["a", "b"]', "[[]]", "{}", "~", "~nobody_of_that_name/x", "..", "/", "a\0b", "\ud800", "\udcff", "\n",
    "é漢🙂", "\ufeff", "a\rb", "--", "-x", "=", "%s", "9" * 5000, "[" * 5000, "x" * 5000, "checkpoint-10.pt", "a.txt",
)  # fmt: skip
NUMBERS = (0, -1, 1, 2, 2**15, 2**24, 2**31 - 1, 2**31, 2**63, -(2**63), 10**40, 0.5, -0.0, 1e-320, 3.5e38, 1e308)
OTHERS = (None, True, False, float("nan"), float("inf"), -float("inf"), [], [[]], ["a"], ["a", 1], {}, {"a": {"b": []}})
RAW_JSON = ("9" * 5000, "[" * 100_000, '{"a":' * 50_000, "1e999", "-", "01", "'a'", "//", '"\\ud800"', '"\\u0000"', "")
PYTHON = (
    "10**5000", "-(10**400)", "float('nan')", "b'x'", "object()", "lambda: 0", "{1, 2}", "(1,)", "range(3)", "print",
    "...", "1j", "int", "[float]", "'a\\nb'", "'\\ud800'", "['a', None]", "{'a': 1}", "True", "undefined", "1/0",
    "(" * 300,
)  # fmt: skip
LINES = (
    "import nosuch", "raise SystemExit", "raise SystemExit('done')", "raise ValueError('a\\nb')", "assert False", "1/0",
    "config = 1", "del config", "open('nosuch')", "[][0]", "{}['a']", "x = '", "\tx", "f(", "def f(): return f()\nf()",
    "\0", "# coding: nosuch", "raise MemoryError", "config.model = None", "next(iter(()))",
)  # fmt: skip
DEEPSPEED = {
    "train_batch_size": 32, "train_micro_batch_size_per_gpu": 4, "gradient_accumulation_steps": 8,
    "gradient_clipping": 1.0,
    "optimizer": {"type": "AdamW", "params": {"lr": 1e-3, "betas": [0.9, 0.95], "eps": 1e-8, "weight_decay": 0.1}},
    "scheduler": {"type": "WarmupDecayLR", "params": {"warmup_num_steps": 10, "total_num_steps": 100}},
    "fp16": {"enabled": True, "loss_scale": 0, "initial_scale_power": 16, "hysteresis": 2}, "bf16": {"enabled": False},
    "zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu"}, "overlap_comm": True},
    "steps_per_print": 100, "wall_clock_breakdown": False, "tensorboard": {"enabled": True, "output_path": "x"},
    "activation_checkpointing": {"partition_activations": False}, "communication_data_type": "fp32",
}  # fmt: skip


class Defect(Exception):
    """An input that was neither loaded nor refused as it should be."""


# ---- Damage ----------------------------------------------------------------------------------------------------------


def damaged_bytes(rng: random.Random, content: bytes) -> bytes:
    """`content` as disks, editors and interrupted copies leave it."""
    content = bytearray(content)
    for _ in range(rng.choice((1, 1, 1, 2, 5))):
        at = rng.randrange(len(content) + 1)
        match rng.randrange(8):
            case 0 if content:
                content[at % len(content)] ^= 1 << rng.randrange(8)
            case 1 if content:
                content[at % len(content)] = rng.randrange(256)
            case 2:
                del content[at:]
            case 3:
                del content[at : at + rng.choice((1, 10, 1000))]
            case 4:
                parts = b"\xff", b"\xc3", b"\0", b"\r", b"\n", b'"', b"\xed\xa0\x80", b"\xef\xbb\xbf", b"\0" * 4096
                content[at:at] = rng.choice(parts)
            case 5:
                content[at:at] = content[at : at + rng.choice((1, 20, 2000))]
            case 6 if rng.random() < 0.3:
                content[:] = rng.choice((b"", b"\n", b"\xff\xfe", rng.randbytes(200), bytes(content[::-1])))
            case 7 if rng.random() < 0.3:
                text = content.decode(errors="replace")
                content[:] = text.encode(rng.choice(("utf-16", "utf-8-sig", "latin-1", "utf-32-le")), "replace")
    return bytes(content)


def misspelt(rng: random.Random, name: str) -> str:
    at = rng.randrange(len(name) + 1)
    return name[:at] + rng.choice(("x", "", "_", ".", " ", "é", "\0")) + name[at + rng.randrange(2) :]


def junk(rng: random.Random) -> Any:
    return rng.choice(rng.choice((TEXTS, NUMBERS, OTHERS)))


def damage_leaf(rng: random.Random, values: dict[str, Any]) -> None:
    """Renames, replaces, adds or removes something somewhere in `values`."""
    while (inner := [value for value in values.values() if isinstance(value, dict) and value]) and rng.random() < 0.8:
        values = rng.choice(inner)
    name = rng.choice(list(values)) if values else "a"
    match rng.randrange(6):
        case 0:
            values[misspelt(rng, name)] = values.pop(name, None)
        case 1:
            values[rng.choice(("new", "", "auto", *FIELDS))] = junk(rng)
        case 2:
            values.pop(name, None)
        case _:
            values[name] = junk(rng)


def as_json(rng: random.Random, values: dict[str, Any]) -> bytes:
    text = json.dumps(values)
    if rng.random() < 0.1:  # what json.dumps would not write
        colon = rng.choice([i for i, c in enumerate(text) if c == ":"] or [0])
        text = text[: colon + 1] + rng.choice(RAW_JSON) + text[colon + 1 + rng.choice((0, 5)) :]
    content = text.encode()
    return damaged_bytes(rng, content) if rng.random() < 0.25 else content


# ---- Configurations --------------------------------------------------------------------------------------------------


def valid_value(rng: random.Random, dotted: str) -> Any:
    """Some value that the field's declaration allows."""
    field, annotation = FIELDS[dotted]
    limits = field.metadata
    kinds = typing.get_args(annotation) if isinstance(annotation, types.UnionType) else (annotation,)
    kind = rng.choice(kinds)
    low = limits["low"] if limits["low"] is not None else limits["above"] if limits["above"] is not None else 0
    if kind is type(None):
        return None
    if typing.get_origin(kind) is tuple:
        return rng.sample(limits["choices"] or ("a.txt", "b c.jsonl", "é.csv"), rng.randrange(3))
    if kind is bool:
        return rng.random() < 0.5
    if limits["choices"]:
        return rng.choice(limits["choices"])
    if kind is str:
        return rng.choice(("a", "runs/x", "é", "b.json", "text"))
    if kind is int:
        return rng.choice((low, low + 1, low + 7, max(low, 64)))
    return rng.choice((low + 1e-3, low + 0.5, low + rng.random() / 2))


def some_values(rng: random.Random) -> dict[str, dict[str, Any]]:
    values: dict[str, dict[str, Any]] = {name: {} for name in SECTIONS}
    for dotted in rng.sample(list(FIELDS), rng.choice((0, 1, 2, 3, 12))):
        section, _, name = dotted.partition(".")
        values[section][name] = valid_value(rng, dotted)
    return values


def check_config(config: Config) -> None:
    """What every start does with a configuration, and that it survives being saved."""
    deepspeed.apply(validate(config), world=None)
    validate(with_derived(config))
    if from_dict(json.loads(json.dumps(to_dict(config))), "saved") != config:
        raise Defect("a saved configuration is another one")


def json_config(rng: random.Random, folder: Path) -> None:
    values = some_values(rng)
    for _ in range(rng.choice((0, 1, 1, 2))):
        damage_leaf(rng, values)
    path = folder / rng.choice(("c.json", "c.json", "c.json", "c.py", "c.toml", "c"))
    path.write_bytes(as_json(rng, values))
    check_config(load_config(str(path)))


def python_config(rng: random.Random, folder: Path) -> None:
    sections = []
    for section, values in some_values(rng).items():
        given = {name: repr(value) for name, value in values.items()}
        if rng.random() < 0.2:
            given[rng.choice(FIELDS_OF[section])] = rng.choice(PYTHON)
        if rng.random() < 0.1:
            given[misspelt(rng, rng.choice(FIELDS_OF[section]))] = "1"
        arguments = ", ".join(f"{name}={value}" for name, value in given.items())
        sections.append(f"{section}={SECTIONS[section].__name__}({arguments})")
    lines = ["from jaxlm.config import Config, DataConfig, ModelConfig, TrainingConfig"]
    lines.append(f"config = Config({', '.join(sections)})")
    if rng.random() < 0.3:
        lines.insert(rng.randrange(3), rng.choice(LINES))
    content = "\n".join(lines).encode(errors="surrogatepass")
    path = folder / "c.py"
    path.write_bytes(damaged_bytes(rng, content) if rng.random() < 0.3 else content)
    with warnings.catch_warnings(action="ignore"), redirect_stdout(io.StringIO()):
        config = load_config(str(path))
    check_config(config)


FIELDS_OF = {name: [dotted.partition(".")[2] for dotted in FIELDS if dotted.startswith(name)] for name in SECTIONS}


def command_line(rng: random.Random, folder: Path) -> None:
    (folder / "c.json").write_text("{}")
    arguments = [f"--config={folder / 'c.json'}"]
    for dotted in rng.sample(list(FIELDS), rng.choice((1, 1, 2, 6))):
        name = misspelt(rng, dotted) if rng.random() < 0.1 else dotted
        value = valid_value(rng, dotted) if rng.random() < 0.5 else junk(rng)
        text = value if isinstance(value, str) else json.dumps(value)
        arguments += [f"--{name}={text}"] if rng.random() < 0.7 else [f"--{name}", text]
    if rng.random() < 0.1:
        arguments.insert(rng.randrange(len(arguments)), rng.choice(("-h", "--", "-", "stray", "--fresh", "\udcff")))
    (folder / "arguments.json").write_text(json.dumps(arguments))
    parser = Parser("fuzz")
    parser.add_argument("--config", required=True)
    add_config_options(parser)
    with redirect_stdout(io.StringIO()):
        try:
            parsed = parser.parse_args(arguments)
        except SystemExit as end:
            if end.code == 0:  # --help
                return
            raise
    check_config(config_from(parsed))


def deepspeed_file(rng: random.Random, folder: Path) -> None:
    values = json.loads(json.dumps({name: DEEPSPEED[name] for name in rng.sample(list(DEEPSPEED), rng.randrange(8))}))
    for _ in range(rng.choice((0, 1, 1, 2))):
        damage_leaf(rng, values)
    path = folder / "ds.json"
    path.write_bytes(as_json(rng, values))
    given = {"training.use_deepspeed": True, "training.deepspeed_config": str(path)}
    config, _ = deepspeed.apply(validate(replace_fields(Config(), given)), world=rng.choice((None, 1, 4)))
    validate(with_derived(config))


# ---- Text ------------------------------------------------------------------------------------------------------------


def some_text(rng: random.Random) -> str:
    words = (
        "the",
        "cat",
        "naïve",
        "漢字",
        "🙂",
        "a,b",
        '"quoted"',
        "<bos>",
        "\t",
        "x" * 60,
        "1234",
        "\u2028",
        "e\u0301",
    )
    text = rng.choice((" ", "\n", " ", "\r\n")).join(rng.choice(words) for _ in range(rng.choice((0, 1, 5, 30))))
    return text + rng.choice(("", "", "", "\n", " ", "\0", "\ufeff", "y" * 20_000 if rng.random() < 0.1 else ""))


def table(rng: random.Random, documents: list[Any], column: str) -> bytes:
    plain = [value.encode(errors="replace").decode() if isinstance(value, str) else None for value in documents]
    kind = rng.choice((pyarrow.string(), pyarrow.large_string(), pyarrow.dictionary(pyarrow.int32(), pyarrow.string())))
    array: Any = pyarrow.array(plain, pyarrow.string()).cast(kind)
    if rng.random() < 0.15:
        array = rng.choice((
            pyarrow.array([len(text or "") for text in plain]),
            pyarrow.array([(text or "").encode("utf-16") for text in plain], pyarrow.binary()),
            pyarrow.array([[text] for text in plain], pyarrow.list_(pyarrow.string())),
            pyarrow.array([{"text": text} for text in plain], pyarrow.struct([("text", pyarrow.string())])),
            pyarrow.nulls(len(plain)),
        ))  # fmt: skip
    if rng.random() < 0.1:
        raw = [b"\xff\xfe" if rng.random() < 0.3 else (text or "").encode() for text in plain]
        array = pyarrow.array(raw, pyarrow.binary()).view(pyarrow.string())
    buffer = io.BytesIO()
    columns = {"id": list(range(len(documents))), column: array}
    parquet.write_table(pyarrow.table(columns), buffer, compression=rng.choice(("snappy", "none", "zstd")))
    return buffer.getvalue()


def jsonl_line(rng: random.Random, row: dict[str, Any]) -> bytes:
    if rng.random() < 0.03:
        return rng.choice((b"[]", b"1", b"null", b'"text"', b"{}", as_json(rng, row)))
    return json.dumps(row, ensure_ascii=rng.random() < 0.5).encode(errors="surrogatepass")


def text_file(rng: random.Random, suffix: str, column: str) -> bytes:
    documents: list[Any] = [some_text(rng) for _ in range(rng.choice((0, 1, 3, 25)))]
    if documents and rng.random() < 0.15:
        documents[rng.randrange(len(documents))] = junk(rng)
    match suffix:
        case ".txt":
            content = "\n\n".join(map(str, documents)).encode(errors="surrogatepass")
        case ".jsonl":
            lines = [jsonl_line(rng, {"id": i, column: text}) for i, text in enumerate(documents)]
            content = rng.choice((b"\n", b"\n", b"\r\n", b"\r", b"\n\n")).join(lines)
        case ".csv":
            file = io.StringIO()
            writer = csv.writer(file, lineterminator=rng.choice(("\n", "\r\n", "\r")))
            writer.writerow(["id", column])
            writer.writerows([i, text, *["x"] * (rng.random() < 0.02)] for i, text in enumerate(documents))
            content = file.getvalue().encode(errors="surrogatepass")
        case _:
            content = table(rng, documents, column)
    return damaged_bytes(rng, content) if rng.random() < 0.5 else content


def text(rng: random.Random, folder: Path) -> None:
    names = []
    for number in range(rng.choice((1, 1, 2))):
        suffix = rng.choice(list(READERS))
        names.append(folder / f"{number}{suffix}")
        names[-1].write_bytes(text_file(rng, suffix, rng.choice(("text",) * 20 + ("body", "", "é"))))
    paths = tuple(map(str, names))
    data = DataConfig(
        train_files=paths,
        validation_files=paths if rng.random() < 0.7 else (),
        validation_fraction=rng.choice((0.05, 0.5, 1e-9, 0.999)),
        on_bad_document=rng.choice(("stop", "skip")),
        max_length=rng.choice((2, 16, 64)),
        min_length=rng.choice((0, 2, 10)),
        packing_strategy=rng.choice(("greedy", "concat", "first_fit", "best_fit")),
        pack_sequences=rng.random() < 0.8,
        cache_dir=str(folder / "cache"),
    )
    (folder / "data.json").write_text(json.dumps(vars(data)))
    said: list[str] = []
    try:
        prepared = prepare(data, 300, None, said.append)
    except UserError as error:
        if data.on_bad_document == "skip" and re.search("skip to leave out|cannot be read", str(error)):
            raise Defect(f"bad documents are not skipped: {error}") from error
        raise
    if any("\n" in line for line in said):
        raise Defect(f"more than one line is reported: {said}")
    source = open_source(data)
    documents = list(source.train())
    check_nothing_is_lost(data, documents, source.left_out)
    check_tokens(prepared, documents)
    if data.validation_files:  # else the held-out part alone may be too short
        arguments = (data.max_length, data.min_length, data.packing_strategy, data.pack_sequences, said.append)
        plan = plan_cached(prepared.train, *arguments)
        rows = Rows(prepared.train, plan, data.max_length)
        pairs = sum(int((rows[i]["segments"] > 0).sum()) for i in range(len(rows)))
        if pairs != plan.pairs:
            raise Defect(f"{plan.pairs} pairs were planned, {pairs} are in the rows")


def check_nothing_is_lost(data: DataConfig, documents: list[Document], left_out: dict[str, LeftOut]) -> None:
    """Every line of a JSON Lines file is a document, or was said to be left out."""
    if data.validation_files and all(name.endswith(".jsonl") for name in data.train_files):
        blank = (0, 0)
        lines = 0
        for name in data.train_files:
            whole = Path(name).read_bytes().removeprefix(b"\xef\xbb\xbf").replace(b"\r", b"\n")
            lines += sum(not line.decode(errors="surrogateescape").isspace() for line in whole.split(b"\n") if line)
            lines += not Path(name).stat().st_size
        counts = left_out.get("training text")
        out = (counts.empty, counts.bad) if counts else blank
        if len(documents) + sum(out) != lines:
            raise Defect(f"{lines} lines became {len(documents)} documents, with {out} empty and bad ones left out")


def check_tokens(prepared: Any, documents: list[Document]) -> None:
    """What was tokenized is the text."""
    if len(prepared.train) != len(documents):
        raise Defect(f"{len(documents)} documents became {len(prepared.train)}")
    offsets = prepared.train.offsets
    for document, begin, end in zip(documents, offsets, offsets[1:], strict=False):
        if prepared.tokenizer.decode(prepared.train.tokens[begin:end]) != document.text:
            raise Defect(f"{document.place} was tokenized to another text")


# ---- The run ---------------------------------------------------------------------------------------------------------

KINDS: dict[str, Callable[[random.Random, Path], None]] = {
    "JSON configuration": json_config,
    "Python configuration": python_config,
    "command line": command_line,
    "DeepSpeed file": deepspeed_file,
    "text": text,
}


@contextmanager
def time_limit(seconds: int) -> typing.Iterator[None]:
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


def run(seed: int, numbers: typing.Iterable[int], out: Path, seconds: float = float("inf")) -> collections.Counter:
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

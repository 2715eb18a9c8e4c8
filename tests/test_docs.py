"""Every command and snippet of the README and of docs/ is run, cut down to a tiny model; what can't be is named here.

A page is read from top to bottom in a folder of its own. Its fenced blocks are: `sh`, commands; `console`, commands
after `$ ` and what they print (`...` stands for anything); `python`, snippets that share their names; `json`; `text`,
which nothing runs. A command that nothing here knows fails.
"""

import ast
import contextlib
import dataclasses
import io
import itertools
import json
import re
import shlex
import shutil
import sys
import tomllib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import pytest
from test_plan import measured_plan

from jaxlm.__main__ import COMMANDS, main, program
from jaxlm.commands.parser import Parser, config_from
from jaxlm.config import SECTIONS, load_config, replace_fields, shown, validate
from jaxlm.errors import UserError
from jaxlm.trainer import Trainer

ROOT = Path(__file__).parents[1]
PAGES = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    ROOT / "launch" / "README.md",
    ROOT / "benchmarks" / "README.md",
    *sorted((ROOT / "docs").glob("*.md")),
]
LANGUAGES = {"sh", "console", "python", "json", "text"}

# What every training command gets at its end, and every configuration of a snippet: minutes become seconds.
TINY: dict[str, Any] = {
    "model.vocab_size": 300,
    "model.d_model": 32,
    "model.n_heads": 2,
    "model.n_layers": 1,
    "model.d_ff": 64,
    "model.max_seq_len": 32,
    "data.max_length": 32,
    "training.batch_size": 2,
    "training.gradient_accumulation_steps": 1,
    "training.max_steps": 2,
    "training.use_amp": False,
    "training.sample_tokens": 0,
}

# Training commands that are parsed and validated, but not run, and why.
NOT_RUN = {
    r"--coordinator_address": "needs several hosts; tests/test_processes.py starts several processes",
    r"(gpt2|llama)_\d+m|\b(medium|large)\b": "a model for GPUs; tests/test_cli.py validates each configuration",
    r"dataset_name (?!python-stdlib)|wikitext2": "needs the Hub; tests/test_sources.py serves one",
    r"use_deepspeed|zero_stage|tensor_parallel|zero_group_size": "tests/test_sharding.py trains with every layout",
}


class Block(NamedTuple):
    """A fenced block: its language, its text and the line where it begins."""

    language: str
    text: str
    line: int


def blocks(page: Path) -> list[Block]:
    found, inside = list[Block](), None
    for number, line in enumerate(page.read_text(encoding="utf-8").splitlines(), 1):
        fence = re.match(r" {0,3}```+(.*)", line)
        if fence and inside is None:
            inside = Block(fence[1].strip(), "", number)
        elif fence and inside is not None:
            found.append(inside)
            inside = None
        elif inside is not None:
            inside = inside._replace(text=inside.text + line + "\n")
        else:
            assert not re.match(r" {4,}\S", line), f"{page.name}:{number}: indented code; fence it, with a language"
    assert inside is None, f"{page.name}: an open fence"
    return [block for block in found if not block.language.startswith("{")]  # which are Sphinx's


def commands(text: str) -> Iterator[list[str]]:
    """The words of each command, without comments; `a && b` is two."""
    for line in text.replace("\\\n", " ").splitlines():
        words: list[str] = []
        for word in [*shlex.split(line, comments=True), "&&"]:
            if word != "&&":
                words.append(word)
            elif words:
                yield words
                words = []


def steps(page: Path) -> Iterator[tuple[str, list[str], str]]:
    """(place, words, output shown) of each command of a page."""
    for block in blocks(page):
        where = f"{page.name}:{block.line}"
        if block.language == "sh":
            yield from ((where, words, "") for words in commands(block.text))
        if block.language == "console":
            first, *rest = re.split(r"^\$ ", block.text, flags=re.M)
            assert not first, f"{where}: does not begin with $"
            for text in rest:
                command, _, output = text.replace("\\\n", " ").partition("\n")
                (words,) = commands(command)
                yield where, words, output


def own_command(words: list[str]) -> tuple[str, list[str]] | None:
    """(name, arguments) of a command of ours: `jaxlm NAME ...`, `python scripts/NAME.py ...`; None: another's."""
    if words[0] == "python" and (script := re.fullmatch(r"scripts/(\w+)\.py", words[1])):
        return script[1], words[2:]
    return (words[1] if words[1][0] == "-" else words[1].replace("-", "_"), words[2:]) if words[0] == "jaxlm" else None


# ------------------------------------------------------------ commands of others: what can be checked is


def check_pip(words: list[str]) -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    named = [name for group in re.findall(r"(?:\.|jaxlm|\.whl)\[(.*?)\]", " ".join(words)) for name in group.split(",")]
    assert set(named) <= set(extras), "an extra that there is not"


def check_pytest(words: list[str]) -> None:
    paths = [ROOT / word for word in words[1:] if word.startswith("tests")]
    files = [file for path in paths for file in ([path] if path.is_file() else path.rglob("*.py"))]
    assert len(files) >= len(paths), "no such tests"
    text = "\n".join(f"{file.name}\n{file.read_text(encoding='utf-8')}" for file in files)
    slow = re.findall(r"^@pytest\.mark\.slow\ndef (\w+)", text, re.MULTILINE)
    for word in words[words.index("-k") + 1].split() if "-k" in words else []:
        assert word in text, f"-k {word} selects nothing"
        assert "-m" in words or not any(word in name for name in slow), f'-k {word} leaves slow tests out without -m ""'


def check_program(words: list[str]) -> None:
    """A program of ours that is not a command: it is there, and its options stand in it."""
    file = next((word for word in words if "/" in word and (ROOT / word).is_file()), None)
    assert file is not None, "no such program"
    text = (ROOT / file).read_text(encoding="utf-8")
    for word in words[words.index(file) + 1 :]:
        known = not word.startswith("--") or word in ("--config", "--") or word[2:].partition(".")[0] in SECTIONS
        assert known or word.partition("=")[0] in text, f"{file} knows no {word}"


OTHERS: dict[str, Callable[[list[str]], None]] = {
    r"(\S*bin/)?pip install .*": check_pip,
    r"pytest( .*)?": check_pytest,
    r"python (benchmarks|tests|examples)/\w+\.py.*": check_program,
    r"(sudo )?(benchmarks/hosts|launch/ssh)\.sh .*|benchmarks/gpu/run|sbatch .*launch/slurm\.sh.*": check_program,
}
# ... and those of which nothing can be, with what takes care of them.
UNCHECKED = {
    r"\.ci/run|ruff (check|format).*|mypy|python -m (sphinx|build|twine) .*": "what .ci/run does",
    r"python -m venv \S+|source \S+/activate|cd \S+|export \w+=.*": "the shell's, or Python's",
    r"tensorboard --logdir \S+|jupyter lab .*": "a viewer",
    r"git clone .*": "needs a network",
    r"lm_eval run .*": "tests/parity/test_lm_eval.py",
    r"eval .*|echo .*>> ~/\.\w+|jaxlm completion .*": "tests/test_install.py",
    r"(scancel|kubectl|mpirun|srun) .*": "needs a cluster; tests/test_launch.py has stand-ins",
}


# ------------------------------------------------------------ running


def data_of(corpus: Path) -> dict[str, Any]:
    return {
        "data.train_files": (str(corpus / "book.txt"),),
        "data.validation_files": (str(corpus / "validation.jsonl"),),
        "data.cache_dir": str(corpus / "cache"),
    }


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, corpus: Path) -> Path:
    """The folder of a finished tiny run, for commands that want a model that their page has not trained."""
    folder = tmp_path_factory.mktemp("trained") / "run"
    run = {"training.checkpoint_dir": str(folder), "training.report_to": ()}
    Trainer(replace_fields(load_config("small"), TINY | data_of(corpus) | run)).train()
    return folder


class Shrunk(Trainer):
    """What `Trainer` is while a snippet runs: its configuration is cut down as that of a command."""

    changes: dict[str, Any]

    def __init__(self, config: Any, **more: Any) -> None:
        config = load_config(config) if isinstance(config, str) else config
        named = config.data.train_files or "train_dataset" in more
        own_text = ("data.train_files", "data.validation_files") if named else ()
        changes = {name: value for name, value in self.changes.items() if name not in own_text}
        super().__init__(replace_fields(config, changes), **more)


@dataclass
class Reader:
    """Somebody who does what a page says, in a folder that looks like the checkout and holds texts of their own."""

    folder: Path
    corpus: Path
    trained: Path
    capsys: pytest.CaptureFixture[str]
    monkeypatch: pytest.MonkeyPatch

    def read_commands(self, page: Path) -> None:
        for where, words, output in steps(page):
            while re.fullmatch(r"[A-Z_]+=\S*", words[0]):  # variables of the environment
                words = words[1:]
            try:
                self.follow(words, output)
            except AssertionError as error:
                raise AssertionError(f"{where}: {shlex.join(words)}: {error}") from error

    def follow(self, words: list[str], output: str) -> None:
        ours, line = own_command(words), " ".join(words)
        if any(re.fullmatch(pattern, line) for pattern in UNCHECKED):
            return
        if ours is None:
            check = next((check for pattern, check in OTHERS.items() if re.fullmatch(pattern, line)), None)
            assert check is not None, "known to no test"
            check(words)
        elif ours[0].startswith("-"):
            with contextlib.suppress(SystemExit):
                program().parse_args([ours[0]])
        else:
            self.follow_own(*ours, output)

    def follow_own(self, name: str, given: list[str], output: str) -> None:
        expected, wrong = expected_code(output), fault(name, given)
        if wrong is None and ({"FILE", "DIR", "--help"} & set(given) or (name == "train" and not_run(given))):
            return
        if wrong is None and name == "plan":  # tests/compiled runs it, where the compiler for GPUs is
            return
        if wrong is None:  # else it ends before anything that takes time
            self.provide_models(itertools.pairwise(given))
            given = [*given, *self.shortened(name, given)]
        code, printed = self.run(name, given)
        assert code == expected, printed
        pattern = r"\s+".join(re.escape(word).replace(r"\.\.\.", ".*?") for word in output.split())
        assert re.search(pattern, printed, re.S), f"expected\n{output}\nprinted\n{printed}"

    def shortened(self, name: str, given: list[str]) -> list[str]:
        """What is added to a command, so that it takes a second."""
        cut: dict[str, Any] = {}
        if name == "resume":
            cut = {"data.cache_dir": str(self.corpus / "cache")}
        elif name in ("train", "inspect", "sweep"):
            cut = {dotted: value for dotted, value in data_of(self.corpus).items() if f"--{dotted}" not in given} | TINY
            if "sums.jsonl" in given:  # a part of these is held out
                del cut["data.validation_files"]
            if "--data.sources" in given:
                del cut["data.train_files"], cut["data.validation_files"]
                cut["data.anneal_from"] = 2
            if "--training.profile_steps" in given:
                cut["training.profile_steps"] = "2:2"  # of as few updates as there are
        elif name == "evaluate":
            cut = {"data.cache_dir": str(self.corpus / "cache")}
        elif name in ("generate", "chat"):
            cut = {"max_new_tokens": 2}
        return [f"--{dotted}={shown(value)}" for dotted, value in cut.items()]

    def provide_models(self, options: Any) -> None:
        """Puts a model where (option, value) say that one is, unless the page has made it."""
        for option, value in options:
            if option in ("--model", "--training.init_from") and not Path(value).exists():
                kind = "checkpoint_2" if Path(value).name.startswith("checkpoint_") else Path(value).name
                shutil.copytree(self.trained / kind, value)

    def run(self, name: str, given: list[str]) -> tuple[int, str]:
        """(exit code, what it printed) of one of our commands, in this process."""
        self.monkeypatch.setattr(sys, "argv", [f"{name}.py", *given])
        self.monkeypatch.setattr(sys, "excepthook", sys.excepthook)  # which `main` replaces
        self.monkeypatch.setattr(sys, "stdin", io.StringIO("What is 1 + 2?\n"))  # what is said to a model
        self.capsys.readouterr()
        with pytest.raises(SystemExit) as end:
            main(name)
        printed = self.capsys.readouterr()
        return int(end.value.code or 0), printed.out + printed.err

    def read_snippets(self, page: Path) -> None:
        names = ModuleType("snippets")
        self.monkeypatch.setattr("jaxlm.trainer.Trainer", Shrunk)
        self.monkeypatch.setattr("jaxlm.plan.plan.plan", lambda config, **more: measured_plan())  # tests/compiled
        self.monkeypatch.setattr(Shrunk, "changes", TINY | data_of(self.corpus), raising=False)
        for block in blocks(page):
            assert block.language in LANGUAGES, f"{page.name}:{block.line}: unknown language ({block.language})"
            if block.language == "json":
                json.loads(block.text)
            if block.language == "python":
                text = block.text.replace("/absolute/path/to", str(self.folder))
                models = re.findall(r"\"([^\"]*/(?:best_model|final_model|checkpoint_\d+))\b", text)
                self.provide_models(("--model", path) for path in models)
                tree = ast.increment_lineno(ast.parse(text), block.line)  # so that a traceback names the page's line
                exec(compile(tree, str(page), "exec"), vars(names))


@pytest.fixture
def reader(tmp_path: Path, corpus: Path, trained: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch) -> Reader:
    for name in ("configs", "scripts", "examples"):
        (tmp_path / name).symlink_to(ROOT / name)
    (tmp_path / "my_texts").mkdir()
    for name in ("a.txt", "b.txt"):
        shutil.copy(corpus / "book.txt", tmp_path / "my_texts" / name)
    short = [[{"role": "assistant", "content": f"{i}"}] for i in range(60)]  # of what the page makes, for tiny rows
    (tmp_path / "sums.jsonl").write_text("\n".join(json.dumps({"messages": turns}) for turns in short))
    shutil.copy(corpus / "validation.jsonl", tmp_path / "held_out.jsonl")
    shutil.copy(trained / "tokenizer" / "tokenizer.json", tmp_path)
    monkeypatch.chdir(tmp_path)
    return Reader(tmp_path, corpus, trained, capsys, monkeypatch)


def fault(name: str, given: list[str]) -> str | None:
    """What is wrong with a command's arguments, and its configuration if it takes one, as far as that is in them."""
    parser = Parser("")
    COMMANDS[name].add_options(parser)
    with contextlib.suppress(SystemExit):  # of --help
        try:
            arguments = parser.parse_args(["small" if word in ("FILE", "mine.json") else word for word in given])
            if "config" in vars(arguments):
                validate(config_from(arguments))
        except UserError as error:
            return str(error)
    return None


def not_run(given: list[str]) -> str | None:
    return next((why for pattern, why in NOT_RUN.items() if re.search(pattern, " ".join(given))), None)


def expected_code(output: str) -> int:
    starts = {"error: ": 2, "failed: ": 1, "stopped: ": 75}
    return next((code for start, code in starts.items() if re.search(f"^{start}", output, re.M)), 0)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_commands(page: Path, reader: Reader) -> None:
    reader.read_commands(page)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_snippets(page: Path, reader: Reader) -> None:
    reader.read_snippets(page)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_options_named_on_pages_exist(page: Path) -> None:
    fields = {f"{name}.{field.name}" for name, section in SECTIONS.items() for field in dataclasses.fields(section)}
    prose = re.sub(r"^```console$.*?^```$", "", page.read_text(encoding="utf-8"), flags=re.M | re.S)
    named = re.findall(r"`(?:--)?((?:model|training|data)\.[a-z]\w+)(?:`| \S+`)", prose)
    assert set(named) - fields - {"model.py"} == set()


# ------------------------------------------------------------ messages


@cache
def messages() -> list[re.Pattern[str]]:
    """What the program can say: a pattern for each text in its source, anything in the place of what is filled in."""
    found = []
    for path in (ROOT / "jaxlm").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            parts = node.values if isinstance(node, ast.JoinedStr) else [node]
            literal = [part.value if isinstance(part, ast.Constant) else None for part in parts]
            fixed = "".join(part for part in literal if isinstance(part, str))
            if len(fixed.split()) >= 3 and "\n" not in fixed:  # a message is a line
                pattern = "".join(".*" if p is None else re.escape(str(p)) for p in literal)
                found.append(re.compile(re.sub(r"(\.\*)+", ".*", pattern), re.S))  # one: several side by side take ages
    return found


def is_said(line: str) -> bool:
    bare = re.sub(r"^(error|failed|stopped): ", "", line)
    return any(pattern.fullmatch(text) for pattern in messages() for text in (line, bare))


def test_quoted_messages_are_the_programs() -> None:
    page = ROOT / "docs" / "troubleshooting.md"
    quoted = [line for block in blocks(page) if block.language == "text" for line in block.text.splitlines()]
    assert quoted
    assert [line for line in quoted if not is_said(line)] == []
    assert not is_said("error: the program has never said these very words")


# ------------------------------------------------------------ the reading itself


def test_what_is_not_known_fails(reader: Reader) -> None:
    page = reader.folder / "page.md"
    for text, fault in (
        ("```sh\nrm -rf things\n```", "known to no test"),
        ("```sh\njaxlm train --config small --training.max_step 3\n```", "unknown option"),
        ("```sh\npython scripts/nothing.py\n```", "nothing"),
        ("```console\n$ jaxlm train --config small --model.n_heads 3\nerror: something else\n```", "expected"),
        ("```console\n$ jaxlm generate --model nowhere --top_p 2\n```", "nowhere"),
        ("```sh\npytest tests/test_cli.py -k nothing_of_that_name\n```", "selects nothing"),
        ("```sh\npytest tests/test_metrics.py -k histograms\n```", "leaves slow tests out"),
        ("```sh\npip install -e '.[nothing]'\n```", "extra"),
        ("```sh\npython benchmarks/soak.py --nothing\n```", "knows no --nothing"),
        ("    jaxlm train\n", "indented code"),
    ):
        page.write_text(text)
        with pytest.raises((AssertionError, KeyError, OSError), match=fault):
            reader.read_commands(page)
    for text, error in (
        ("```python\nimport jaxlm\njaxlm.no\n```", AttributeError),
        ("```haskell\n```", AssertionError),
    ):
        page.write_text(text)
        with pytest.raises(error):
            reader.read_snippets(page)

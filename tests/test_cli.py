"""What people type becomes the configuration that they mean, and `--help` says what they can type."""

import ast
import dataclasses
import json
import os
import re
import signal
import subprocess
import sys
import time
import tomllib
from pathlib import Path
from typing import Any

import pytest
from conftest import make_config

from jaxlm.commands import evaluate
from jaxlm.commands.parser import Parser, add_config_options, config_from, overrides
from jaxlm.config import SECTIONS, Config, load_config, shown, to_dict, validate
from jaxlm.config.schema import FIELDS
from jaxlm.errors import Stopped, UserError

ROOT = Path(__file__).parents[1]
CONFIGS = sorted(path for path in (ROOT / "configs").iterdir() if path.suffix in (".py", ".json"))


def parse(*arguments: str) -> dict[str, Any]:
    parser = Parser("test")
    add_config_options(parser)
    return overrides(parser.parse_args(arguments))


def run(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-W", "error", *arguments],
        cwd=ROOT,
        env=os.environ | environment,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


@pytest.mark.parametrize(
    ("name", "text", "value"),
    [
        ("training.max_steps", "20", 20),
        ("training.max_steps", "none", None),
        ("training.max_steps", "NULL", None),
        ("training.learning_rate", "1e-3", 1e-3),
        ("training.learning_rate", "2", 2.0),
        ("training.max_grad_norm", "none", None),
        ("training.max_grad_norm", "0.5", 0.5),
        ("training.num_epochs", ".5", 0.5),
        ("training.seed", "-1", -1),  # refused later, by its bounds
        ("training.weight_decay", "-0.5", -0.5),
        ("training.weight_decay", "-1e-3", -1e-3),
        ("training.use_amp", "false", False),
        ("training.use_amp", "True", True),
        ("training.checkpoint_dir", "runs/a b", "runs/a b"),
        ("training.checkpoint_dir", "none", "none"),  # a folder may have that name
        ("data.dataset_config", "none", None),
        ("data.tokenizer_path", "7", "7"),
        ("data.train_files", "[]", ()),
        ("data.train_files", "", ("",)),  # refused later: it names no file
        ("data.train_files", '["a b.txt", "c,d.txt"]', ("a b.txt", "c,d.txt")),
        ("data.train_files", "a.txt, b.txt", ("a.txt", "b.txt")),
        ("data.train_files", "a.txt", ("a.txt",)),
        ("training.report_to", "tensorboard,wandb", ("tensorboard", "wandb")),
    ],
)
def test_values(name: str, text: str, value: object) -> None:
    for arguments in ([f"--{name}", text], [f"--{name}={text}"]):
        given = parse(*arguments)
        assert given == {name: value}
        assert type(given[name]) is type(value)


def test_values_of_a_list_may_each_have_an_option() -> None:
    given = parse(
        "--data.train_files", "a.txt", "--data.train_files", '["b.txt"]', "--training.seed", "1", "--training.seed=2"
    )
    assert given == {"data.train_files": ("a.txt", "b.txt"), "training.seed": 2}


def test_files_to_evaluate_may_each_have_an_option() -> None:
    parser = Parser("test")
    evaluate.add_options(parser)
    assert parser.parse_args(["--model", "m", "--files", "a", "b", "--files", "c"]).files == ["a", "b", "c"]


def test_a_field_without_its_dashes_is_understood() -> None:
    assert parse("training.batch_size=4", "--model.d_ff", "8", "data.text_column=a=b") == {
        "training.batch_size": 4, "model.d_ff": 8, "data.text_column": "a=b"
    }  # fmt: skip


def test_names_of_other_trainers_are_those_of_the_page() -> None:
    """Each name that docs/pytorch.md has fields for, with one or more of these, and every field is one."""
    tables = tomllib.loads((ROOT / "jaxlm" / "config" / "names.toml").read_text(encoding="utf-8"))
    named = {
        name: {word for word in there.split() if "." in word}
        for table in tables.values()
        for name, there in table.items()
    }
    assert set().union(*named.values()) <= set(FIELDS)
    page = (ROOT / "docs" / "pytorch.md").read_text(encoding="utf-8")
    arguments, more = page.split("## Around the Trainer")
    for line in (arguments + more.partition("## nanoGPT")[2]).splitlines():
        names, fields = (re.findall(r"`([\w.]+)`", cell) for cell in (*line.split("|")[1:3], "", "")[:2])
        fields = set(fields) & set(FIELDS)
        for name in (name.rpartition(".")[2] for name in names if fields and not name.endswith(".py")):
            same = any(field.endswith(f".{name}") for field in fields)
            assert same or named[name] <= fields, (name, line)
    ours = {field.rpartition(".")[2] for field in FIELDS}
    for table in re.findall("<!-- .*? holds the first column.*?<!-- end of", page, re.S):
        for line in table.splitlines()[3:-1]:
            assert set(re.findall(r"`(\w+)`", line.split("|")[1])) <= named.keys() | ours, line


def test_fresh_is_never_suggested() -> None:
    from jaxlm.__main__ import run as command

    with pytest.raises(UserError, match=r"^--frehs: unknown option; --help lists all$"):
        command("train", ["--config", "small", "--frehs"])


def test_a_wrong_name_in_a_python_file_gets_the_same_hint(tmp_path: Path) -> None:
    file = tmp_path / "c.py"
    file.write_text("from jaxlm.config import TrainingConfig\nTrainingConfig(max_iters=3)\n")
    with pytest.raises(UserError, match=r"line 2: TypeError: .*'max_iters' \(did you mean training\.max_steps\?\)$"):
        load_config(str(file))


def test_modules_beside_the_configuration_and_here_are_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An own sink, from the configuration's folder or from where the command is given."""
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.chdir(tmp_path)
    sink = "class Own:\n    def write(self, row, step): pass\n    def close(self): pass\n"
    (tmp_path / "sink_here_3f1.py").write_text(sink)
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "sink_there_3f1.py").write_text(sink)
    (tmp_path / "there" / "c.json").write_text(
        '{"training": {"report_to": ["sink_here_3f1:Own", "sink_there_3f1:Own"]}}'
    )
    validate(load_config("there/c.json"))


def test_value_that_begins_with_a_dash() -> None:
    assert parse("--data.text_column=-x", "--training.weight_decay=-1e-3") == {
        "data.text_column": "-x",
        "training.weight_decay": -1e-3,
    }
    with pytest.raises(UserError, match=r"--data\.text_column: expected one argument .*--name=value"):
        parse("--data.text_column", "-x")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--training.max_steps", "ten"], "training.max_steps ('ten') must be int or none"),
        (["--training.max_steps", "1.5"], "training.max_steps ('1.5') must be int or none"),
        (["--training.batch_size", "none"], "training.batch_size ('none') must be int"),
        (["--training.learning_rate", "fast"], "training.learning_rate ('fast') must be float"),
        (["--training.use_amp", "1"], "training.use_amp ('1') must be true or false"),
        (["--data.train_files", "[1, 2]"], "data.train_files ('[1, 2]') holds something else than text; write ["),
        (["--data.train_files", '["a", null]'], "data.train_files ('[\"a\", null]') holds something else than text"),
        (["--data.train_files", "[a, b]"], "data.train_files ('[a, b]') is not a JSON list"),
        (["--trainng.max_steps", "3"], "--trainng.max_steps: unknown option (did you mean --training.max_steps?)"),
        (["--training.maxsteps=3"], "--training.maxsteps: unknown option (did you mean --training.max_steps?)"),
        (["--learning-rate", "3"], "--learning-rate: unknown option (did you mean --training.learning_rate?)"),
        (["--Model.D_Model", "3"], "--Model.D_Model: unknown option (did you mean --model.d_model?)"),
        (["--n_embd", "3"], "--n_embd: unknown option (did you mean --model.d_model?)"),
        (["--train.micro_batch_size", "3"], "--train.micro_batch_size: unknown option (did you mean --training.batch"),
        (["--bf16"], "--bf16: unknown option (did you mean --training.use_amp or --training.amp_dtype?)"),
        (["--num_return_sequences"], "--num_return_sequences: unknown option (here that is --num_samples); --help"),
        (["--hub_token"], "--hub_token: unknown option (there is no such option; docs/pytorch.md says what is done)"),
        (["--eval_only"], "--eval_only: unknown option (here that is jaxlm evaluate); --help"),
        (["--training.max", "3"], "--training.max: unknown option"),  # no abbreviations
        (["--max_steps", "3"], "--max_steps: unknown option (did you mean --training.max_steps?)"),
        (
            ["stray"],
            "stray: belongs to no option; quote a pattern ('*.txt') or a text with blanks, put commas between the "
            "values of a list, name an option for each value; --help lists all options",
        ),
        (["--training.max_steps"], "argument --training.max_steps: expected one argument"),
    ],
)
def test_refused_arguments(arguments: list[str], message: str) -> None:
    with pytest.raises(UserError) as caught:
        parse(*arguments)
    assert str(caught.value).startswith(message)


def test_help_lists_every_field_with_its_default_at_once() -> None:
    start = time.perf_counter()
    done = run("scripts/train.py", "--help", COLUMNS="300", NO_COLOR="1")
    assert time.perf_counter() - start < 2
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("usage: train.py --config FILE [options]\n")
    said = " ".join(done.stdout.split())
    for name, section in SECTIONS.items():
        for field in dataclasses.fields(section):
            entry = said.partition(f" --{name}.{field.name} VALUE ")[2].partition(" --")[0]
            assert entry.startswith(field.metadata["help"])
            assert f"; default: {shown(field.default)})" in entry
    assert "(true or false; default: true) --training.amp_dtype VALUE" in said
    assert "[tensorboard|wandb|trackio|jsonl] (list of text; default: tensorboard)" in said
    assert "training options: --training.batch_size VALUE" in said and "data options: --data.dataset_name" in said
    assert said.index(" --training.init_from VALUE") < said.index(" --training.warmup_shape VALUE")


def test_mistakes_are_found_before_jax_is_imported() -> None:
    program = """
import sys
from jaxlm.commands.parser import Parser, add_config_options, config_from
from jaxlm.config import validate
parser = Parser("test")
add_config_options(parser)
parser.add_argument("--config")
validate(config_from(parser.parse_args(["--config", "configs/small.py", "--training.max_steps", "3"])))
assert not {"jax", "flax", "numpy", "datasets", "tokenizers"} & set(sys.modules), sorted(sys.modules)
"""
    done = run("-c", program)
    assert (done.returncode, done.stderr) == (0, "")


def test_a_missing_file_is_found_before_jax_is_imported() -> None:
    program = """
import sys
from jaxlm.__main__ import run_named
from jaxlm.errors import UserError
try:
    run_named(["train", "--config", "small", "--data.train_files", ".,nowhere.txt"])
except UserError as error:
    assert str(error).startswith("data.train_files (nowhere.txt) does not exist"), error
assert "jax" not in sys.modules
"""
    done = run("-c", program)
    assert (done.returncode, done.stderr) == (0, "")


def test_file_and_overrides(tmp_path: Path) -> None:
    as_python, as_json = tmp_path / "c.py", tmp_path / "c.json"
    as_python.write_text(
        "from jaxlm.config import Config, DataConfig, ModelConfig\n"
        "width = 32\n"
        "config = Config(model=ModelConfig(d_model=2 * width, n_heads=2), data=DataConfig(train_files=['a']))\n"
    )
    as_json.write_text(json.dumps({"model": {"d_model": 64, "n_heads": 2}, "data": {"train_files": ["a"]}}))
    configs = []
    for file in (as_python, as_json):
        parser = Parser("test")
        parser.add_argument("--config")
        add_config_options(parser)
        arguments = parser.parse_args(["--config", str(file), "--model.d_model", "128", "--training.report_to", "[]"])
        configs.append(config_from(arguments))
    assert configs[0] == configs[1]
    config = configs[0]
    assert (config.model.d_model, config.model.n_heads, config.data.train_files) == (128, 2, ("a",))
    assert (config.training.report_to, config.model.d_ff) == ((), 3072)


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.name)
def test_shipped_configurations(path: Path) -> None:
    config = load_config(str(path))
    assert isinstance(config, Config)
    if path.suffix == ".py":
        assert ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))), "says what it is"
    validate(config)


@pytest.mark.parametrize(
    ("body", "code", "last_line"),
    [
        ("pass", 0, ""),
        ("raise UserError('one\\n  line')", 2, "error: one line"),
        ("raise Stopped('SIGTERM at step 3')", 75, "stopped: SIGTERM at step 3"),
        ("raise RunFailed('at step 3')", 1, "failed: at step 3"),
        ("raise RuntimeError('bug')", 1, "RuntimeError: bug"),
        ("os.kill(os.getpid(), signal.SIGTERM)", 75, "stopped: SIGTERM: stopped before the first update"),
        (
            "atexit.register(os.abort); os.kill(os.getpid(), signal.SIGINT)",  # as while JAX traces
            *(75, "stopped: SIGINT: stopped before the first update"),
        ),
    ],
)
def test_exit_codes(body: str, code: int, last_line: str) -> None:
    program = f"""
import atexit, os, signal
from jaxlm.commands.exits import run_and_exit
from jaxlm.errors import RunFailed, Stopped, UserError
def command():
    {body}
run_and_exit(command)
"""
    done = run("-c", program)
    assert (done.returncode, done.stdout) == (code, "")
    assert (done.stderr.splitlines() or [""])[-1].startswith(last_line)
    assert ("Traceback" in done.stderr) == ("bug" in body)


def test_a_full_device_is_told_in_one_line() -> None:
    done = run(
        "-c",
        "import jax\nfrom jaxlm.commands.exits import run_and_exit\n"
        "run_and_exit(lambda: jax.numpy.zeros(2**50).block_until_ready())",
    )
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith("failed: the device's memory is full: set model.gradient_checkpointing true, or ")
    assert "RESOURCE_EXHAUSTED" in done.stderr and done.stderr.count("\n") == 1


def test_second_signal_ends_at_once() -> None:
    program = """
import os, signal
from jaxlm.monitor.signals import StopRequest
with StopRequest() as stop:
    os.kill(os.getpid(), signal.SIGTERM)
    assert stop.signal is signal.SIGTERM
    print("noted", flush=True)
    os.kill(os.getpid(), signal.SIGINT)
    print("never")
"""
    done = run("-c", program)
    assert (done.returncode, done.stdout) == (128 + 2, "noted\n")


def test_handlers_are_put_back() -> None:
    program = """
import signal
from jaxlm.monitor.signals import STOP_SIGNALS, StopRequest
before = [signal.getsignal(number) for number in STOP_SIGNALS]
with StopRequest(at_once=True), StopRequest():
    assert [signal.getsignal(number) for number in STOP_SIGNALS] != before
assert [signal.getsignal(number) for number in STOP_SIGNALS] == before
"""
    assert run("-c", program).returncode == 0


@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_reader_that_goes_away_gets_no_complaint(unbuffered: str) -> None:
    program = "from jaxlm.commands.exits import run_and_exit\nrun_and_exit(lambda: (input(), print('x' * 100_000)))"
    with subprocess.Popen(
        [sys.executable, "-c", program],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=os.environ | {"PYTHONUNBUFFERED": unbuffered},
        text=True,
    ) as process:
        assert process.stdin
        assert process.stdout
        assert process.stderr
        process.stdout.close()
        process.stdin.write("\n")
        process.stdin.close()
        assert process.stderr.read() == ""
        assert process.wait(timeout=30) == 1


def test_stopped_is_not_an_error_of_the_user() -> None:
    assert not issubclass(Stopped, UserError)


IN_A_LIBRARY = """
import hashlib, os, threading
from jaxlm.commands.exits import run_and_exit
from jaxlm.monitor import signals
signals.GRACE = 0.2
threading.Timer(0.2, os.kill, (os.getpid(), {number})).start()
run_and_exit(lambda: hashlib.pbkdf2_hmac("sha256", b"", b"", 2**31 - 1))
"""


def test_signal_while_a_library_works() -> None:
    """Python would handle it when the call returns: in minutes, where the step is compiled or BPE trained."""
    program = IN_A_LIBRARY.format(number=int(signal.SIGTERM))
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=30)
    assert done.returncode == 75
    assert done.stderr.strip() == "stopped: SIGTERM: stopped before the first update; the same command starts again"


def test_a_terminal_without_a_size_gets_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    """As a container's may be: tqdm draws a bar of no width there, or hides all bars beyond the last line."""
    import fcntl
    import pty
    import select
    import struct
    import termios

    from jaxlm.monitor.progress import Progress

    for size, expected in (((0, 0), b"step 1/2  loss"), ((0, 80), b"step 1/2  loss"), ((24, 80), b"1/2 [")):
        master, slave = pty.openpty()
        fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", *size, 0, 0))
        with os.fdopen(slave, "w") as terminal:
            monkeypatch.setattr(sys, "stderr", terminal)
            progress = Progress(0, 2)
            progress.write({"train/loss": 3.0}, 1)
            progress.advance(1)
            progress.close()
            said = b""
            while expected not in said:  # the kernel hands over what was written when it comes to it
                assert select.select([master], [], [], 5)[0], said
                said += os.read(master, 4096)
        os.close(master)


def test_the_time_left_counts_no_compiling(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Neither that of the first update nor that of the first evaluation, each of a minute here; later ones count."""
    from jaxlm.monitor import progress as module

    shown = module.Progress(0, 100)
    for step, now in ((1, 60), (2, 61), (3, 122), (4, 123), (5, 124), (6, 129)):
        monkeypatch.setattr(module.time, "monotonic", lambda now=now: now)
        shown.write({"train/loss": 3.0} | ({"eval/loss": 3.0} if step % 3 == 0 else {}), step)
    left = [line.partition("left ")[2] for line in capsys.readouterr().err.splitlines()]
    assert left == ["", "01:38", "", "01:36", "01:35", "03:39"]


def test_inspect_shows_what_the_run_will_see(tmp_path: Path, corpus: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Every target of the first rows, once, in the order of the batches."""
    from jaxlm.__main__ import run_named
    from jaxlm.config.batches import Batches
    from jaxlm.data.loader import train_batches
    from jaxlm.run.text import prepare_text

    config = make_config(tmp_path, corpus)
    (tmp_path / "config.json").write_text(json.dumps(to_dict(config)))
    inspect = ["inspect", "--config", str(tmp_path / "config.json"), "--rows", "3", "--first", "1"]
    run_named([*inspect, "--training.tensor_parallel", "2"])  # as many devices as it takes
    of_two = capsys.readouterr().out
    run_named(inspect)
    assert (shown := capsys.readouterr().out) == of_two
    text = prepare_text(config, None)
    batch = next(iter(train_batches(text.rows, config.training.seed, Batches(4), 0)))
    assert [line.partition(" of ")[0] for line in shown.splitlines() if line.startswith("row")] == [
        "row 1", "row 2", "row 3"
    ]  # fmt: skip
    for row in (1, 2, 3):
        segments, targets = batch["segments"][0, row], batch["targets"][0, row]
        assert f"row {row} of the run: {(segments > 0).sum()} targets in 32 places, {segments.max()} piece" in shown
        for piece in range(1, segments.max() + 1):
            assert text.tokenizer.decode(targets[segments == piece]).strip() in shown
    assert "<begins>" in shown and "<ends>" in shown and ", all of its " in shown
    with pytest.raises(UserError, match=r"^--rows \(0\) must be at least 1$"):
        run_named(["inspect", "--config", "small", "--rows", "0"])


def test_help_and_version_are_commands_too(capsys: pytest.CaptureFixture[str]) -> None:
    from jaxlm import __version__
    from jaxlm.__main__ import run_named

    for arguments, said in ((["help"], "commands:"), (["help", "train"], "--dry_run"), (["version"], __version__)):
        with pytest.raises(SystemExit, match="0"):
            run_named(arguments)
        assert said in capsys.readouterr().out


def test_a_stray_file_is_told_its_option(tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("x")
    with pytest.raises(
        UserError, match=r"text\.txt: belongs to no option; text is named by --data\.train_files; quote"
    ):
        parse(str(tmp_path / "text.txt"))

"""Whatever a user gets wrong ends with exit code 2 and one line on stderr that names it; never with a traceback.

Starting a process with JAX costs seconds, so most cases run in one: the scripts themselves, one after the other.
"""

import dataclasses
import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import make_config
from forked import Server

from jaxlm import Trainer
from jaxlm.checkpoints.manifest import MANIFEST, seal
from jaxlm.config import load_config, replace_fields, to_dict

ROOT = Path(__file__).parents[1]
TRAIN, EVALUATE, GENERATE, EXPORT = (
    str(ROOT / "scripts" / f"{name}.py") for name in ("train", "evaluate", "generate", "export")
)

DRIVER = """
import contextlib, io, json, os, runpy, sys, traceback

def run(case):
    out, err, code = io.StringIO(), io.StringIO(), 0
    known = dict(os.environ)
    os.chdir(case["folder"])
    os.environ.update(case["environment"])
    sys.modules.update(dict.fromkeys(case["missing"]))  # None is what stands for a package that is not there
    sys.argv = case["command"]
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            runpy.run_path(sys.argv[0], run_name="__main__")
        except SystemExit as end:
            code = end.code
        except BaseException:
            traceback.print_exc()
            code = 1
    os.environ.clear()
    os.environ.update(known)
    for name in case["missing"]:
        sys.modules.pop(name)
    return {"code": code, "stdout": out.getvalue(), "stderr": err.getvalue()}

with open(sys.argv[1]) as cases:
    todo = json.load(cases)
print(json.dumps([run(case) for case in todo]))
"""


@dataclasses.dataclass(frozen=True)
class Case:
    """A command, and what its error must name."""

    command: list[str]
    message: str  # a regular expression; {folder} is the place of this case's files
    files: dict[str, str | bytes] = dataclasses.field(default_factory=dict)
    environment: dict[str, str] = dataclasses.field(default_factory=dict)
    missing: tuple[str, ...] = ()
    damage: Callable[[Path], object] = lambda run: None  # done to {run}, a copy of a run of 4 updates


def train(message: str, *arguments: str, **more) -> Case:
    return Case([TRAIN, "--config", "{config}", *arguments], message, **more)


def configured(file: str, content: str | bytes, message: str) -> Case:
    return Case([TRAIN, "--config", f"{{folder}}/{file}"], message, files={file: content})


def text(file: str, content: str | bytes, message: str, *arguments: str) -> Case:
    files = ["--data.train_files", f"{{folder}}/{file}", "--data.validation_files", "[]", *arguments]
    return train(message, *files, files={file: content})


def on_run(message: str, *arguments: str, damage: Callable[[Path], object] = lambda run: None) -> Case:
    return train(message, "--training.checkpoint_dir", "{run}", *arguments, damage=damage)


def edit_model(folder: Path, name: str, text: str) -> None:
    """Changes a file of a saved folder, and its manifest accordingly."""
    (folder / name).write_text(text)
    (folder / MANIFEST).unlink()
    seal(folder, folder)


def largest_file(folder: Path) -> Path:
    return max((path for path in folder.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)


SIMPLE = {
    # the command line
    "misspelt option": train(r"--training\.max_step: .*did you mean --training\.max_steps", "--training.max_step", "3"),
    "no config": Case([TRAIN], r"required: --config"),
    "no value": train(r"--training\.seed: expected one argument", "--training.seed"),
    "wrong type": train(r"training\.max_steps \('many'\) must be int or none", "--training.max_steps", "many"),
    "wrong flag": train(r"training\.use_amp \('yes'\) must be true or false", "--training.use_amp", "yes"),
    "unknown choice": train(
        r"training\.lr_scheduler \(cosin\) is not one of .*\(did you mean cosine\?\)",
        "--training.lr_scheduler",
        "cosin",
    ),
    "out of bounds": train(r"model\.dropout \(1\.0\) must be less than 1", "--model.dropout", "1"),
    "not a number": train(
        r"training\.learning_rate \(nan\) must be a finite number", "--training.learning_rate", "nan"
    ),
    "list of numbers": train(
        r"data\.train_files \('\[1\]'\) holds something else than text", "--data.train_files", "[1]"
    ),
    "number beyond int32": train(
        r"training\.max_steps \(9{{20}}\) must be .* at most 2147483647", "--training.max_steps", "9" * 20
    ),
    "lists in lists": train(r"data\.train_files \('\[\[\[.*is not a JSON list", "--data.train_files", "[" * 100_000),
    "nobody's folder": train(
        r"training\.checkpoint_dir \(~no_such_user/run\): there is no such user",
        "--training.checkpoint_dir",
        "~no_such_user/run",
    ),
    "heads": train(r"model\.n_heads \(5\) must divide model\.d_model \(32\)", "--model.n_heads", "5"),
    "too long": train(r"data\.max_length \(64\) exceeds model\.max_seq_len \(32\)", "--data.max_length", "64"),
    "deepspeed file alone": train(r"training\.use_deepspeed", "--training.deepspeed_config", "ds.json"),
    "deepspeed file missing": train(
        r"deepspeed_config \(none\.json\)",
        "--training.use_deepspeed",
        "true",
        "--training.deepspeed_config",
        "none.json",
    ),
    "tensor parallel": train(
        r"training\.tensor_parallel \(3\) must divide model\.n_heads \(2\)", "--training.tensor_parallel", "3"
    ),
    "heads of keys over devices": train(
        r"training\.tensor_parallel \(2\) must divide model\.n_kv_heads \(1\)",
        "--model.n_kv_heads",
        "1",
        "--training.tensor_parallel",
        "2",
    ),
    "optax's that needs more": train(
        r"training\.optimizer \(optax\.sophia\) is not one of adamw, adam, sgd",
        "--training.optimizer",
        "optax.sophia",
    ),
    "zero group": train(
        r"training\.zero_group_size \(4\) must divide 1, the number of devices, and", "--training.zero_group_size", "4"
    ),
    "some flags of several processes": train(r"--num_processes, --process_id: missing", "--coordinator_address", "a:1"),
    "process id": train(
        r"--process_id \(2\) must be from 0 to 1, of 2",
        "--coordinator_address=a:1",
        "--num_processes=2",
        "--process_id=2",
    ),
    "validation alone": train(
        r"data\.validation_files is set but data\.train_files is not", "--data.train_files", "[]"
    ),
    "guide's checkpoint": train(
        r"training\.resume_from_checkpoint \(checkpoint-10000\.pt\): .* use checkpoint_10000$",
        "--resume_from_checkpoint",
        "checkpoint-10000.pt",
    ),
    # configuration files
    "config missing": Case([TRAIN, "--config", "{folder}/none.py"], r"--config \({folder}/none\.py\): no such file"),
    "config is a folder": Case([TRAIN, "--config", "{folder}"], r"--config \({folder}\): is a folder"),
    "config of another kind": configured("c.yaml", "model: {}", r"c\.yaml\): must end in \.py or \.json"),
    "syntax error": configured("c.py", "x = 1\nconfig = Config(\n", r"c\.py\): line 2: .*never closed"),
    "config raises": configured("c.py", "x = 1\ny = x / 0\n", r"c\.py\): line 2: ZeroDivisionError: division by zero"),
    "config raises an error of its own": configured(
        "c.py", "class Odd(Exception): pass\nraise Odd('so')\n", r"c\.py\): line 2: Odd: so"
    ),
    "config imports what is not there": configured("c.py", "import nosuch", r"line 1: ModuleNotFoundError: .*nosuch"),
    "unknown field in Python": configured(
        "c.py",
        "from jaxlm.config import *\n\nconfig = Config(model=ModelConfig(d_modle=3))",
        r"c\.py\): line 3: TypeError: .*'d_modle'",
    ),
    "a dict for a section": configured(
        "c.py",
        "from jaxlm.config import *\nconfig = Config(model={'d_model': 3})",
        r"c\.py\): line 2: TypeError: model .* must be a ModelConfig",
    ),
    "no config in it": configured("c.py", "configuration = 1", r"c\.py\): must define `config = Config\(\.\.\.\)`"),
    "config not UTF-8": configured("c.json", b'{"model": "\xff"}', r"c\.json\): not readable as JSON: .*utf-8"),
    "broken JSON": configured("c.json", '{"model": {', r"c\.json\): not readable as JSON: .*line 1 column"),
    "JSON of another kind": configured("c.json", "[]", r'c\.json\): expected {{"model": '),
    "unknown section": configured(
        "c.json", '{"trainng": {}}', r"unknown section 'trainng' \(did you mean training\?\)"
    ),
    "unknown field": configured(
        "c.json",
        '{"model": {"d_modle": 3}}',
        r"c\.json\): model\.d_modle: unknown field \(did you mean model\.d_model\?\)",
    ),
    "field of another section": configured(
        "c.json", '{"model": {"max_length": 3}}', r"unknown field \(did you mean data\.max_length\?\)"
    ),
    "JSON without end": configured("c.json", "[" * 100_000, r"c\.json\): not readable as JSON: .*recursion"),
    "number of 5000 digits": configured("c.json", "9" * 5000, r"c\.json\): not readable as JSON: .*4300 digits"),
    "NUL in a path": configured(
        "c.json",
        '{"training": {"checkpoint_dir": "a\\u0000b"}}',
        r"training\.checkpoint_dir \('a\\x00b'\) holds a NUL character",
    ),
    "a name too long": Case([TRAIN, "--config", "c" * 5000 + ".py"], r"c\.py\): no such file"),
    "config exits": configured("c.py", "import sys\nsys.exit()\n", r"c\.py\): line 2: SystemExit"),
    "number too long to show": configured(
        "c.py",
        "from jaxlm.config import *\nconfig = Config(model=ModelConfig(d_model=10**5000))",
        r"model\.d_model \(int too large to show\) must be a finite number, at most 2147483647",
    ),
    # other commands' options
    "temperature": Case(
        [GENERATE, "--model", "x", "--temperature", "-1"],
        r"--temperature \(-1\.0\) must be at least 0",
    ),
    "top_p": Case([GENERATE, "--model", "x", "--top_p", "0"], r"--top_p \(0\.0\) must be greater than 0"),
    "samples": Case([GENERATE, "--model", "x", "--num_samples", "0"], r"--num_samples \(0\) must be at least 1"),
    "top_k": Case([GENERATE, "--model", "x", "--top_k", "few"], r"--top_k \('few'\) must be int"),
    "no model": Case([GENERATE, "--prompt", "x"], r"required: --model"),
    "batch size": Case([EVALUATE, "--model", "x", "--batch_size", "0"], r"batch_size \(0\) must be at least 1"),
    "an option of training": Case(
        [EVALUATE, "--model", "x", "--training.seed", "1"], r"--training\.seed: unknown option"
    ),
    "beams of samples": Case(
        [GENERATE, "--model", "x", "--num_beams", "4", "--temperature", "1"], r"--num_beams \(4\) takes no samples"
    ),
    "no such prompts": Case(
        [GENERATE, "--model", "x", "--prompts_file", "{folder}/none.txt"],
        r"--prompts_file \({folder}/none\.txt\): no such file",
    ),
    "a prompt and the keyboard": Case(
        [GENERATE, "--model", "x", "--prompt", "a", "--interactive"], r"--interactive takes no --prompt"
    ),
    "stream": Case([GENERATE, "--model", "x", "--stream", "maybe"], r"--stream \('maybe'\) must be true or false"),
    "empty stop": Case([GENERATE, "--model", "x", "--stop", ""], r"--stop \(\) is empty"),
    "large seed": Case([GENERATE, "--model", "x", "--seed", "99999999999999999999"], r"--seed \(9{{20}}\) must be"),
    # devices
    "world size": train(
        r"training\.world_size \(8\) differs from the number of devices found, 1", "--training.world_size", "8"
    ),
    "long sample prompt": train(
        r"training\.sample_prompt \(\d+ tokens with <bos>\) exceeds model\.max_seq_len \(32\); shorten it",
        *("--training.sample_prompt", "word " * 40, "--training.sample_tokens", "5"),
    ),
    "several processes": train(
        r"WORLD_SIZE \(2\): start one process a host, without this launcher", environment={"WORLD_SIZE": "2"}
    ),
    "nccl without GPUs": train(
        r"training\.distributed_backend \(nccl\) does not fit cpu devices", "--training.distributed_backend", "nccl"
    ),
    # folders
    "unwritable folder": train(
        r"training\.checkpoint_dir \({folder}/file/run\): cannot be written to \(Not a directory\)",
        "--training.checkpoint_dir",
        "{folder}/file/run",
        files={"file": ""},
    ),
    "folder is a file": train(
        r"training\.checkpoint_dir \({folder}/file\): cannot be written to",
        "--training.checkpoint_dir",
        "{folder}/file",
        files={"file": ""},
    ),
    "unwritable cache": train(
        r"data\.cache_dir \({folder}/file/cache\) cannot be written to",
        "--data.cache_dir",
        "{folder}/file/cache",
        files={"file": ""},
    ),
    "wandb missing": train(
        r'training\.report_to \(wandb\): the package is not installed; pip install -e "\.\[wandb\]"',
        "--training.report_to",
        "wandb",
        missing=("wandb",),
    ),
    "trackio missing": train(
        r'training\.report_to \(trackio\): the package is not installed; pip install -e "\.\[trackio\]"',
        "--training.report_to",
        "trackio",
        missing=("trackio",),
    ),
    "no such sink": train(
        r"training\.report_to \(mine:Sink\): No module named 'mine'; put the module into this folder or",
        "--training.report_to",
        "mine:Sink",
    ),
    # text
    "no such file": train(r"data\.train_files \(none\.txt\) does not exist", "--data.train_files", "none.txt"),
    "glob without match": train(r"data\.train_files \(no\*\.txt\) matches no file", "--data.train_files", "no*.txt"),
    "empty file": text("a.txt", "", r"data\.train_files \({folder}/a\.txt\) is empty"),
    "not UTF-8": text(
        "a.txt", b"caf\xe9", r"a\.txt\) is not UTF-8 \(byte 0xe9 at character 4\).*data\.on_bad_document skip"
    ),
    "bad line": text(
        "a.jsonl",
        '{"text": "a"}\n{"text": \n',
        r"a\.jsonl\): line 2: bad JSON at character 11: .*data\.on_bad_document skip",
    ),
    "nothing but bad lines": text(
        "a.jsonl",
        '{"text": \n',
        r"holds no text; 1 bad document\(s\) left out: .*line 1",
        "--data.on_bad_document=skip",
    ),
    "no such column": text("a.csv", "body,n\nx,1\n", r"data\.text_column \(text\): not in .*a\.csv\).*: body, n"),
    "documents too short": text("a.jsonl", '{"text": "a"}\n' * 40, r"data\.min_length \(10\)"),
    "unknown data set": train(
        r"data\.dataset_name \(wikitxt\) is not a Hub name .*\(did you mean wikitext\?\).*--data\.train_files",
        *("--data.dataset_name", "wikitxt", "--data.train_files", "[]", "--data.validation_files", "[]"),
    ),
    # tokenizers
    "no tokenizer": train(
        r"data\.tokenizer_path \({folder}/none\.json\): no such file", "--data.tokenizer_path", "{folder}/none.json"
    ),
    "corrupt tokenizer": train(
        r"data\.tokenizer_path \({folder}/tokenizer\.json\) is not a tokenizer\.json",
        "--data.tokenizer_path",
        "{folder}/tokenizer.json",
        files={"tokenizer.json": '{"version": "1.0", "model"'},
    ),
    # checkpoints
    "no such checkpoint": train(
        r"training\.resume_from_checkpoint \({folder}/none\): no such folder",
        "--resume_from_checkpoint",
        "{folder}/none",
    ),
    "no checkpoint": train(
        r"training\.resume_from_checkpoint \({folder}\): is not a checkpoint", "--resume_from_checkpoint", "{folder}"
    ),
    "nothing to start from": train(
        r"training\.init_from \({folder}/none\): no such folder$", "--training.init_from", "{folder}/none"
    ),
    "no model to start from": train(
        r"training\.init_from \({folder}\): holds no model; name a best_model.*transformers",
        "--training.init_from",
        "{folder}",
    ),
    "no such model": Case([EVALUATE, "--model", "{folder}/none"], r"{folder}/none: no such folder"),
    "a file for a model": Case([EVALUATE, "--model", "{folder}/a.json"], r"a\.json: is a file", files={"a.json": "{}"}),
    "no model there": Case([GENERATE, "--model", "{folder}"], r"{folder}: holds no model; name a best_model"),
}

ON_RUN = {
    "cudnn without a GPU": train(
        r"model\.attention \(cudnn\) needs an NVIDIA GPU",
        *("--model.attention", "cudnn", "--data.pack_sequences", "false", "--training.use_amp", "true"),
    ),
    "another configuration": on_run(
        r"{run}/checkpoint_4 was trained with another .*: model\.dropout was 0\.0, is 0\.1; "
        r"training\.learning_rate was 0\.01, is 0\.5\. Set it back.*--training\.checkpoint_dir.*--fresh",
        *("--training.learning_rate", "0.5", "--model.dropout", "0.1", "--training.logging_steps", "3"),
    ),
    "bad documents skipped from now on": on_run(
        r'data\.on_bad_document was "stop", is "skip".*--training\.init_from {run}/', "--data.on_bad_document", "skip"
    ),
    "other text": on_run(
        r"data: the text is not the one that {run}/checkpoint_4 was trained on",
        damage=lambda run: (run.parent / "train.jsonl").write_text('{"text": "other words"}\n' * 50),
    ),
    "run for a checkpoint": train(
        r"\({run}\): is not a checkpoint folder; name one .* such as {run}/checkpoint_4$",
        "--resume_from_checkpoint",
        "{run}",
    ),
    "model for a checkpoint": train(
        r"\({run}/best_model\): is not a checkpoint", "--resume_from_checkpoint", "{run}/best_model"
    ),
    "a checkpoint beyond the run's end": on_run(
        r"{run}/checkpoint_4 is of step 4, and this run would end at 2; raise training\.num_epochs or",
        *("--resume_from_checkpoint", "{run}/checkpoint_4", "--training.max_steps", "2"),
    ),
    "damaged parameters": on_run(
        r"{run}: all of its checkpoints \(1\) are damaged, the last: params/\S+ is missing",
        damage=lambda run: largest_file(run / "checkpoint_4" / "params").unlink(),
    ),
    "parameters cut short": on_run(
        r"damaged, the last: params/\S+ is not as it was saved",
        damage=lambda run: os.truncate(largest_file(run / "checkpoint_4" / "params"), 100),
    ),
    "damaged optimizer": on_run(
        r"damaged, the last: optimizer/\S+ is missing",
        damage=lambda run: largest_file(run / "checkpoint_4" / "optimizer").unlink(),
    ),
    "no progress": on_run(
        r"damaged, the last: progress/progress\.json is missing",
        damage=lambda run: (run / "checkpoint_4" / "progress" / "progress.json").unlink(),
    ),
    "other progress": on_run(
        r"damaged, the last: progress/progress\.json is not as it was saved",
        damage=lambda run: (run / "checkpoint_4" / "progress" / "progress.json").write_text('{"step": 4}'),
    ),
    "config cut short": on_run(
        r"damaged, the last: config/config\.json is not as",
        damage=lambda run: os.truncate(run / "checkpoint_4" / "config" / "config.json", 50),
    ),
    "tokenizer gone": on_run(
        r"damaged, the last: tokenizer/tokenizer\.json is missing",
        damage=lambda run: (run / "checkpoint_4" / "tokenizer" / "tokenizer.json").unlink(),
    ),
    "damaged model": Case(
        [GENERATE, "--model", "{run}/best_model"],
        r"{run}/best_model is damaged: params/\S+ is missing; name another",
        damage=lambda run: largest_file(run / "best_model" / "params").unlink(),
    ),
    "long prompt": Case(
        [GENERATE, "--model", "{run}/best_model", "--prompt", "word " * 40],
        r"prompt \(\d+ tokens with <bos>\) exceeds model\.max_seq_len \(32\); shorten it",
    ),
    "streaming of several texts": Case(
        [GENERATE, "--model", "{run}/best_model", "--stream", "true", "--num_samples", "2"],
        r"--stream \(true\) shows one text",
    ),
    "config of a later version": Case(
        [GENERATE, "--model", "{run}/best_model"],
        r"{run}/best_model: model\.new_field: unknown field",
        damage=lambda run: edit_model(run / "best_model", "config/config.json", '{"model": {"new_field": 1}}'),
    ),
    "progress of a later version": Case(
        [GENERATE, "--model", "{run}/best_model"],
        r"{run}/best_model/progress/progress\.json: not readable .* another version",
        damage=lambda run: edit_model(run / "best_model", "progress/progress.json", '{"step": 4}'),
    ),
    "parameters of another model": Case(
        [GENERATE, "--model", "{run}/best_model"],
        r"{run}/best_model/params: is of another model",
        damage=lambda run: edit_model(
            run / "best_model",
            "config/config.json",
            (run / "best_model/config/config.json").read_text().replace('"d_model": 32', '"d_model": 64'),
        ),
    ),
    "model that was not saved to its end": Case(
        [GENERATE, "--model", "{run}/best_model"],
        r"{run}/best_model is damaged: manifest\.json is missing",
        damage=lambda run: (run / "best_model" / MANIFEST).unlink(),
    ),
    "rows longer than the model": Case(
        [EVALUATE, "--model", "{run}/best_model", "--data.max_length", "64"],
        r"data\.max_length \(64\) exceeds model\.max_seq_len \(32\)",
    ),
    "another architecture than the one to start from": train(
        r"training\.init_from \({run}/best_model\) has another architecture: model\.n_layers is 5, there 1\. Leave",
        *("--training.init_from", "{run}/best_model", "--model.n_layers", "5"),
    ),
    "another model to start from": on_run(
        r'training\.init_from was null, is "{run}/best_model"', "--training.init_from", "{run}/best_model"
    ),
    "export into a folder in use": Case(
        [EXPORT, "--model", "{run}/best_model", "--to", "{run}"], r"--to \({run}\): is not empty; name another"
    ),
    "export without a size": Case(
        [EXPORT, "--model", "{run}/best_model", "--to", "{folder}/out", "--max_shard_size", "5"],
        r"--max_shard_size \(5\) must be a number with a unit from K to T",
    ),
    "export as another type": Case(
        [EXPORT, "--model", "{run}/best_model", "--to", "{folder}/out", "--dtype", "bf16"],
        r"--dtype \(bf16\) is not one of float32, bfloat16, float16",
    ),
    "export to where nothing can be written": Case(
        [EXPORT, "--model", "{run}/best_model", "--to", "{folder}/config.json/out"],
        r"--to \({folder}/config\.json/out\): cannot be written \((Not a directory|File exists)\)",
    ),
    "nothing to evaluate": Case(
        [EVALUATE, "--model", "{run}/best_model", "--data.validation_files", "none.txt"],
        r"data\.(train|validation)_files \(none\.txt\) does not exist",
    ),
}


ENVIRONMENT = os.environ | {"JAX_NUM_CPU_DEVICES": "1"}


def prepare_folder(folder: Path, corpus: Path) -> None:
    """Fills a user's working folder: some text, and config.json that trains on it."""
    folder.mkdir()
    for name in ("train.jsonl", "validation.jsonl"):
        shutil.copy(corpus / name, folder)
    here = {"data.train_files": ("train.jsonl",), "data.validation_files": ("validation.jsonl",)}
    config = make_config(folder, corpus, **here, **{"model.n_layers": 1})
    (folder / "config.json").write_text(json.dumps(to_dict(config)))


def run(command: list[str], folder: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *command],
        cwd=folder,
        env=ENVIRONMENT | environment,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def run_cases(cases: dict[str, Case], root: Path, corpus: Path, finished: Path | None) -> dict[str, tuple[dict, str]]:
    """What each case gave, and the expression that its message must match."""
    todo, messages = [], []
    for number, case in enumerate(cases.values()):
        folder = root / f"case{number}"
        prepare_folder(folder, corpus)
        if finished is not None:
            shutil.copytree(finished, folder / "finished")
        for name, content in case.files.items():
            (folder / name).write_bytes(content.encode() if isinstance(content, str) else content)
        case.damage(folder / "finished")
        names = {"folder": str(folder), "run": str(folder / "finished"), "config": str(folder / "config.json")}
        command = [argument.format(**names) for argument in case.command]
        missing, environment = case.missing, case.environment
        todo.append({"folder": str(folder), "command": command, "environment": environment, "missing": missing})
        messages.append(case.message.format(**{name: re.escape(value) for name, value in names.items()}))
    (root / "cases.json").write_text(json.dumps(todo))
    done = run(["-c", DRIVER, str(root / "cases.json")], root)
    assert done.returncode == 0, done.stderr
    return dict(zip(cases, zip(json.loads(done.stdout.splitlines()[-1]), messages, strict=True), strict=True))


def check(code: int, stdout: str, stderr: str, message: str) -> None:
    """One line that says what is wrong, after what was reported before it; and nothing on stdout."""
    assert "Traceback" not in stderr, stderr
    assert (code, stdout) == (2, ""), stderr
    *before, last = stderr.splitlines()
    assert last.startswith("error: ")
    assert not [line for line in before if "error" in line.lower()]
    assert re.search(message, last), last


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("bad")


@pytest.fixture(scope="module")
def simple(root: Path, corpus: Path) -> dict[str, tuple[dict, str]]:
    (root / "simple").mkdir()
    return run_cases(SIMPLE, root / "simple", corpus, None)


@pytest.fixture(scope="module")
def finished(root: Path, corpus: Path, server: Server) -> Path:
    """The folder of a run of 4 updates, trained by the command."""
    prepare_folder(root / "good", corpus)
    out, err = root / "good" / "out", root / "good" / "err"
    command = [TRAIN, "--config", "config.json", "--training.checkpoint_dir", "run"]
    code = server.start(command, root / "good", out, err, 1).wait()
    assert (code, out.read_text()) == (0, ""), err.read_text()
    return root / "good" / "run"


@pytest.fixture(scope="module")
def on_finished(root: Path, corpus: Path, finished: Path) -> dict[str, tuple[dict, str]]:
    (root / "on_run").mkdir()
    return run_cases(ON_RUN, root / "on_run", corpus, finished)


@pytest.mark.parametrize("name", SIMPLE)
def test_mistake_is_one_line(simple: dict[str, tuple[dict, str]], name: str) -> None:
    result, message = simple[name]
    check(**result, message=message)


def test_good_run_is_not_refused(finished: Path) -> None:
    there = {"config.json", "tokenizer", "metrics.jsonl", "checkpoint_4", "best_model", "final_model"}
    assert there <= {path.name for path in finished.iterdir()}


@pytest.mark.parametrize("name", ON_RUN)
def test_mistake_with_a_run_is_one_line(on_finished: dict[str, tuple[dict, str]], name: str) -> None:
    result, message = on_finished[name]
    check(**result, message=message)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--config", "none.py"], r"--config \(none\.py\): no such file"),
        (["--config", "config.json", "--training.max_step", "3"], r"did you mean --training\.max_steps"),
        (
            ["--config", "config.json", "--model.n_heads", "5"],
            r"model\.n_heads \(5\) must divide model\.d_model \(32\)",
        ),
        (
            ["--config", "config.json", "--data.train_files", "none.txt"],
            r"data\.train_files \(none\.txt\) does not exist",
        ),
    ],
)
def test_in_a_process_of_its_own(tmp_path: Path, corpus: Path, arguments: list[str], message: str) -> None:
    prepare_folder(tmp_path / "here", corpus)
    done = run(["-W", "error", TRAIN, *arguments], tmp_path / "here")
    check(done.returncode, done.stdout, done.stderr, message)
    assert len(done.stderr.splitlines()) == 1


def test_skipped_documents_are_reported(
    tmp_path: Path, corpus: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    prepare_folder(tmp_path / "here", corpus)
    with (tmp_path / "here" / "train.jsonl").open("ab") as file:
        file.write(b'{"text": ""}\n{"text": "caf\xe9"}\n{"text": "a')
    monkeypatch.chdir(tmp_path / "here")
    config = replace_fields(load_config("config.json"), {"data.on_bad_document": "skip"})
    for _ in range(2):  # the second one finds the tokens in the cache
        Trainer(config)
        said = capsys.readouterr().err
        assert "training text: 1 empty document left out\n" in said
        expected = (
            r"training text: 2 bad document\(s\) left out: .*\(train\.jsonl\): line 122 is not UTF-8 .*line 123: bad"
        )
        assert re.search(expected, said), said


def test_hub_out_of_reach(tmp_path: Path, corpus: Path) -> None:
    prepare_folder(tmp_path / "here", corpus)
    files = ["--data.train_files", "[]", "--data.validation_files", "[]"]
    start = time.perf_counter()
    closed = {"HF_ENDPOINT": "http://127.0.0.1:9", "HF_HOME": str(tmp_path)}
    done = run([TRAIN, "--config", "config.json", *files], tmp_path / "here", **closed)
    assert time.perf_counter() - start < 30
    check(done.returncode, done.stdout, done.stderr, r"data\.dataset_name \(wikitext\): .* --data\.train_files")

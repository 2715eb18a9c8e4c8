"""The wheel holds the whole program, and the command `jaxlm` that it installs works anywhere."""

import json
import os
import shutil
import subprocess
import sys
import sysconfig
import venv
import zipfile
from importlib.util import find_spec
from pathlib import Path

import pytest

import jaxlm
from jaxlm.__main__ import COMMANDS
from jaxlm.config import load_config
from jaxlm.errors import UserError

ROOT = Path(__file__).parents[1]
BUILD = "import sys; from setuptools import build_meta; print(build_meta.build_wheel(sys.argv[1]))"


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    for name in ("jaxlm", "configs"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    subprocess.run([sys.executable, "-c", BUILD, str(out)], cwd=source, check=True, capture_output=True, timeout=120)
    (built,) = out.glob("*.whl")
    return built


def run(command: list[object], folder: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    known = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}  # may name the checkout
    return subprocess.run(
        [str(part) for part in command],
        cwd=folder,
        env=known | environment,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def test_the_wheel_holds_every_module_and_configuration(wheel: Path) -> None:
    held = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    files = {path.relative_to(ROOT).as_posix() for path in (ROOT / "jaxlm").rglob("*") if path.is_file()}
    files = {name for name in files if "/__pycache__/" not in name}
    configs = {f"jaxlm/configs/{path.name}" for path in (ROOT / "configs").iterdir() if path.suffix != ".pyc"}
    configs -= {"jaxlm/configs/__pycache__"}
    assert held == files | configs
    assert wheel.name.split("-")[1] == jaxlm.__version__


def test_the_command_works_from_any_folder(wheel: Path, tmp_path: Path) -> None:
    if find_spec("pip") is None:
        pytest.skip("pip is not here")
    home, elsewhere = tmp_path / "venv", tmp_path / "elsewhere"
    elsewhere.mkdir()
    venv.create(home, with_pip=False)
    python, program = home / "bin" / "python", home / "bin" / "jaxlm"
    site = next((home / "lib").glob("python*/site-packages"))
    (site / "dependencies.pth").write_text(sysconfig.get_path("purelib"))  # an editable jaxlm there stays unseen
    done = run(
        [sys.executable, "-m", "pip", "--python", python, "install", "-q", "--no-deps", "--no-index", wheel], ROOT
    )
    assert done.returncode == 0, done.stderr

    assert run([program, "--version"], elsewhere).stdout == f"jaxlm {jaxlm.__version__}\n"
    assert run([python, "-c", "import jaxlm; print(jaxlm.__file__)"], elsewhere).stdout.startswith(str(home))
    done = run([program, "train", "--config", "small", "--model.n_heads", "3"], elsewhere)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "error: model.n_heads (3) must divide model.d_model (256)\n"
    done = run([program, "estimate-memory", "--config", "small", "--json"], elsewhere, JAX_PLATFORMS="cpu")
    assert json.loads(done.stdout)["total"] > 2**20
    assert list(elsewhere.iterdir()) == []


def test_help_comes_without_jax(tmp_path: Path) -> None:
    program = """
import sys
from jaxlm.__main__ import COMMANDS, program
said = program().format_help()
assert all(name in said for name in COMMANDS), said
heavy = {"jax", "flax", "numpy", "datasets", "tokenizers", "torch", "transformers", "matplotlib", "argcomplete"}
assert not heavy & set(sys.modules), heavy & set(sys.modules)
"""
    done = run([sys.executable, "-c", program], ROOT)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize("name", sorted(COMMANDS))
def test_every_command_has_help_and_a_script(
    name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from jaxlm.__main__ import main

    monkeypatch.setenv("COLUMNS", "100")
    shown = []
    for called in ([name], [name.replace("_", "-")]):
        monkeypatch.setattr(sys, "argv", ["jaxlm", *called, "--help"])
        with pytest.raises(SystemExit, match="0"):
            main()
        shown.append(capsys.readouterr().out)
    assert all(text.startswith("usage: jaxlm ") and COMMANDS[name].__doc__.strip() in text for text in shown)
    hidden = "inspect"  # a script of this name would stand in for Python's own module
    assert (ROOT / "scripts" / f"{name}.py").exists() == (name not in ("completion", hidden))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["trian"], "error: trian: unknown command (did you mean train?); jaxlm --help lists all\n"),
        (["--versoin"], "error: --versoin: unknown option (did you mean --version?); --help lists all\n"),
        (
            ["train", "--confg", "x"],
            "error: --confg: unknown option (did you mean --config?); --help lists all\n",
        ),
        (["train"], "error: the following arguments are required: --config (such as --config small); --help lists all"),
        (["export", "--out", "x"], "error: --out: unknown option (did you mean --to?); --help lists all\n"),
        (["train", "--config", "smal"], "error: --config (smal): no such file (did you mean small?); name a"),
    ],
)
def test_mistakes(
    arguments: list[str], message: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from jaxlm.__main__ import main

    monkeypatch.setattr(sys, "argv", ["jaxlm", *arguments])
    with pytest.raises(SystemExit, match="2"):
        main()
    assert capsys.readouterr().err.startswith(message)


def test_a_file_goes_before_a_shipped_configuration(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert load_config("small") == load_config(str(ROOT / "configs" / "small.py"))
    (tmp_path / "small").mkdir()
    with pytest.raises(UserError, match=r"--config \(small\): is a folder"):
        load_config("small")


@pytest.mark.parametrize(
    ("line", "offered"),
    [
        ("jaxlm tr", {"train"}),
        ("jaxlm train --training.opt", {"--training.optimizer"}),
        ("jaxlm train --training.optimizer lio", {"lion"}),
        ("jaxlm train --training.use_amp ", {"true", "false"}),
        ("jaxlm train --config smal", {"small"}),
        ("jaxlm estimate_memory --gpu H", {"H100", "H100\\ PCIE", "H100\\ NVL", "H200", "H200\\ NVL"}),
    ],
)
def test_completion(line: str, offered: set[str], tmp_path: Path) -> None:
    answer = tmp_path / "answer"
    asked = {"_ARGCOMPLETE": "1", "_ARGCOMPLETE_IFS": "\n", "_ARGCOMPLETE_STDOUT_FILENAME": str(answer)}
    where = {"COMP_LINE": line, "COMP_POINT": str(len(line)), "PYTHONPATH": str(ROOT)}
    run([sys.executable, "-m", "jaxlm"], tmp_path, **asked, **where)
    found = {word.strip() for word in answer.read_text().split("\n")}
    assert found == offered


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_is_code_of_the_shell(
    shell: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from jaxlm.__main__ import main

    monkeypatch.setattr(sys, "argv", ["jaxlm", "completion", shell])
    with pytest.raises(SystemExit, match="0"):
        main()
    code = capsys.readouterr().out
    assert "jaxlm" in code
    if shutil.which(shell):
        assert subprocess.run([shell, "-n"], input=code, text=True, check=False).returncode == 0

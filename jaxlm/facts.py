"""What is known at the start of a run: starts.jsonl in its folder, an object for each time that it was started."""

import json
import platform
import shlex
import subprocess
import sys
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import jaxlm
from jaxlm.data.packing import Plan
from jaxlm.sinks import open_lines

FILE = "starts.jsonl"
PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "datasets", "tokenizers", "numpy")


def of_program() -> dict[str, Any]:
    """The command, and the versions of what it runs on."""
    found = {name: installed for name in PACKAGES if (installed := _version(name)) is not None}
    return {
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "command": shlex.join(["python", *sys.orig_argv[1:]]),
        "commit": commit_of(Path(__file__).parents[1]),
        "versions": {"jaxlm": jaxlm.__version__, "python": platform.python_version()} | found,
        "system": f"{platform.system()} {platform.machine()}",
    }


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def commit_of(folder: Path) -> str | None:
    """The git commit checked out in `folder`, "-dirty" if files of it have changed; none if it is no clone."""
    if not (folder / ".git").exists():  # git would look in the folders above, too
        return None
    command = ["git", "-C", str(folder), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() or None


def of_plan(plan: Plan) -> dict[str, int | float]:
    """How documents were put into rows; `tokens` are those that the rows hold."""
    return {
        "rows": len(plan),
        "row_length": plan.max_length,
        "tokens": plan.pairs,
        "fill": plan.efficiency,
        "documents": plan.documents,
        "cut_documents": plan.cut_documents,
        "dropped_documents": plan.dropped_documents,
        "dropped_tokens": plan.dropped_tokens,
    }


def append(folder: Path, facts: dict[str, Any]) -> None:
    """Adds a start to the run in `folder`."""
    with open_lines(folder / FILE) as file:
        file.write(json.dumps(facts) + "\n")

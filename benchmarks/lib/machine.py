"""Facts about this machine and this checkout, for the head of a report."""

import os
import platform
import re
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]


def say(text: str) -> None:
    """Progress, on stderr."""
    print(text, file=sys.stderr, flush=True)


def without_paths(text: str) -> str:
    """`text` with the folders of absolute paths left out: results are published."""
    return re.sub(r"(?<![\w.])~?/(?:[^\s'\":/]+/)*", "", text)


def cpu_model() -> str:
    info = Path("/proc/cpuinfo")
    found = re.search(r"^model name\s*:\s*(.+)$", info.read_text(), re.MULTILINE) if info.is_file() else None
    return found[1].strip() if found else platform.processor() or platform.machine()


def cores() -> int:
    """CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def memory_bytes() -> int:
    """Physical memory of the machine."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def busy_seconds() -> float | None:
    """CPU time used since boot by everything on this machine; None where the system does not say (no Linux)."""
    stat = Path("/proc/stat")
    if not stat.is_file():
        return None
    user, nice, system, _idle, _iowait, irq, softirq, steal = map(int, stat.read_text().split()[1:9])
    return (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK")


def commit() -> str | None:
    """The checkout's commit, marked if files differ from it; None outside of a repository."""
    described = subprocess.run(
        ["git", "describe", "--always", "--dirty", "--abbrev=12"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    return described.stdout.strip() or None


def machine() -> dict[str, Any]:
    return {"cpu": cpu_model(), "cores": cores(), "memory_bytes": memory_bytes(), "system": platform.system()}


def own_versions(*names: str) -> dict[str, str]:
    """Of Python, and of the packages `names` and jaxlm as far as they are installed here."""
    found = {"python": platform.python_version()}
    for name in ("jaxlm", *names):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def versions_in(python: str, names: list[str]) -> dict[str, str]:
    """{package: version} of those of `names` that the interpreter `python` has."""
    code = (
        "import sys\nfrom importlib.metadata import PackageNotFoundError, version\n"
        "for name in sys.argv[1:]:\n"
        "    try: print(name, version(name))\n"
        "    except PackageNotFoundError: pass\n"
    )
    asked = subprocess.run([python, "-c", code, *names], capture_output=True, text=True, check=True)
    return dict(line.split() for line in asked.stdout.splitlines())

"""A file or a folder is written whole or not at all, also by several processes at once and after one was killed."""

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from jaxlm.data import atomic
from jaxlm.data.atomic import atomic_path, atomic_write

ROOT = Path(__file__).parents[1]
# Writes a file or a folder in two steps, with a pause between them, and prints a line when it begins.
WRITER = """
import sys, time
from pathlib import Path
from jaxlm.data.atomic import atomic_path
path, kind, text, pause = Path(sys.argv[1]), sys.argv[2], sys.argv[3], float(sys.argv[4])
print("started", flush=True)
try:
    with atomic_path(path) as part:
        if kind == "folder":
            part.mkdir()
        with (part / "file" if kind == "folder" else part).open("w") as file:
            file.write(text)
            file.flush()
            print("half", flush=True)
            time.sleep(pause)
            file.write(text)
except OSError as error:
    print(type(error).__name__)
"""


def writer(path: Path, kind: str, text: str, pause: float) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", WRITER, str(path), kind, text, str(pause)]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None and process.stdout.readline() == "started\n"
    return process


def content(path: Path) -> str:
    return (path / "file" if path.is_dir() else path).read_text()


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_several_processes_at_once_leave_one_whole(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "written"
    texts = [str(i) * 100_000 for i in range(4)]
    processes = [writer(path, kind, text, 0.2) for text in texts]
    while any(process.poll() is None for process in processes):
        assert not path.exists() or content(path) in [text * 2 for text in texts]
    outputs = [process.communicate()[0].splitlines() for process in processes]
    assert content(path) in [text * 2 for text in texts]
    assert list(tmp_path.iterdir()) == [path]
    late = [output for output in outputs if output != ["half"]]
    assert late == ([] if kind == "file" else [["half", "OSError"]] * 3), "of folders, the first one stays"


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_a_killed_process_leaves_no_harm(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "written"
    killed = writer(path, kind, "old", 60)
    assert killed.stdout is not None and killed.stdout.readline() == "half\n"
    waiting = writer(path, kind, "new", 0)
    time.sleep(0.2)
    assert waiting.poll() is None, "two processes write at once"
    killed.send_signal(signal.SIGKILL)
    killed.communicate()
    assert waiting.communicate(timeout=30)[0] == "half\n"
    assert content(path) == "newnew"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("leftover", ["file", "folder"])
def test_what_a_killed_process_left_is_removed(tmp_path: Path, leftover: str) -> None:
    (tmp_path / ".written.lock").touch()
    part = tmp_path / ".written.part"
    if leftover == "folder":
        part.mkdir()
        (part / "x").touch()
    else:
        part.touch()
    atomic_write(tmp_path / "written", "é")
    assert (tmp_path / "written").read_text(encoding="utf-8") == "é"
    assert [path.name for path in tmp_path.iterdir()] == ["written"]


def test_a_block_that_raises_leaves_the_old_content(tmp_path: Path) -> None:
    path = tmp_path / "written"
    atomic_write(path, "old")
    with pytest.raises(UnicodeEncodeError):
        atomic_write(path, "new" * 100_000 + "\udcff")
    with atomic_path(path):
        pass  # writes nothing, so nothing changes
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_folder_does_not_replace_another(tmp_path: Path) -> None:
    for name in ("empty", "full"):
        (tmp_path / name).mkdir()
    (tmp_path / "full" / "x").touch()
    with atomic_path(tmp_path / "empty") as part:
        part.mkdir()
        (part / "y").touch()
    with pytest.raises(OSError, match="not empty"), atomic_path(tmp_path / "full") as part:
        part.mkdir()
    assert sorted(str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*")) == [
        *("empty", "empty/y", "full", "full/x")
    ]


def test_a_lock_that_goes_while_a_shared_folder_is_synced_costs_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = atomic.sync

    def sync(path: Path) -> None:
        (path.parent / ".lock").unlink(missing_ok=True)  # by another process
        original(path)

    monkeypatch.setattr(atomic, "sync", sync)
    with atomic_path(tmp_path / "folder") as part:
        part.mkdir()
        for name in (".lock", "file"):
            (part / name).write_text("text")
    assert [path.name for path in (tmp_path / "folder").iterdir()] == ["file"]


def test_where_no_file_can_be_made_that_is_an_error_at_once(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="No such file or directory"):
        atomic_write(tmp_path / "missing" / "file", "text")
    assert not (tmp_path / "missing").exists()
    if Path("/proc").is_dir():
        with pytest.raises(OSError, match="No such file or directory"):
            atomic_write(Path("/proc/file"), "text")

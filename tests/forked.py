"""Processes for tests, forked from one that has imported JAX and done nothing else with it: an import takes seconds."""

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]

# Reads what to do, a line each. A child leaves the loop, and then is the program: it ends as any program ends.
SERVER = """
import json, os, runpy, sys, traceback, warnings
import jax
import jaxlm.trainer
import jaxlm.commands.train
import jaxlm.run.setup

warnings.simplefilter("ignore", RuntimeWarning)  # that JAX has threads: it has none before it looks for devices
todo = None
while todo is None and (line := sys.stdin.readline()):
    asked = json.loads(line)
    if "poll" in asked:
        pid, status = os.waitpid(asked["poll"], os.WNOHANG)
        answer = os.waitstatus_to_exitcode(status) if pid else None
    else:
        answer = os.fork()
        if answer == 0:
            todo = asked
            continue
    print(json.dumps(answer), flush=True)
if todo is None:
    sys.exit()
os.chdir(todo["folder"])
for descriptor, path in enumerate((os.devnull, todo["stdout"], todo["stderr"])):
    opened = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o666)
    os.dup2(opened, descriptor)
    os.close(opened)
warnings.resetwarnings()
os.environ.update(todo["environment"])
jax.config.update("jax_num_cpu_devices", todo["devices"])
sys.argv = todo["command"]
if sys.argv[0] == "-c":
    exec(sys.argv.pop(1), {"__name__": "__main__"})
else:
    runpy.run_path(sys.argv[0], run_name="__main__")
"""


@dataclasses.dataclass
class Process:
    """One that was started; as much of `subprocess.Popen` as is needed."""

    server: "Server"
    pid: int
    returncode: int | None = None

    def poll(self) -> int | None:
        if self.returncode is None:
            self.returncode = self.server.ask({"poll": self.pid})
        return self.returncode

    def wait(self, timeout: float = 300) -> int:
        deadline = time.monotonic() + timeout
        while self.poll() is None:
            assert time.monotonic() < deadline, f"process {self.pid} does not end"
            time.sleep(0.02)
        assert self.returncode is not None
        return self.returncode

    def send_signal(self, number: int) -> None:
        if self.poll() is None:  # else its number may be another's
            os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


class Server:
    """Starts processes with the environment that the tests have; a context that ends those that are left."""

    def __init__(self) -> None:
        self.started: list[Process] = []
        self.process = subprocess.Popen(
            [sys.executable, "-c", SERVER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT
        )

    def __enter__(self) -> "Server":
        return self

    def __exit__(self, *_: object) -> None:
        for process in self.started:
            process.kill()
        self.process.communicate()

    def ask(self, question: Mapping[str, object]) -> Any:
        assert self.process.stdin is not None and self.process.stdout is not None
        print(json.dumps(question), file=self.process.stdin, flush=True)
        return json.loads(self.process.stdout.readline())

    def start(
        self, command: list[str], folder: Path, stdout: Path, stderr: Path, devices: int, **environment: str
    ) -> Process:
        """`python COMMAND` in `folder`, which appends to these files; each with so many devices."""
        todo = {"command": command, "folder": str(folder), "stdout": str(stdout), "stderr": str(stderr)}
        pid = self.ask({**todo, "devices": devices, "environment": environment})
        self.started.append(Process(self, pid))
        return self.started[-1]

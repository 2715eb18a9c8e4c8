"""The contenders from outside: start them, let them take turns, end them."""

import contextlib
import json
import os
import pty
import signal
import subprocess
import sys
import termios
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lib.machine import busy_seconds, say, without_paths

ENVIRONMENT = {"CUDA_VISIBLE_DEVICES": "", "JAX_PLATFORMS": "cpu", "JAX_TRACEBACK_FILTERING": "off"}


def in_a_process(program: str, part: str, spec: dict[str, Any], environment: dict[str, str]) -> Any:
    """What `lib.worker.answer_part` answers in a new process of `program`; whatever else it prints goes to stderr."""
    command = [sys.executable, program, "--part", part, json.dumps(spec)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, env=os.environ | environment)
    return json.loads(done.stdout)


class WorkerFailed(RuntimeError):
    """A worker ended without an answer, or with an error; the message is the last line it wrote on stderr."""


class OutOfTime(RuntimeError):
    """A part was ended because its time was over."""


def stream(command: list[str], environment: dict[str, str], seconds: float) -> Iterator[dict[str, Any]]:
    """What `lib.worker.answers` writes in a process of its own, answer by answer; its stderr is shown.

    The process and all that it started are gone when this ends, however it ends.

    Raises:
      WorkerFailed: it ended with another exit code than 0.
      OutOfTime: it was still running after `seconds`.
    """
    process = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        errors="replace",
        start_new_session=True,
        env=os.environ | environment,
    )
    last, over = [""], threading.Event()

    def relay() -> None:
        for line in process.stderr:
            sys.stderr.write(line)
            last[0] = line.strip() or last[0]

    def end() -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)

    reader = threading.Thread(target=relay, daemon=True)
    timer = threading.Timer(seconds, lambda: (over.set(), end()))
    follower = threading.Thread(target=lambda: (process.wait(), end()), daemon=True)  # what it left behind goes, too
    for thread in (reader, timer, follower):
        thread.start()
    try:
        for line in process.stdout:
            yield json.loads(line)
        code = process.wait()
    finally:
        timer.cancel()
        end()
        for thread in (follower, reader):
            thread.join()
        process.stdout.close()
        process.stderr.close()
    if over.is_set():
        raise OutOfTime(f"ended after {seconds:.0f} s")
    if code:
        raise WorkerFailed(without_paths(last[0]) or f"exit code {code}")


class Worker:
    """A contender's process. Its stderr is a terminal, as it is for most people, whose content goes to `log`.

    `environment` is added to this process's own.
    """

    def __init__(self, command: list[str], spec: dict[str, Any], log: Path, environment: dict[str, str]) -> None:
        self.log, self.started = log, time.time()
        master, slave = pty.openpty()
        termios.tcsetwinsize(slave, (40, 120))
        self.process = subprocess.Popen(
            [*command, json.dumps(spec)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=slave,
            text=True,
            env=os.environ | environment,
        )
        os.close(slave)
        self._reader = threading.Thread(target=self._keep, args=(master,), daemon=True)
        self._reader.start()

    def _keep(self, terminal: int) -> None:
        with self.log.open("wb", buffering=0) as log, contextlib.suppress(OSError):  # what a closed terminal gives
            while content := os.read(terminal, 65536):
                log.write(content)
        os.close(terminal)

    def answer(self) -> dict[str, Any]:
        """The next answer. Raises WorkerFailed if there is none."""
        line = self.process.stdout.readline()
        if not line:
            self.close()
            self._reader.join(timeout=5)
            log = self.log.read_text(encoding="utf-8", errors="replace").strip()
            say(log)
            last = log.replace("\r", "\n").rpartition("\n")[2]
            raise WorkerFailed(without_paths(last) or f"exit code {self.process.returncode}")
        return json.loads(line)

    def run(self, laps: int) -> dict[str, Any]:
        """A turn, as `lib.worker.Turns` answers it, with `others`.

        `others` is the share of the machine's CPU time that other processes took meanwhile; None where it isn't known.
        """
        busy, start = busy_seconds(), time.perf_counter()
        with contextlib.suppress(BrokenPipeError):  # it died; there will be no answer
            self.process.stdin.write(f"run {laps}\n")
            self.process.stdin.flush()
        turn = self.answer()
        if busy is None:
            return turn | {"others": None}
        available = (time.perf_counter() - start) * (os.cpu_count() or 1)
        return turn | {"others": max(0.0, (busy_seconds() - busy - turn["cpu_seconds"]) / available)}

    def close(self) -> None:
        """Ends the process, and waits until it is gone."""
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.close()
        try:
            self.process.wait(timeout=20)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()


def take_turns(
    commands: dict[str, list[str]], spec: dict[str, Any], repeats: int, laps: int, folder: Path
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Starts all contenders, lets each warm up, and then gives each a turn, again and again.

    Yields:
      (name, what it says of itself), then (name, a turn); in place of either (name, {"error": why}), as its last.
    """
    workers: dict[str, Worker] = {}

    def attempt(name: str, what: Any) -> tuple[str, dict[str, Any]]:
        try:
            return name, what()
        except WorkerFailed as failure:
            workers.pop(name)
            return name, {"error": str(failure)}

    try:
        for name, command in commands.items():  # all compile at once: only what comes later is timed
            workers[name] = Worker(command, spec | {"contender": name}, folder / f"{name}.log", ENVIRONMENT)
        for name in commands:
            yield attempt(name, workers[name].answer)
        for _ in range(repeats):
            for name in list(workers):
                yield attempt(name, lambda name=name: workers[name].run(laps))
    finally:
        for worker in workers.values():
            worker.close()

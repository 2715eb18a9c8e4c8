"""The launchers, run for real with stand-ins for ssh, srun, scontrol and the training program."""

import dataclasses
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import sysconfig
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml
from jax._src.clusters import ClusterEnv  # private: what slurm.sh relies on is what this reads
from jax._src.clusters.slurm_cluster import SlurmCluster

from jaxlm import config as jaxlm_config

ROOT = Path(__file__).parents[1]
LAUNCH = ROOT / "launch"
SLURM, SSH = LAUNCH / "slurm.sh", LAUNCH / "ssh.sh"
PATIENCE = 60  # seconds for what takes well below one: the machine may be busy
RESUMABLE = 75

# What a process of the training program does is planned: {"0": {...}, "1": {...}}. It notes its arguments first.
#   code    ends with it
#   after   ... once these processes have noted theirs
#   on_term what it does at the first SIGTERM, for which it waits: end with this code, or None: go on to the second one
#   save    ... after this many seconds
STAND_IN = """
import json, os, pathlib, signal, sys, time
signal.alarm(120)  # whatever goes wrong, it doesn't outlive the tests for long
notes = pathlib.Path(os.environ["NOTES"])
number = os.environ.get("SLURM_PROCID") or sys.argv[sys.argv.index("--process_id") + 1]
plan = json.loads((notes / "plan").read_text())[number]

def on_term(*_):
    with open(notes / f"terminated.{number}", "a") as file:
        file.write("x")
    time.sleep(plan.get("save", 0))
    if plan["on_term"] is not None:
        os._exit(plan["on_term"])
    plan["on_term"] = 128 + 15

if "on_term" in plan:
    signal.signal(signal.SIGTERM, on_term)
note = {"pid": os.getpid(), "arguments": sys.argv, "stdin": sys.stdin.read()}
note |= {"folder": os.getcwd(), "environment": dict(os.environ)}
(notes / f"part.{number}").write_text(json.dumps(note))
(notes / f"part.{number}").rename(notes / f"started.{number}")
print("from", number, flush=True)
print("to stderr", file=sys.stderr, flush=True)
while "on_term" in plan:
    signal.pause()
while not all((notes / f"started.{other}").exists() for other in plan.get("after", ())):
    time.sleep(0.02)
sys.exit(plan["code"])
"""

# Takes options as ssh does, and hands the command to a login shell, which has a session and an environment of its own.
FAKE_SSH = """
import os, signal, subprocess, sys
words = sys.argv[1:]
while words[0].startswith("-"):
    del words[: 1 if words[0] == "-T" else 2]
notes = os.environ["NOTES"]
with open(notes + "/hosts", "a") as file:
    file.write(words[0] + "\\n")
with open(notes + "/ssh." + words[0], "w") as file:
    file.write(" ".join(sys.argv[1:]))
if words[0] == "unreachable":
    sys.exit("no route")
if words[0] == "doomed":
    os.kill(os.getppid(), signal.SIGKILL)
    sys.exit()
def as_on_a_host():
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1):
        signal.signal(number, signal.SIG_DFL)
environment = {"PATH": os.environ["PATH"], "NOTES": notes}
command = ["sh", "-c", " ".join(words[1:])]
sys.exit(subprocess.call(command, env=environment, start_new_session=True, preexec_fn=as_on_a_host))
"""

# What srun sets for the process on the second of two nodes, as far as JAX reads it.
SRUN = {
    "SLURM_JOB_ID": "4097",
    "SLURM_STEP_NODELIST": "node[07,11]",
    "SLURM_NTASKS": "2",
    "SLURM_PROCID": "1",
    "SLURM_LOCALID": "0",
}
FAKE_SRUN = """#!/usr/bin/env bash
printf '%s\\n' "$@" >"$NOTES/srun"
while [[ $1 == --* ]]; do
  case $1 in --ntasks=*) tasks=${1#*=} ;; esac
  shift
done
highest=0
for ((task = 0; task < tasks; task++)); do
  code=0
  SLURM_PROCID=$task "$@" </dev/null || code=$?
  if ((code > highest)); then highest=$code; fi
done
exit "$highest"
"""
FAKE_SCONTROL = """#!/usr/bin/env bash
echo "$@" >>"$NOTES/scontrol"
exit "${SCONTROL_CODE:-0}"
"""

ENDS_ON_TERM = {"on_term": RESUMABLE}


def wait_until(condition: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < deadline, f"waited in vain for: {what}"
        time.sleep(0.02)


@dataclasses.dataclass
class Stage:
    """A checkout with a stand-in for the training program, and stand-ins for the commands that launchers call."""

    folder: Path
    environment: dict[str, str]
    running: list[subprocess.Popen[str]] = dataclasses.field(default_factory=list)

    def plan(self, *processes: dict[str, Any]) -> None:
        (self.folder / "notes" / "plan").write_text(json.dumps({str(i): plan for i, plan in enumerate(processes)}))

    def start(self, *command: str | Path) -> subprocess.Popen[str]:
        self.running.append(
            subprocess.Popen(
                ["bash", *map(str, command)],
                env=self.environment,
                cwd=self.folder,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
                start_new_session=True,  # a process group of its own, as a terminal would give it
            )
        )
        return self.running[-1]

    def run(self, *command: str | Path) -> tuple[int, str, str]:
        process = self.start(*command)
        out, err = process.communicate(timeout=PATIENCE)
        return process.returncode, out, err

    def noted(self, name: str) -> str | None:
        path = self.folder / "notes" / name
        return path.read_text() if path.exists() else None

    def started(self, number: int) -> dict[str, Any]:
        note = self.noted(f"started.{number}")
        assert note is not None, f"process {number} did not start"
        return json.loads(note)

    def wait_for_start(self, count: int) -> None:
        for number in range(count):
            wait_until(lambda: self.noted(f"started.{number}") is not None, f"start of {number}")  # noqa: B023


@pytest.fixture
def stage(tmp_path: Path) -> Iterator[Stage]:
    repo, venv, bin_folder = tmp_path / "my 'repo", tmp_path / "my venv" / "bin", tmp_path / "bin"
    for folder in (repo / "scripts", venv, bin_folder, tmp_path / "notes"):
        folder.mkdir(parents=True)
    (repo / "scripts" / "train.py").write_text(STAND_IN)
    (tmp_path / "ssh.py").write_text(FAKE_SSH)
    fakes = {"srun": FAKE_SRUN, "scontrol": FAKE_SCONTROL}
    fakes["python"] = f'#!/bin/sh\nexec "{sys.executable}" -S "$@"\n'
    fakes["ssh"] = f'#!/bin/sh\nexec "{sys.executable}" -S "{tmp_path}/ssh.py" "$@"\n'
    for name, text in fakes.items():
        path = (venv if name == "python" else bin_folder) / name
        path.write_text(text)
        path.chmod(0o755)
    # Nothing of a cluster that the tests may run on themselves.
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("SLURM_", "JAXLM_", "OMPI_"))}
    paths = {"JAXLM_REPO": str(repo), "JAXLM_VENV": str(venv.parent), "NOTES": str(tmp_path / "notes")}
    stage = Stage(tmp_path, {**clean, **paths, "PATH": f"{bin_folder}:{clean['PATH']}"})
    yield stage
    for process in stage.running:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        for stream in (process.stdout, process.stderr):
            assert stream is not None
            stream.close()


# --- ssh.sh


def test_ssh_starts_a_process_on_each_host(stage: Stage) -> None:
    stage.plan({"code": 0}, {"code": 0}, {"code": 0})
    (stage.folder / "hosts").write_text("# three\nme@one slots=8\n\ntwo\nthree")  # no newline at its end
    odd = ["--config", "a b.py", "--data.train_files", "it's $HOME/*.txt", "--generation.prompt", 'naïve "x"\n#', ""]
    stage.environment |= {"JAXLM_ENV": "XLA_FLAGS NCCL_DEBUG", "XLA_FLAGS": "--one --two='3'", "NCCL_DEBUG": ""}

    code, out, err = stage.run(SSH, "-f", "hosts", "--", *odd)

    assert (code, err) == (0, "")
    assert sorted((stage.noted("hosts") or "").split()) == ["me@one", "three", "two"]
    for number in range(3):
        flags = ["--coordinator_address", "one:8476", "--num_processes", "3", "--process_id", str(number)]
        note = stage.started(number)
        assert note["arguments"] == ["scripts/train.py", *odd, *flags]
        assert note["folder"] == stage.environment["JAXLM_REPO"]
        assert note["stdin"] == ""  # not the launcher's line to it
        assert note["environment"]["XLA_FLAGS"] == "--one --two='3'"
        assert note["environment"]["NCCL_DEBUG"] == ""
        host = ("me@one", "two", "three")[number]
        assert f"[{number} {host}] from {number}\n" in out
        assert f"[{number} {host}] to stderr\n" in out


def test_ssh_settings(stage: Stage) -> None:
    stage.plan({"code": 0})
    stage.environment |= {"JAXLM_PORT": "1234", "JAXLM_COORDINATOR": "10.0.0.1", "JAXLM_SSH": "ssh -p 22 -o A=b"}

    assert stage.run(SSH, "one", "--", "--config", "c.py")[0] == 0

    assert stage.noted("ssh.one") == "-p 22 -o A=b one bash -s"
    assert stage.started(0)["arguments"][-6:-3] == ["--coordinator_address", "10.0.0.1:1234", "--num_processes"]


@pytest.mark.parametrize(
    ("plans", "expected"),
    [
        ([{"code": RESUMABLE}, {"code": RESUMABLE}], RESUMABLE),
        ([{"code": 0}, {"code": RESUMABLE}], RESUMABLE),
        ([{"code": 4, "after": [1]}, {"code": RESUMABLE}], 4),
        ([{"code": 2}, {"code": 2}], 2),
    ],
)
def test_ssh_exit_code(stage: Stage, plans: list[dict[str, Any]], expected: int) -> None:
    stage.plan(*plans)
    assert stage.run(SSH, "one", "two", "--", "--config", "c.py")[0] == expected


def test_ssh_ends_the_others_when_one_fails(stage: Stage) -> None:
    stage.plan(ENDS_ON_TERM, {"code": 3, "after": [0, 2]}, ENDS_ON_TERM)
    code, _, err = stage.run(SSH, "one", "two", "three", "--", "--config", "c.py")
    assert code == 3
    assert "process 1 on two ended with 3" in err
    assert stage.noted("terminated.0") == stage.noted("terminated.2") == "x"


def test_ssh_kills_what_does_not_end(stage: Stage) -> None:
    stage.plan({"on_term": None}, {"code": 3, "after": [0]})
    stage.environment["JAXLM_GRACE"] = "3"
    code, _, err = stage.run(SSH, "one", "two", "--", "--config", "c.py")
    assert (code, stage.noted("terminated.0")) == (3, "x")
    assert "killing" in err


def test_ssh_fails_when_a_host_can_not_be_reached(stage: Stage) -> None:
    stage.plan(ENDS_ON_TERM, {"code": 0})
    code, out, _ = stage.run(SSH, "one", "unreachable", "--", "--config", "c.py")
    assert code == 1
    assert "[1 unreachable] no route\n" in out


def test_ssh_notices_that_its_own_part_was_killed(stage: Stage) -> None:
    stage.plan(ENDS_ON_TERM, {"code": 0})
    code, _, err = stage.run(SSH, "one", "doomed", "--", "--config", "c.py")
    assert code == 255
    assert "process 1 on doomed" in err


# Read by every bash that runs a script: what a process ends with is told in two parts, a while apart, as it is read
# on a machine that is so busy that the launcher is interrupted in the middle of it.
IN_TWO_PARTS = r"""
echo() {
  if [[ $* =~ ^[0-9]+\ [0-9]+$ ]]; then
    printf '%s ' "${1% *}"
    sleep 1.2
    printf '%s\n' "${1#* }"
    : >"$NOTES/in_two_parts"
  else
    builtin echo "$@"
  fi
}
"""


def test_ssh_reads_an_end_that_comes_in_two_parts(stage: Stage) -> None:
    (stage.folder / "slow.sh").write_text(IN_TWO_PARTS)
    stage.environment["BASH_ENV"] = str(stage.folder / "slow.sh")
    stage.plan({"code": RESUMABLE})
    code, _, err = stage.run(SSH, "one", "--", "--config", "c.py")
    assert stage.noted("in_two_parts") is not None
    assert (code, err) == (RESUMABLE, "")


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT", "SIGHUP", "SIGUSR1"])
@pytest.mark.parametrize("to_group", [False, True])  # as a terminal does, and timeout(1): to it, and to all it started
def test_ssh_hands_signals_on(stage: Stage, name: str, to_group: bool) -> None:
    stage.plan(*[ENDS_ON_TERM | {"save": 0.2}] * 3)
    # A shell can't trap what it was started with ignored, as pytest may be in the background.
    number = signal.Signals[name]
    before = signal.signal(number, signal.SIG_DFL)
    try:
        launcher = stage.start(SSH, "one", "two", "three", "--", "--config", "c.py")
    finally:
        signal.signal(number, before)
    stage.wait_for_start(3)
    launcher.send_signal(number)
    if to_group:
        os.killpg(launcher.pid, number)
    out, err = launcher.communicate(timeout=PATIENCE)
    assert launcher.returncode == RESUMABLE, (out, err)
    assert [stage.noted(f"terminated.{i}") for i in range(3)] == ["x", "x", "x"]


def test_ssh_second_signal_ends_at_once(stage: Stage) -> None:
    stage.plan({"on_term": None}, {"on_term": None})
    launcher = stage.start(SSH, "one", "two", "--", "--config", "c.py")
    stage.wait_for_start(2)
    launcher.terminate()
    for number in range(2):
        wait_until(lambda: stage.noted(f"terminated.{number}") == "x", f"first signal of {number}")  # noqa: B023
    time.sleep(2.1)  # before that, it passes for the same one, sent twice
    launcher.terminate()
    launcher.communicate(timeout=PATIENCE)
    assert launcher.returncode == 128 + signal.SIGTERM
    assert stage.noted("terminated.0") == stage.noted("terminated.1") == "xx"


def test_ssh_failure_does_not_cut_a_save_short(stage: Stage) -> None:
    stage.plan({"on_term": 1}, {"on_term": None})
    stage.environment["JAXLM_GRACE"] = "3"
    launcher = stage.start(SSH, "one", "two", "--", "--config", "c.py")
    stage.wait_for_start(2)
    launcher.terminate()
    _, err = launcher.communicate(timeout=PATIENCE)
    assert launcher.returncode == 1
    assert "killing" in err  # after a while, as a second signal would end it at once
    assert stage.noted("terminated.1") == "x"


def test_ssh_launcher_that_dies_stops_all(stage: Stage) -> None:
    stage.plan(ENDS_ON_TERM, {"on_term": None})  # one that goes on must not hide it from another
    launcher = stage.start(SSH, "one", "two", "--", "--config", "c.py")
    stage.wait_for_start(2)
    launcher.kill()
    for number in range(2):
        wait_until(lambda: stage.noted(f"terminated.{number}") == "x", f"end of {number}")  # noqa: B023
    os.kill(stage.started(1)["pid"], signal.SIGKILL)


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--", "--config", "c.py"], "no hosts"),
        (["one", "two"], "no command"),
        (["one", "--"], "no command"),
        (["one", "--config", "c.py"], "--config"),
        (["-f", "missing", "--", "--config", "c.py"], "missing"),
        (["-f"], "-f"),
    ],
)
def test_ssh_mistakes(stage: Stage, arguments: list[str], named: str) -> None:
    code, out, err = stage.run(SSH, *arguments)
    assert (code, out) == (2, "")
    assert err.startswith("error: ")
    assert named in err
    assert err.count("\n") == 1


# --- slurm.sh


@pytest.fixture
def job(stage: Stage) -> Stage:
    """In a job of two nodes, as a batch script sees it."""
    stage.environment |= {"SLURM_JOB_ID": "4097", "SLURM_JOB_NUM_NODES": "2", "SLURM_SUBMIT_DIR": str(stage.folder)}
    return stage


@pytest.mark.parametrize(
    ("codes", "restarts", "requeued"),
    [
        ([0, 0], None, False),
        ([2, 2], None, False),
        ([1, RESUMABLE], None, True),  # the highest is all that srun tells
        ([RESUMABLE, 134], None, False),
        ([RESUMABLE, RESUMABLE], None, True),
        ([RESUMABLE, RESUMABLE], 2, True),
        ([RESUMABLE, RESUMABLE], 3, False),
    ],
)
def test_slurm_requeues_what_can_go_on(job: Stage, codes: list[int], restarts: int | None, requeued: bool) -> None:
    job.plan(*({"code": code} for code in codes))
    job.environment["JAXLM_MAX_REQUEUES"] = "3"
    if restarts is not None:
        job.environment["SLURM_RESTART_COUNT"] = str(restarts)
    assert job.run(SLURM)[0] == max(codes)
    assert job.noted("scontrol") == ("requeue 4097\n" if requeued else None)


def test_slurm_says_that_it_could_not_requeue(job: Stage) -> None:
    job.plan({"code": RESUMABLE}, {"code": RESUMABLE})
    job.environment["SCONTROL_CODE"] = "1"
    code, _, err = job.run(SLURM)
    assert code == RESUMABLE
    assert "could not requeue" in err


def test_slurm_command(job: Stage) -> None:
    job.plan({"code": 0}, {"code": 0})
    job.environment |= {"JAXLM_CONFIG": "my config.py", "JAXLM_CHECKPOINT_DIR": "/shared/my run"}
    assert job.run(SLURM, "--training.max_steps", "7", "--data.train_files", "a b*")[0] == 0
    ours = ["--config", "my config.py", "--training.checkpoint_dir", "/shared/my run"]
    for number in range(2):
        note = job.started(number)
        assert note["arguments"] == [
            "scripts/train.py",
            *ours,
            "--training.max_steps",
            "7",
            "--data.train_files",
            "a b*",
        ]
        assert note["folder"] == job.environment["JAXLM_REPO"]
    srun = (job.noted("srun") or "").splitlines()
    # Signals go to each process of a step: none may stand between srun and the program, which would die of them.
    assert next(argument for argument in srun if not argument.startswith("--")).endswith("/bin/python")
    assert {"--nodes=2", "--ntasks=2", "--ntasks-per-node=1", "--kill-on-bad-exit=0"} <= set(srun)


def test_slurm_defaults(job: Stage) -> None:
    job.plan({"code": 0}, {"code": 0})
    del job.environment["JAXLM_REPO"], job.environment["JAXLM_VENV"]
    job.environment["SLURM_SUBMIT_DIR"] = str(job.folder / "my 'repo")
    job.environment["PATH"] = f"{job.folder / 'my venv' / 'bin'}:{job.environment['PATH']}"
    assert job.run(SLURM)[0] == 0
    config = job.started(1)["arguments"][2]
    assert (ROOT / config).exists()


def test_slurm_asks_for_what_it_needs() -> None:
    lines = SLURM.read_text().splitlines()
    first_command = next(i for i, line in enumerate(lines) if line and not line.startswith("#"))
    assert not any(line.startswith("#SBATCH") for line in lines[first_command:])  # sbatch would pass them over
    found = (re.fullmatch(r"#SBATCH --([a-z-]+)(?:=(\S+))?", line) for line in lines if line.startswith("#SBATCH"))
    asked = {match[1]: match[2] for match in found if match}
    assert len(asked) == sum(line.startswith("#SBATCH") for line in lines)
    assert asked["ntasks-per-node"] == "1"
    assert "requeue" in asked
    assert asked["open-mode"] == "append"  # or the log starts anew with each requeue
    assert re.fullmatch(r"USR1@\d+", asked["signal"])  # to the processes: no B:
    assert not {"partition", "account", "qos", "time"} & set(asked)


def test_jax_understands_srun(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in SRUN.items():
        monkeypatch.setenv(name, value)
    assert SlurmCluster.is_env_present()
    # The empty list of devices is what jaxlm asks for: without it, JAX would use one GPU a process.
    found = ClusterEnv.auto_detect_unset_distributed_params(None, None, None, [], "slurm", 300)
    address, processes, number, devices = found
    assert re.fullmatch(r"node07:\d+", address or "")
    assert (processes, number, devices) == (2, 1, [])


# --- kubernetes.yaml


def fields(required: dict[str, Any], **optional: Any) -> dict[str, Any]:
    """Schema of a mapping without other fields: a misspelt one is refused by the cluster, too."""
    properties = required | optional
    return {"type": "object", "required": list(required), "properties": properties, "additionalProperties": False}


def one(item: dict[str, Any]) -> dict[str, Any]:
    return {"type": "array", "minItems": 1, "maxItems": 1, "items": item}


ANY, TEXT, NUMBER, MANY = {}, {"type": "string"}, {"type": "integer", "minimum": 1}, {"type": "array", "minItems": 1}
NAME = {"type": "string", "pattern": "^[a-z]([a-z0-9-]*[a-z0-9])?$"}
VARIABLE = {
    "oneOf": [
        fields({"name": TEXT, "value": TEXT}),
        fields({"name": TEXT, "valueFrom": fields({"fieldRef": fields({"fieldPath": TEXT})})}),
    ]
}
CONTAINER = fields(
    {
        "name": NAME,
        "image": TEXT,
        "workingDir": TEXT,
        "command": {"const": ["bash", "-c"]},
        "args": one(TEXT),
        "env": MANY | {"items": VARIABLE},
        "ports": one(fields({"name": NAME, "containerPort": NUMBER})),
        "resources": fields({"requests": ANY, "limits": fields({"nvidia.com/gpu": NUMBER})}),
        "volumeMounts": MANY | {"items": fields({"name": NAME, "mountPath": TEXT})},
    }
)
POD = fields(
    {
        "restartPolicy": {"const": "Never"},  # what a podFailurePolicy needs
        "automountServiceAccountToken": {"const": False},
        "terminationGracePeriodSeconds": {"type": "integer", "minimum": 120},
        "containers": one(CONTAINER),
        "volumes": MANY,
    },
    tolerations=MANY,
)
JOB = fields(
    {
        "completionMode": {"const": "Indexed"},
        "parallelism": NUMBER,
        "completions": NUMBER,
        "backoffLimit": {"const": 0},  # any failure is the JobSet's to handle, which restarts all
        "podFailurePolicy": fields(
            {
                "rules": one(
                    fields(
                        {
                            "action": {"const": "FailJob"},
                            "onExitCodes": fields(
                                {"containerName": NAME, "operator": {"const": "In"}, "values": {"const": [2]}}
                            ),
                        }
                    )
                )
            }
        ),
        "template": fields({"spec": POD}),
    }
)
JOBSET = fields(
    {
        "apiVersion": {"const": "jobset.x-k8s.io/v1alpha2"},
        "kind": {"const": "JobSet"},
        "metadata": fields({"name": NAME}),
        "spec": fields(
            {
                "failurePolicy": fields(
                    {
                        "maxRestarts": {"type": "integer", "minimum": 10},
                        # A Job that failed by its podFailurePolicy fails the JobSet; no rule is needed for the rest.
                        "rules": one(
                            fields(
                                {
                                    "name": {"type": "string", "pattern": "^[A-Za-z]([A-Za-z0-9_,:]*[A-Za-z0-9_])?$"},
                                    "action": {"const": "FailJobSet"},
                                    "onJobFailureReasons": {"const": ["PodFailurePolicy"]},
                                }
                            )
                        ),
                    }
                ),
                "replicatedJobs": one(
                    fields({"name": NAME, "replicas": {"const": 1}, "template": fields({"spec": JOB})})
                ),
            }
        ),
    }
)
CLAIM = fields(
    {
        "apiVersion": {"const": "v1"},
        "kind": {"const": "PersistentVolumeClaim"},
        "metadata": fields({"name": NAME}),
        "spec": fields({"accessModes": {"const": ["ReadWriteMany"]}, "resources": ANY}),
    }
)


@pytest.fixture
def manifests() -> tuple[dict[str, Any], dict[str, Any]]:
    claim, jobset = yaml.safe_load_all((LAUNCH / "kubernetes.yaml").read_text())
    return claim, jobset


def test_kubernetes_fields(manifests: tuple[dict[str, Any], dict[str, Any]]) -> None:
    claim, jobset = manifests
    jsonschema.validate(claim, CLAIM)
    jsonschema.validate(jobset, JOBSET)
    job = jobset["spec"]["replicatedJobs"][0]["template"]["spec"]
    pod = job["template"]["spec"]
    container = pod["containers"][0]
    values = {variable["name"]: variable.get("value") for variable in container["env"]}

    assert job["parallelism"] == job["completions"] == int(values["NUM_PROCESSES"]) > 1
    assert container["ports"][0]["containerPort"] == int(values["COORDINATOR_PORT"])
    assert job["podFailurePolicy"]["rules"][0]["onExitCodes"]["containerName"] == container["name"]
    assert (ROOT / values["CONFIG"]).exists()

    mounts = {mount["name"]: mount["mountPath"] for mount in container["volumeMounts"]}
    volumes = {volume["name"]: volume for volume in pod["volumes"]}
    assert set(mounts) == set(volumes)
    assert volumes["shared"]["persistentVolumeClaim"] == {"claimName": claim["metadata"]["name"]}
    assert volumes["shm"]["emptyDir"]["medium"] == "Memory"
    assert mounts["shm"] == "/dev/shm"
    for option in ("training.checkpoint_dir", "data.cache_dir"):
        assert f"--{option} {mounts['shared']}/" in container["args"][0]


def test_kubernetes_command(manifests: tuple[dict[str, Any], dict[str, Any]], stage: Stage) -> None:
    jobset = manifests[1]
    replicated = jobset["spec"]["replicatedJobs"][0]
    job = replicated["template"]["spec"]
    container = job["template"]["spec"]["containers"][0]
    from_labels = {  # that JobSet puts on each pod
        "metadata.labels['jobset.sigs.k8s.io/jobset-name']": jobset["metadata"]["name"],
        "metadata.labels['jobset.sigs.k8s.io/replicatedjob-name']": replicated["name"],
    }
    given = {"JOB_COMPLETION_INDEX": "1"}  # by Kubernetes, to each pod of an indexed Job
    for variable in container["env"]:
        path = variable.get("valueFrom", {}).get("fieldRef", {}).get("fieldPath")
        given[variable["name"]] = from_labels[path] if path else variable["value"]
    used = set(re.findall(r"\$\{?(\w+)", container["args"][0]))
    assert used <= set(given)

    stage.plan({}, {"code": RESUMABLE})
    stage.environment |= given | {"PATH": f"{stage.folder / 'my venv' / 'bin'}:{stage.environment['PATH']}"}
    command = [*container["command"], *container["args"]]
    end = subprocess.run(
        [*command[:1], "-u", *command[1:]],  # a variable that is missing is an error
        env=stage.environment,
        cwd=stage.environment["JAXLM_REPO"],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        timeout=PATIENCE,
        check=False,
    )

    assert end.returncode == RESUMABLE, end.stderr
    arguments = stage.started(1)["arguments"]
    options = dict(zip(arguments[1::2], arguments[2::2], strict=True))
    assert arguments[0] == "scripts/train.py"
    # <JobSet>-<replicated job>-<its replica>-<pod>.<subdomain, by default the JobSet's name>
    assert options["--coordinator_address"] == "jaxlm-hosts-0-0.jaxlm:8476"
    assert options["--num_processes"] == str(job["parallelism"])
    assert options["--process_id"] == "1"
    # bash must have made room for the program: only the container's first process gets the signals.
    assert container["args"][0].startswith("exec ")


# --- all of them


def test_scripts_are_clean() -> None:
    shellcheck = shutil.which("shellcheck", path=f"{sysconfig.get_path('scripts')}:{os.environ['PATH']}")
    assert shellcheck, 'shellcheck is missing: pip install -e ".[test]"'
    for command in (["bash", "-n"], [shellcheck]):
        for script in (SLURM, SSH):
            end = subprocess.run([*command, script], capture_output=True, text=True, timeout=PATIENCE, check=False)
            assert (end.returncode, end.stdout, end.stderr) == (0, "", "")
            assert os.access(script, os.X_OK)


def test_train_knows_the_flags() -> None:
    command = [sys.executable, ROOT / "scripts" / "train.py", "--help"]
    help_text = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE, check=True).stdout
    for flag in ("--coordinator_address", "--num_processes", "--process_id"):
        assert flag in help_text


def test_readme_tells_all_and_names_what_exists() -> None:
    readme = (LAUNCH / "README.md").read_text()
    scripts = [path.read_text() for path in (SLURM, SSH, LAUNCH / "kubernetes.yaml")]
    variables = re.compile(r"JAXLM_[A-Z_]+")
    assert set(variables.findall(readme)) == set(variables.findall("".join(scripts)))
    for section, field in re.findall(r"\b(model|training|data)\.([a-z_]+)", "".join([readme, *scripts])):
        assert field in {f.name for f in dataclasses.fields(jaxlm_config.SECTIONS[section])}

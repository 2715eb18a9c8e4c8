"""Processes: start-up of several, which of them leads, what all must agree on.

One process a host uses all the GPUs of its host. All processes run the same program; the first, the leader, alone
prints and writes what is not sharded.
"""

import hashlib
import os
import socket
import sys
import time
from collections.abc import Callable
from importlib.util import find_spec

import jax
import numpy as np
from jax._src import distributed as jax_distributed
from jax.experimental import multihost_utils

from jaxlm.errors import RunFailed, UserError
from jaxlm.parallel.mesh import AnyMesh

HEARTBEAT_SECONDS = 30  # a process that was silent for this long is taken for dead, and the whole job ends
UPDATES_OF_A_VOTE = 2  # from when it is cast to when it is read
START_SECONDS = 300  # to wait for all processes to have started


def start(address: str | None = None, num_processes: int | None = None, process_id: int | None = None) -> None:
    """Joins the other processes of this run, if there are any; to be called before JAX finds its devices.

    With no argument, JAX detects SLURM (srun), Open MPI and, with the kubernetes package, Kubernetes.

    Args:
      address: HOST:PORT of process 0.

    Raises:
      UserError: started by something that is not understood.
      RunFailed: the processes did not find each other.
    """
    given = {"--coordinator_address": address, "--num_processes": num_processes, "--process_id": process_id}
    missing = [name for name, value in given.items() if value is None]
    if missing and len(missing) < len(given):
        raise UserError(f"{', '.join(missing)}: missing; the three are given together, or none")
    if jax.distributed.is_initialized() or (missing and not _launched_by_cluster()):
        return
    if address is not None and num_processes is not None and process_id is not None:
        _check_reachable(address, num_processes, process_id)
    try:
        jax.distributed.initialize(
            address,
            num_processes,
            process_id,
            local_device_ids=[] if _one_process_a_host() else None,  # []: all of the host's
            initialization_timeout=START_SECONDS,
            heartbeat_timeout_seconds=HEARTBEAT_SECONDS,
        )
    except (RuntimeError, ValueError) as error:
        # No mistake of the user's, as far as we know: a host may be late, so that another try can succeed.
        raise RunFailed(f"the processes did not find each other: {str(error).splitlines()[0]}") from error


def _check_reachable(address: str, num_processes: int, process_id: int) -> None:
    """Waits for process 0 here, since JAX would end this process with a core dump if it didn't come.

    Raises:
      UserError: numbers or an address that can't be.
      RunFailed: nobody answers at the address.
    """
    where = f"--coordinator_address ({address})"
    host, _, port = address.rpartition(":")
    if not host or not port.isdigit() or not 0 < int(port) < 2**16:
        raise UserError(f"{where} must be HOST:PORT")
    if num_processes < 1:
        raise UserError(f"--num_processes ({num_processes}) must be at least 1")
    if not 0 <= process_id < num_processes:
        raise UserError(f"--process_id ({process_id}) must be from 0 to {num_processes - 1}, of {num_processes}")
    try:
        socket.getaddrinfo(host.strip("[]"), int(port))
    except (OSError, UnicodeError) as error:
        raise UserError(f"{where}: no host of that name; name the host of process 0") from error
    waits = (
        f"waiting for {num_processes - 1} other process(es)"
        if process_id == 0
        else f"looking for process 0 at {address}"
    )
    print(f"{waits}, for up to {START_SECONDS} s", file=sys.stderr, flush=True)
    deadline = time.monotonic() + START_SECONDS
    while process_id > 0:
        try:
            socket.create_connection((host.strip("[]"), int(port)), timeout=5).close()
            return
        except OSError as error:
            if time.monotonic() > deadline:
                raise RunFailed(f"{where}: no process 0 there within {START_SECONDS} s ({error.strerror})") from error
            time.sleep(0.5)


def _launched_by_cluster() -> bool:
    """Whether a launcher that JAX knows started several processes.

    Raises:
      UserError: one that it doesn't know has.
    """

    def count(variable: str) -> int:
        text = os.environ.get(variable) or "1"
        if not text.isdigit():
            raise UserError(f"{variable} ({text}): must be a number; unset it")
        return int(text)

    if count("SLURM_STEP_NUM_TASKS") > 1 or (
        count("OMPI_COMM_WORLD_SIZE") > 1 and "OMPI_MCA_orte_hnp_uri" in os.environ
    ):
        return True
    if "KUBERNETES_SERVICE_HOST" in os.environ and "JOB_COMPLETION_INDEX" in os.environ and find_spec("kubernetes"):
        return True
    for variable in ("WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE"):  # torchrun, MPICH, Open MPI 5
        if count(variable) > 1:
            raise UserError(
                f"{variable} ({os.environ[variable]}): start one process a host, without this launcher; it uses all "
                "GPUs. For several hosts: srun, or --coordinator_address, --num_processes and --process_id"
            )
    return False


def _one_process_a_host() -> bool:
    """JAX takes a launcher's process for one that owns a single GPU, even if it is alone on its host."""
    if "SLURM_STEP_NUM_TASKS" in os.environ:
        return os.environ["SLURM_STEP_NUM_TASKS"] == os.environ.get("SLURM_STEP_NUM_NODES")
    return os.environ.get("OMPI_COMM_WORLD_LOCAL_SIZE", "1") == "1"


def is_leader() -> bool:
    """Whether this is the process that prints and writes."""
    return jax.process_index() == 0


def say(text: str) -> None:
    """A line of the report on stderr, from the leader."""
    if is_leader():
        print(text, file=sys.stderr, flush=True)


def barrier(name: str) -> None:
    """Returns when all processes have come here."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(name)


def check_same_everywhere(what: str, value: str) -> None:
    """Raises UserError if `value` is not the same text in all processes."""
    if jax.process_count() == 1:
        return
    digest = np.frombuffer(hashlib.sha256(value.encode()).digest()[:8], np.uint32)
    digests = multihost_utils.process_allgather(digest)
    others = [i for i in range(jax.process_count()) if (digests[i] != digests[0]).any()]
    if others:
        raise UserError(f"{what}: differs between process 0 and process(es) {others}; start all of them alike")


def text_from_any_process(text: str | None) -> str | None:
    """The text of the first process that has one (its first 500 bytes), known to all; None if none has."""
    if jax.process_count() == 1:
        return text
    mine = np.frombuffer((text or "").encode()[:500].ljust(500, b"\0"), np.uint8)
    texts = [bytes(row).rstrip(b"\0").decode(errors="ignore") for row in multihost_utils.process_allgather(mine)]
    return next((text for text in texts if text), None)


class StopVote:
    """Makes a signal that one process got known to all, at the same step, without waiting for anything.

    A vote is dispatched after each update and read some updates later, when it is there anyway.

    Args:
      mesh: of all processes.
      before_waiting: called before this waits for a process that may never come here.
    """

    def __init__(self, mesh: AnyMesh, before_waiting: Callable[[], None]) -> None:
        self._everywhere = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(mesh.axis_names))
        self._any = jax.jit(lambda votes: votes.max())
        self._before_waiting = before_waiting
        self._votes: list[jax.Array] = []

    def agreed(self, stop: bool) -> bool:
        """Whether to stop here: at once if this process is alone, else when all know that one of them wants to.

        Called after each update by all processes; `stop` is what this one wants.
        """
        if jax.process_count() == 1:
            return stop
        self._before_waiting()
        mine = np.full(len(self._everywhere.addressable_devices), stop, np.int32)
        self._votes.append(self._any(jax.make_array_from_process_local_data(self._everywhere, mine)))
        return len(self._votes) > UPDATES_OF_A_VOTE and bool(self._votes.pop(0))


class StatusBoard:
    """How far each process is, posted where all can read it even when one hangs."""

    KEY = "jaxlm/status"

    def __init__(self) -> None:
        # JAX's public functions exchange values by collectives only, which is what hangs.
        self._client = jax_distributed.global_state.client

    def post(self, signs: int, doing: str) -> None:
        """Posts this process's number of signs of life so far, and what it is at; all run the same program."""
        if self._client is not None:
            self._client.key_value_set(f"{self.KEY}/{jax.process_index()}", f"{signs} {doing}", allow_overwrite=True)

    def lagging(self) -> str:
        """A clause for an error message: which processes are behind the others, and at what; empty if none is."""
        if self._client is None:
            return ""
        posted = {int(key.rpartition("/")[2]): status for key, status in self._client.key_value_dir_get(self.KEY)}
        signs = {process: int(status.partition(" ")[0]) for process, status in posted.items()}
        behind = [
            f"process {process} at: {status.partition(' ')[2]}"
            for process, status in sorted(posted.items())
            if signs[process] == min(signs.values()) < max(signs.values())
        ]
        return f"; behind the others is {', '.join(behind)}" if behind else ""

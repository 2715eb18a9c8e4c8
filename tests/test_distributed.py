"""Starting several processes: what can be wrong is said before anything waits or connects."""

import socket

import jax
import pytest

from jaxlm.errors import RunFailed, UserError
from jaxlm.parallel import processes as distributed
from jaxlm.parallel.devices import find_devices


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("a:1", 2, None), "--process_id: missing; the three are given together"),
        (("1234", 1, 0), r"--coordinator_address \(1234\) must be HOST:PORT"),
        (("localhost:", 1, 0), "must be HOST:PORT"),
        (("localhost:99999", 1, 0), "must be HOST:PORT"),
        (("localhost:1234", 0, 0), r"--num_processes \(0\) must be at least 1"),
        (("localhost:1234", 2, 2), r"--process_id \(2\) must be from 0 to 1, of 2"),
        (("no-such-host.invalid:1234", 2, 1), "no host of that name; name the host of process 0"),
    ],
)
def test_arguments_that_cannot_be(arguments, message):
    with pytest.raises(UserError, match=message):
        distributed.start(*arguments)


def test_a_process_0_that_never_comes(monkeypatch):
    monkeypatch.setattr(distributed, "START_SECONDS", 1)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    with pytest.raises(RunFailed, match=rf"\({address}\): no process 0 there within 1 s"):
        distributed.start(address, 2, 1)


@pytest.mark.parametrize("variable", ["WORLD_SIZE", "SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE"])
def test_launch_variables_that_are_no_numbers(monkeypatch, variable):
    monkeypatch.setenv(variable, "many")
    with pytest.raises(UserError, match=rf"{variable} \(many\): must be a number"):
        distributed.start()


def test_a_backend_that_is_not_here(monkeypatch):
    def no_backend():
        raise AssertionError

    monkeypatch.setenv("JAX_PLATFORMS", "cuda")
    monkeypatch.setattr(jax, "devices", no_backend)
    with pytest.raises(UserError, match=r"JAX_PLATFORMS \(cuda\): JAX found no device; unset it, .*pip install"):
        find_devices()

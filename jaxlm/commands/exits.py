"""How a command ends: exit codes, and one line for every error that is not a bug."""

import os
import sys
from collections.abc import Callable
from types import TracebackType
from typing import NoReturn

from jaxlm.errors import RunFailed, Stopped, UserError, printable
from jaxlm.monitor.signals import StopRequest

EXIT_FAILED, EXIT_USER_ERROR, EXIT_STOPPED = 1, 2, 75
OUT_OF_MEMORY = (
    "the device's memory is full: set model.gradient_checkpointing true, or lower training.batch_size and raise "
    "training.gradient_accumulation_steps by as much; jaxlm estimate_memory says what fits"
)


def run_and_exit(command: Callable[[], None]) -> NoReturn:
    """Runs `command` and ends the process: 0 done, 1 failed, 2 the user can mend it, 75 stopped; 1 and a traceback."""
    sys.excepthook = _on_bug
    try:
        with StopRequest(at_once=True) as request:
            try:
                command()
            finally:
                sys.stdout.flush()  # here, where a reader that went away can still be dealt with
    except UserError as error:
        _exit(f"error: {printable(error)}", EXIT_USER_ERROR)
    except RunFailed as error:
        _exit(f"failed: {printable(error)}", EXIT_FAILED)
    except Stopped as stopped:
        stopped.say()
        if request.signal is not None:  # it may have come while JAX traced, whose state then crashes Python's own end
            os._exit(EXIT_STOPPED)
        sys.exit(EXIT_STOPPED)
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        _exit(f"failed: {OUT_OF_MEMORY} ({printable(error)})", EXIT_FAILED)
    except BrokenPipeError:  # the reader of our output went away, as with `| head`: end quietly
        nowhere = os.open(os.devnull, os.O_WRONLY)
        for stream in (sys.stdout, sys.stderr):
            os.dup2(nowhere, stream.fileno())
        sys.exit(EXIT_FAILED)
    sys.exit(0)


def is_out_of_memory(error: RuntimeError) -> bool:
    """Whether JAX reports that a device's memory is full; does not import JAX."""
    jax = sys.modules.get("jax")
    return jax is not None and isinstance(error, jax.errors.JaxRuntimeError) and "RESOURCE_EXHAUSTED" in str(error)


def _is_one_of_several() -> bool:
    """Whether this process has joined others; does not import JAX."""
    jax = sys.modules.get("jax")
    return jax is not None and jax.distributed.is_initialized() and jax.process_count() > 1


def _on_bug(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    sys.__excepthook__(kind, error, trace)
    if _is_one_of_several():
        _exit("failed: by the error above, or because another process ended; the same command goes on", EXIT_FAILED)


def _exit(message: str, code: int) -> NoReturn:
    """Ends the process with an error. One of several ends at once, so that the others do not wait for it."""
    print(message, file=sys.stderr, flush=True)
    if _is_one_of_several():
        os._exit(code)
    sys.exit(code)

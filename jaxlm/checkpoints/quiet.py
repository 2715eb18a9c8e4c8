"""Orbax's own words about what we report ourselves."""

import logging
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

from absl import logging as absl_logging


@contextmanager
def quiet_orbax() -> Iterator[None]:
    """Silences what Orbax says of each save, and what asyncio and Python say of each write of a save that failed.

    Such a failure is one error, and it is raised.
    """
    asyncio_log, hook = logging.getLogger("asyncio"), sys.unraisablehook
    levels = asyncio_log.level, absl_logging.get_verbosity()
    asyncio_log.setLevel(logging.CRITICAL)
    absl_logging.set_verbosity(absl_logging.FATAL)
    sys.unraisablehook = lambda raised: None if "Event loop is closed" in str(raised.exc_value) else hook(raised)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", r"coroutine '.*\.write_fragment' was never awaited", RuntimeWarning)
            yield
    finally:
        asyncio_log.setLevel(levels[0])
        absl_logging.set_verbosity(levels[1])
        sys.unraisablehook = hook

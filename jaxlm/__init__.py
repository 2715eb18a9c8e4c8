"""jaxlm: a language-model trainer in JAX for GPUs. `from jaxlm import Trainer, load`."""

from importlib import import_module
from typing import Any

__version__ = "0.1.0"

_LAZY = {"Trainer": "jaxlm.trainer", "load": "jaxlm.run.load"}  # so that `jaxlm.config` comes without JAX


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module 'jaxlm' has no attribute {name!r}")
    return getattr(import_module(_LAZY[name]), name)

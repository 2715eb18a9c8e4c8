"""jaxlm: a language-model trainer in JAX for GPUs. `from jaxlm import Trainer, load`."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from jaxlm.config import Config, DataConfig, ModelConfig, TrainingConfig, load_config, replace_fields
    from jaxlm.generation.api import generate_text
    from jaxlm.run.evaluate import evaluate
    from jaxlm.run.hooks import Hook, Running
    from jaxlm.run.load import load
    from jaxlm.run.result import Result
    from jaxlm.trainer import Trainer

__all__ = [
    "Config", "DataConfig", "Hook", "ModelConfig", "Result", "Running", "Trainer", "TrainingConfig", "evaluate",
    "generate_text", "load", "load_config", "replace_fields",
]  # fmt: skip
__version__ = "0.1.0"

_CONFIG = ("Config", "DataConfig", "ModelConfig", "TrainingConfig", "load_config", "replace_fields")
_LAZY = dict.fromkeys(_CONFIG, "jaxlm.config") | {  # imported when they are asked for: `jaxlm.config` needs no JAX
    "Hook": "jaxlm.run.hooks",
    "Result": "jaxlm.run.result",
    "Running": "jaxlm.run.hooks",
    "Trainer": "jaxlm.trainer",
    "evaluate": "jaxlm.run.evaluate",
    "generate_text": "jaxlm.generation.api",
    "load": "jaxlm.run.load",
}


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module 'jaxlm' has no attribute {name!r}")
    return getattr(import_module(_LAZY[name]), name)

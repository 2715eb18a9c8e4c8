"""XLA's choices of products and fusions, which it finds by trying them on a GPU: kept in a run's folder, used again.

The file is XLA's own, as text (in JAX 0.10 AutotuneResults, in 0.11 AutotuneCache). A compiler without a GPU takes the
former, too, so that a plan is of the program that ran. Without it, a program that is compiled anew may choose
otherwise, and sum in another order.
"""

import hashlib
import re
from pathlib import Path

import jax

from jaxlm.checkpoints.folder import AUTOTUNING as FILE
from jaxlm.config import DataConfig
from jaxlm.data.atomic import atomic_write
from jaxlm.data.tokens import cache_root
from jaxlm.errors import UserError, one_line
from jaxlm.ops.compiler import DUMP, LOAD, Options
from jaxlm.parallel.processes import say

_loaded = set[str]()  # by this process: XLA reads one file, once
COMPLETE: Options = {"xla_gpu_require_complete_aot_autotune_results": True}  # without a GPU: else it is an error
_DEVICE = re.compile(r'^( *device: )"([^"]*)"', re.MULTILINE)


def read_results(path: Path) -> str:
    """What `path` holds.

    Raises:
      UserError: it can't be read, or is not what XLA writes, or the end is missing.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"autotuning results ({path}) can't be read: {one_line(error)}") from error
    if not text.rstrip().endswith("}") or text.count("{") != text.count("}"):
        raise UserError(f"autotuning results ({path}): not what XLA writes, or cut short; delete the file to tune anew")
    return text


def devices_of(text: str) -> list[str]:
    """XLA's descriptions of the GPUs that results are of, such as "CUDA: 9.0, Cores: 132, ...", each once."""
    return list(dict.fromkeys(match[2] for match in _DEVICE.finditer(text)))


def for_device(text: str, device: str) -> str:
    """Results as if they were of a GPU that XLA describes as `device`: it uses no others."""
    return _DEVICE.sub(rf'\1"{device}"', text)


def loading(text: str, cache: Path) -> Options:
    """XLA's option to use results.

    The file lies below `cache`, under a name that tells its content: the key of a cached program has its path alone.

    Raises:
      UserError: this process has used other ones.
    """
    folder = cache / "autotuning"
    path = folder / f"{hashlib.sha256(text.encode()).hexdigest()[:32]}.txt"
    if _loaded - {path.name}:
        raise UserError("XLA takes autotuning results once, and this process has given it others: begin a new process")
    _loaded.add(path.name)
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        atomic_write(path, text)
    return {LOAD: str(path)}


def kept_options(run: Path, data: DataConfig, platform: str) -> Options:
    """XLA's options for training.keep_autotuning: to use the results in the folder `run`, or to write them there.

    Args:
      platform: JAX's name of the backend; only on "gpu" is there something to tune.

    Raises:
      UserError: the results there are not usable.
    """
    path = run / FILE
    if platform != "gpu":
        say(f"training.keep_autotuning: nothing is tuned on {platform.upper()}")
        return {}
    if jax.process_count() > 1:  # which share the tuning, and would have to agree on what a cache has
        raise UserError("training.keep_autotuning (true) is for a run of one process; leave it out")
    if not path.exists():
        return {DUMP: str(path.absolute())}
    options = loading(read_results(path), cache_root(data))
    try:
        jax.jit(lambda: 0, compiler_options=options).lower().compile()
    except jax.errors.JaxRuntimeError as error:
        why = str(error).splitlines()[0]
        raise UserError(f"autotuning results ({path}): XLA does not take them: {why}; delete the file") from error
    return options

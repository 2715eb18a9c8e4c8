"""An update that was compiled elsewhere: `jaxlm plan --save` writes it, `training.compiled_program` names it."""

import functools
import hashlib
import json
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax
from jax.experimental.compilation_cache import compilation_cache
from jax.experimental.serialize_executable import deserialize_and_load, serialize

import jaxlm
from jaxlm.config import to_dict
from jaxlm.data.atomic import atomic_path, atomic_write
from jaxlm.errors import UserError
from jaxlm.ops.compiler import DUMP, LOAD, Options
from jaxlm.parallel.gpus import model_of
from jaxlm.run.autotuning import COMPLETE
from jaxlm.train.assemble import Assembly
from jaxlm.train.own_loss import name_of

PROGRAM, MADE_OF = "program.bin", "program.json"
UNTUNED: Options = {"xla_gpu_autotune_level": "0"}  # where there is no device to try products on
TUNING = (*UNTUNED, LOAD, DUMP, *COMPLETE)  # which may differ where a program is made
_ROOMS = ("config", "model", "ops", "parallel", "train")  # whose code a program is made of


@functools.cache
def source_hash() -> str:
    """SHA-256 of the code that programs are made of."""
    source = hashlib.sha256()
    for room in _ROOMS:
        for path in sorted((Path(jaxlm.__file__).parent / room).rglob("*.py")):
            source.update(path.read_bytes())
    return source.hexdigest()


def _made_of(assembly: Assembly, options: Mapping[str, Any]) -> dict[str, Any]:
    """What has to be the same where a program is made and where it runs, by the words for it."""
    return {
        "jaxlm's code": source_hash(),
        **{name: version(name) for name in ("jax", "jaxlib", "flax", "optax")},
        "the model class": f"{assembly.model_class.__module__}.{assembly.model_class.__qualname__}",
        "the loss": name_of(assembly.own_loss),
        "the configuration": json.loads(json.dumps(to_dict(assembly.config))),
        "the mesh": dict(assembly.mesh.shape),
        "attention": assembly.attention,
        "the compiler's options": {name: x for name, x in sorted(options.items()) if name not in TUNING},
    }


@contextmanager
def without_cache() -> Iterator[None]:
    """JAX compiles anew: what it takes from its persistent cache lacks functions once it is saved (0.10 and 0.11)."""
    before: bool = jax.config.jax_enable_compilation_cache  # type: ignore[attr-defined]
    jax.config.update("jax_enable_compilation_cache", False)
    compilation_cache.reset_cache()  # which has noted whether there is one
    try:
        yield
    finally:
        jax.config.update("jax_enable_compilation_cache", before)
        compilation_cache.reset_cache()


def save_program(
    assembly: Assembly, compiled: jax.stages.Compiled, gpu: str, folder: Path, products: str = "untuned"
) -> None:
    """Writes the update of `assembly`, `compiled` under `without_cache`, into `folder`, which is made.

    Args:
      products: how they were chosen, for people.

    Raises:
      UserError: it can't be written.
    """
    serialized, _, out_tree = serialize(compiled)
    _, metrics = jax.tree.unflatten(out_tree, range(out_tree.num_leaves))
    about = {"made for": gpu, "sha256": hashlib.sha256(serialized).hexdigest(), "metrics": sorted(metrics)}
    about["products"] = products
    about |= _made_of(assembly, assembly.options)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with atomic_path(folder / PROGRAM) as part:
            part.write_bytes(serialized)
        atomic_write(folder / MADE_OF, json.dumps(about, indent=2) + "\n")
    except OSError as error:
        raise UserError(f"--save ({folder}) can't be written: {error.strerror}") from error


def load_program(assembly: Assembly, folder: Path) -> tuple[jax.stages.Compiled | None, str]:
    """(the compiled update, what it was made for and how), or (None, why it can't be used for this run).

    A compiled program is code: open only what you have made yourself.

    Raises:
      UserError: `folder` holds no such program.
    """
    try:
        about = json.loads((folder / MADE_OF).read_text(encoding="utf-8"))
        serialized, gpu, metrics = (folder / PROGRAM).read_bytes(), str(about["made for"]), list(about["metrics"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"training.compiled_program ({folder}): holds no program of jaxlm plan --save") from error
    if hashlib.sha256(serialized).hexdigest() != about.get("sha256"):
        return None, f"{PROGRAM} is damaged, or of another call"
    devices = list(assembly.mesh.devices.flat)
    kind = devices[0].device_kind
    if not re.search(rf"\b{re.escape(model_of(gpu))}\b", kind, re.IGNORECASE):
        return None, f"it was made for {gpu}, and this is {kind}"
    mine = _made_of(assembly, assembly.options)
    if other := [name for name in mine if mine[name] != about.get(name)]:
        return None, f"{' and '.join(other)} {'is' if len(other) == 1 else 'are'} not as where it was made"
    arguments = (assembly.abstract_state, assembly.abstract_batch, assembly.abstract_numbers)
    results = (assembly.abstract_state, dict.fromkeys(metrics, 0))
    trees = jax.tree.structure((arguments, {})), jax.tree.structure(results)
    try:
        program = deserialize_and_load(serialized, *trees, devices[0].client, devices)
        return program, f"{gpu} without it; its products are {about.get('products', 'untuned')}"
    except (RuntimeError, ValueError) as error:
        return None, f"it can't be loaded here: {str(error).splitlines()[0][:200]}"

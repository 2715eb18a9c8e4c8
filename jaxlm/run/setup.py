"""From a configuration as it was asked for to one that is complete, on the devices that it is for."""

import dataclasses
import json
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

from jaxlm.config import (
    Config,
    check_fields,
    check_platform,
    check_together,
    mesh_shape,
    replace_fields,
    to_dict,
    unused_options,
    with_derived,
)
from jaxlm.interop import deepspeed, pretrained

if TYPE_CHECKING:  # a mistake in a configuration shows before JAX is imported, which takes seconds
    import jax

    from jaxlm.run.text import Text
    from jaxlm.train.assemble import Assembly, Resolved
    from jaxlm.train.step import TrainStep

CACHE_HIT = "/jax/compilation_cache/cache_hits"  # JAX's event for a program that was not compiled
Devices: TypeAlias = "Sequence[jax.Device] | Callable[[Config], Sequence[jax.Device]] | int"


def resolve(config: Config, devices: Devices, fresh: bool = False) -> "Resolved":
    """The configuration judged and completed, and the mesh of the devices that it is for.

    It takes the architecture of the model that init_from names, what a DeepSpeed file says, and what follows from other
    fields.

    Args:
      devices: of all hosts, real or those of a topology; or a function that finds them, which is called once the
        configuration is known to be valid; or a number of GPUs that are left abstract, where only shapes are wanted.
      fresh: the run starts over, though there may be one in its folder.

    Raises:
      UserError: names what is wrong, its value and what to do.
    """
    check_fields(config)
    own = config
    asked = pretrained.with_architecture(config, fresh)
    config, _ = deepspeed.apply(asked, world=None)
    check_together(config)
    devices = devices(config) if callable(devices) else devices

    from jaxlm.parallel.mesh import AnyMesh, abstract_mesh, make_mesh, row_shards
    from jaxlm.train.assemble import Resolved

    if isinstance(devices, int):
        mesh: AnyMesh = abstract_mesh(mesh_shape(config, devices))
    else:
        check_platform(config, devices[0].platform)
        mesh = make_mesh(list(devices), mesh_shape(config, len(devices)))
    config, notes = deepspeed.apply(asked, world=row_shards(mesh))
    masked = config.data.format not in ("auto", "text") and config.data.loss_on != "all"
    complete = with_derived(config)
    return Resolved(complete, mesh, (*notes, *unused_options(own, complete)), masked=masked)


def with_text(resolved: "Resolved", text: "Text") -> "Resolved":
    """`resolved` with what the text has shown: the vocabulary size, and whether all of it is learned.

    A model that was trained elsewhere may have more rows than there are tokens; it keeps them.
    """
    resolved = dataclasses.replace(resolved, masked=next(iter(text.rows.parts.values())).learned is not None)
    if resolved.config.training.init_from is not None:
        return resolved
    return resolved.with_fields({"model.vocab_size": text.tokenizer.vocab_size})


def check_same_in_processes(config: Config, fingerprint: str) -> None:
    """Raises UserError if the processes were started with other options or other text; caches may be elsewhere."""
    from jaxlm.parallel.processes import check_same_everywhere

    values = to_dict(replace_fields(config, {"data.cache_dir": None}))
    check_same_everywhere("the configuration or the text", json.dumps([values, fingerprint]))


def compile_steps(assembly: "Assembly", counts: Sequence[int], ahead: str | None) -> "TrainStep":
    """The update of batches of any of `counts` micro-batches, each as `compile_step` makes it."""
    if len(counts) == 1:
        return compile_step(assembly.with_micro_batches(counts[0]), ahead)
    programs = {
        count: compile_step(assembly.with_micro_batches(count), ahead, f" for {count} micro-batch{'es' * (count > 1)}")
        for count in counts
    }
    return lambda state, batch, numbers: programs[len(batch["rows"])](state, batch, numbers)


def compile_step(assembly: "Assembly", ahead: str | None, what: str = "") -> "jax.stages.Compiled":
    """The update: compiled, read from the cache of compiled programs, or there already; says which, and the time.

    Args:
      ahead: training.compiled_program.
      what: of its kind it is, for the lines about it.
    """
    import jax.monitoring

    from jaxlm.ops.compiler import DUMP
    from jaxlm.parallel.processes import say
    from jaxlm.run.compiled import load_program, without_cache

    if ahead is not None:
        program, why = load_program(assembly, Path(ahead).expanduser())
        if program is not None:
            say(f"the compiled step: from {ahead}, made for {why}")
            return program
        say(f"training.compiled_program ({ahead}) is not used: {why}")
    events: list[str] = []
    note = lambda event, **_: events.append(event)  # noqa: E731
    started = time.perf_counter()
    jax.monitoring.register_event_listener(note)
    if not (known := "compiled_step" in vars(assembly)):
        say(f"compiling the step{what}, unless the cache has it ...")
    results = assembly.options.get(DUMP)
    try:
        with without_cache() if results else nullcontext():  # which XLA doesn't tune
            compiled = assembly.compiled_step
    finally:
        jax.monitoring.unregister_event_listener(note)
    if results:
        kept = "kept in" if Path(str(results)).exists() else "XLA has found nothing to write into"
        say(f"training.keep_autotuning: {kept} {results}")
    took = f"in {time.perf_counter() - started:.1f} s"
    if known:
        say(f"the compiled step{what}: that of an earlier run of this process")
    elif CACHE_HIT in events:
        say(f"read the compiled step{what} from the cache {took}")
    else:
        say(f"compiled the step{what} {took}")
    return compiled


def keep_compiled_programs(resolved: "Resolved") -> None:
    """Lets JAX keep compiled programs in the cache folder."""
    import jax

    from jaxlm.data.tokens import cache_root
    from jaxlm.ops.compiler import keep_programs

    keep_programs(cache_root(resolved.config.data) / "compiled")
    if resolved.devices[0].platform == "gpu" and resolved.config.training.deterministic:
        # Every program is kept, as it was autotuned, so that a resumed run has the same ones.
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)

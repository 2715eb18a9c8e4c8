"""The update of a run, compiled for GPUs that are not here; what has been compiled once is kept in the cache folder."""

import dataclasses
import hashlib
import json
import lzma
from importlib.metadata import version
from pathlib import Path

import jax

from jaxlm.config import Config, to_dict
from jaxlm.data.atomic import atomic_path
from jaxlm.data.tokens import cache_root
from jaxlm.errors import UserError
from jaxlm.ops.attention_kernels import choose_ours
from jaxlm.ops.compiler import REPEATABLE, Options, compiler_options
from jaxlm.parallel.processes import say
from jaxlm.plan.targets import TARGETS, device_line, plugin, topology
from jaxlm.run.autotuning import COMPLETE, devices_of, for_device, loading, read_results
from jaxlm.run.compiled import UNTUNED, save_program, source_hash, without_cache
from jaxlm.run.setup import resolve
from jaxlm.train.assemble import Assembly, Resolved, assemble

MOST_DEVICES = 2**16
AS_TUNED = "products are those that a GPU has found to be fastest (--autotuning)"


@dataclasses.dataclass(frozen=True)
class CompiledUpdate:
    """What the compiler makes of an update; bytes are a device's."""

    text: str  # the optimized program as scheduled
    attention: str
    own_kernels: tuple[str, ...]  # what else this package's kernels do
    arguments: int
    outputs: int
    aliased: int  # outputs that take the place of arguments
    temporaries: int
    notes: tuple[str, ...] = ()  # how it differs from what a run would compile

    @property
    def peak(self) -> int:
        """Comparable to a device's `peak_bytes_in_use`."""
        return self.arguments + self.outputs - self.aliased + self.temporaries


def check_devices(config: Config, devices: int) -> None:
    """Raises UserError if there can't be so many devices."""
    if not 1 <= devices <= MOST_DEVICES:
        raise UserError(f"--devices ({devices}) must be from 1 to {MOST_DEVICES}")
    wanted = config.training.world_size
    if wanted not in (None, devices):
        raise UserError(f"--devices ({devices}) differs from training.world_size ({wanted}); give --devices {wanted}")


def resolve_for(config: Config, gpu: str, devices: int, hosts: int) -> Resolved:
    """As `run.setup.resolve`, for GPUs of `TARGETS` that are not here.

    Raises:
      UserError: the configuration is not valid or does not fit the devices, or the compiler is not installed.
    """
    check_devices(config, devices)
    return resolve(config, topology(gpu, devices, hosts))


def compile_update(
    resolved: Resolved, gpu: str, hosts: int, save: Path | None = None, autotuning: Path | None = None
) -> CompiledUpdate:
    """The largest update of a run as the Trainer lowers it for these devices; nothing is allocated.

    Args:
      save: a folder to write the program into, for training.compiled_program.
      autotuning: what a GPU of this kind has found to be fastest, see run/autotuning.py. XLA remembers it for all that
        this process compiles from then on.

    Raises:
      UserError: the compiler can't do it for this GPU, `save` can't be written, or `autotuning` is not usable for it.
    """
    resolved = resolved.at_largest_batch()
    root = cache_root(resolved.config.data)
    folder, tuned = root / "plans", _tuned(autotuning, gpu, root)
    kept = folder / f"{_key(resolved, gpu, hosts, tuned)}.xz"
    if save is None and (known := _read(kept)):
        return known
    say(f"compiling the update for {len(resolved.devices)} x {gpu}: this takes about a minute")
    with without_cache():
        found = _compile(resolved, gpu, save, tuned)
    folder.mkdir(parents=True, exist_ok=True)
    with atomic_path(kept) as part:
        part.write_bytes(lzma.compress(json.dumps(dataclasses.asdict(found)).encode(), preset=1))
    return found


def _read(kept: Path) -> CompiledUpdate | None:
    """What an earlier call has kept; None if it is not there, or was cut short by a full disk."""
    try:
        fields = json.loads(lzma.decompress(kept.read_bytes()))
        return CompiledUpdate(**fields | {name: tuple(fields[name]) for name in ("own_kernels", "notes")})
    except (OSError, EOFError, lzma.LZMAError, ValueError, KeyError, TypeError):
        return None


def _tuned(autotuning: Path | None, gpu: str, cache: Path) -> Options:
    """XLA's options for results of a GPU of this kind, as if they were of the one that is described to it."""
    if autotuning is None:
        return {}
    if jax.__version_info__ >= (0, 11):
        raise UserError(f"--autotuning ({autotuning}): JAX 0.11 takes it only beside the GPU's libraries; use JAX 0.10")
    text, here = read_results(autotuning), device_line(gpu)
    kind = lambda line: line.split(", GPU clock")[0]  # noqa: E731 - its capability and multiprocessors
    others = [line for line in devices_of(text) or ["an unknown line"] if kind(line) != kind(here)]
    if others:
        raise UserError(f"--autotuning ({autotuning}) is of a GPU with {kind(others[0])}; {gpu} has {kind(here)}")
    return loading(for_device(text, here), cache)


def _key(resolved: Resolved, gpu: str, hosts: int, tuned: Options) -> str:
    config = to_dict(resolved.config)
    relevant = {"model": config["model"], "training": config["training"], "max_length": config["data"]["max_length"]}
    packed = resolved.config.data.pack_sequences
    versions = [version(name) for name in ("jax", "jaxlib", "flax", "optax")] + [f"CUDA {plugin()}"]
    parts = [relevant, packed, gpu, TARGETS[gpu], len(resolved.devices), hosts, versions, source_hash()]
    parts += [Path(str(path)).name for path in tuned.values()]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:24]


def _compile(resolved: Resolved, gpu: str, save: Path | None, tuned: Options) -> CompiledUpdate:
    notes = [AS_TUNED if tuned else "products are chosen without tuning, which a run does on its GPU"]
    options = compiler_options(resolved.config.training, "gpu", notes.append) | UNTUNED
    if jax.__version_info__ >= (0, 11) and options.keys() & REPEATABLE.keys():
        options = {name: value for name, value in options.items() if name not in REPEATABLE}
        notes.append("repeatable operations only: left out, JAX 0.11 can't choose such products without a GPU")
    assembly, compiled = _compiled(resolved, options, tuned, notes)
    if save is not None:
        save_program(assembly, compiled, gpu, save, "tuned by --autotuning" if tuned else "untuned")
    return _of(assembly, compiled, notes)


def _compiled(
    resolved: Resolved, options: Options, tuned: Options, notes: list[str]
) -> tuple[Assembly, jax.stages.Compiled]:
    """The update, compiled; what is left out or replaced so that it can be is added to `notes`."""
    attention, strict = None, COMPLETE if tuned else {}
    while True:
        assembly = assemble(resolved, attention=attention, options=options | tuned | strict)
        try:
            return assembly, assembly.compiled_step
        except RuntimeError as error:  # JAX's own is one, too
            if strict and "No cached config found" in str(error):
                notes.append("--autotuning lacks some products of this program: these are chosen without")
                strict = {}
            elif assembly.attention == "cudnn" and "cuDNN" in str(error):
                missing = "as nvidia-cudnn is not installed here"
                notes.append(f"attention: a run takes cuDNN's kernel; ours stands for it, {missing}")
                attention = choose_ours(resolved.config, resolved.capability)
            else:
                raise UserError(f"XLA can't compile this for the GPU: {str(error).splitlines()[0][:300]}") from error


def _of(assembly: Assembly, compiled: jax.stages.Compiled, notes: list[str]) -> CompiledUpdate:
    use, text = compiled.memory_analysis(), compiled.as_text()
    assert use is not None and text is not None
    return CompiledUpdate(
        text,
        assembly.attention,
        tuple(sorted(assembly.own_kernels, reverse=True)),
        use.argument_size_in_bytes,
        use.output_size_in_bytes,
        use.alias_size_in_bytes,
        use.temp_size_in_bytes,
        tuple(notes),
    )

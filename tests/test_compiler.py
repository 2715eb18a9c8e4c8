"""Options of XLA: presets, the user's own, what this XLA does not know, what the environment says."""

import shutil

import jax
import pytest
from conftest import make_config
from jax.experimental.compilation_cache import compilation_cache

from jaxlm import Trainer
from jaxlm.config import TrainingConfig
from jaxlm.config.validate import xla_option
from jaxlm.errors import UserError
from jaxlm.ops import compiler
from jaxlm.ops.compiler import compiler_options, describe
from jaxlm.run.setup import CACHE_HIT

KEPT = (
    "jax_compilation_cache_dir",
    "jax_persistent_cache_enable_xla_caches",
    "jax_persistent_cache_min_compile_time_secs",
)


def options(platform="gpu", **training):
    """The options, and what was said of others."""
    said = []
    return compiler_options(TrainingConfig(**training), platform, said.append), said


def test_every_preset_is_known_to_this_xla():
    for preset in compiler.PRESETS:
        found, said = options(xla_preset=preset)
        assert said == [] and found == compiler.PRESETS[preset] | compiler.REPEATABLE


def test_a_gpus_run_repeats_unless_it_may_not():
    on, off = TrainingConfig(), TrainingConfig(deterministic=False)
    assert describe(on, options()[0]) == "repeatable operations only"
    assert describe(off, options(deterministic=False)[0]).startswith("a run may not repeat bit for bit")
    assert options(platform="cpu") == ({}, [])


def test_unknown_options_are_left_out_with_a_line(monkeypatch):
    found, said = options(xla_options=("xla_gpu_no_such_thing=true", "xla_gpu_enable_triton_gemm=false"))
    assert "xla_gpu_no_such_thing" not in found and found["xla_gpu_enable_triton_gemm"] is False
    assert len(said) == 1 and said[0].startswith("xla_gpu_no_such_thing=True: left out, this XLA does not take it")
    monkeypatch.setitem(compiler.REPEATABLE, "xla_gpu_gone", True)
    found, said = options()
    assert "may not repeat" in describe(TrainingConfig(), found) and len(said) == 1


def test_what_the_environment_says_stays(monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", "--xla_gpu_exclude_nondeterministic_ops=false --xla_gpu_autotune_level=0")
    found, said = options(xla_options=("xla_gpu_autotune_level=4",))
    assert found == {}
    assert said == [f"{name}: as XLA_FLAGS has it" for name in (*compiler.REPEATABLE, "xla_gpu_autotune_level")]


def test_values():
    assert xla_option("xla_a=true") == ("xla_a", True) and xla_option("xla_a=8") == ("xla_a", "8")
    for wrong in ("xla_a", "a=1", "xla_a=", "--xla_a=1", "xla_a=1 2"):
        with pytest.raises(UserError, match="must be xla_NAME=VALUE"):
            xla_option(wrong)


def test_compiled_programs_are_found_where_their_folder_was_copied_to(tmp_path):
    """As in findings/jax-cache-copied.sh."""
    events, before = [], {name: getattr(jax.config, name) for name in KEPT}
    note = lambda event, **_: events.append(event)  # noqa: E731
    jax.monitoring.register_event_listener(note)
    jax.config.update("jax_persistent_cache_enable_xla_caches", "xla_gpu_per_fusion_autotune_cache_dir")  # as JAX does
    try:
        for folder in ("first", "copy"):
            compiler.keep_programs(tmp_path / folder)
            jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
            compilation_cache.reset_cache()
            jax.jit(lambda x: x * 7 + 5).lower(1.5).compile()
            if folder == "first":
                shutil.copytree(tmp_path / "first", tmp_path / "copy")
                assert CACHE_HIT not in events
        assert CACHE_HIT in events
    finally:
        jax.monitoring.unregister_event_listener(note)
        for name, value in before.items():
            jax.config.update(name, value)
        compilation_cache.reset_cache()


def test_options_reach_the_compiler(tmp_path, corpus, monkeypatch):
    """With the real compiler behind it, which refuses what it does not know."""
    seen = []
    compile_step = jax.stages.Lowered.compile

    def spy(lowered, compiler_options=None):
        seen.append(compiler_options)
        return compile_step(lowered, compiler_options)

    monkeypatch.setattr(jax.stages.Lowered, "compile", spy)
    Trainer(make_config(tmp_path, corpus, **{"training.xla_options": ("xla_cpu_enable_fast_min_max=true",)})).train()
    assert seen[-1] == {"xla_cpu_enable_fast_min_max": True}

"""Where the time of generating goes: prompts, new tokens, compiling."""

import dataclasses
import functools
import time
from collections.abc import Callable
from typing import Any, TypeVar

import jax

T = TypeVar("T")
_COMPILE_EVENT = "/jax/core/compile/backend_compile_duration"  # JAX sends it for programs read from its cache, too


@functools.cache  # registers once a process
def _record_compilations() -> list[float]:
    """The seconds of each compilation since the first call; JAX appends to it."""
    seconds: list[float] = []

    def record(event: str, duration_secs: float, **_: str | int) -> None:
        if event == _COMPILE_EVENT:
            seconds.append(duration_secs)

    jax.monitoring.register_event_duration_secs_listener(record)
    return seconds


@dataclasses.dataclass
class Throughput:
    """Tokens, and the seconds that they took."""

    tokens: int = 0
    seconds: float = 0.0

    def __str__(self) -> str:
        rate = f"{self.tokens / self.seconds:,.0f}" if self.seconds else "?"
        return f"{self.tokens:,} tokens in {self.seconds:.2f} s ({rate} tokens/s)"


@dataclasses.dataclass
class Clock:
    """Tokens and seconds of all texts made so far.

    Attributes:
      compiling: seconds spent compiling; `prompt` and `new` leave them out.
      slides: how often a text had filled the model's window, and continued from the second half of it.
    """

    prompt: Throughput = dataclasses.field(default_factory=Throughput)
    new: Throughput = dataclasses.field(default_factory=Throughput)
    compiling: float = 0.0
    slides: int = 0

    def call(self, measured: Throughput, function: Callable[..., T], *arguments: Any, **options: Any) -> T:
        """The finished result of `function(...)`; adds its seconds to `measured`, those until it was compiled apart."""
        compilations = _record_compilations()
        before, begin = len(compilations), time.perf_counter()
        out = function(*arguments, **options)
        if len(compilations) > before:
            compiled = time.perf_counter()
            self.compiling += compiled - begin
            begin = compiled
        jax.block_until_ready(out)
        measured.seconds += time.perf_counter() - begin
        return out

    def summary(self) -> str:
        """One line: what was made, how fast, and what compiling took."""
        parts = [f"generated {self.new}", f"prompts {self.prompt}"]
        if self.compiling:
            parts.append(f"compiling took {self.compiling:.1f} s")
        if self.slides:
            parts.append(f"a full window (model.max_seq_len) went on from its second half {self.slides:,} times")
        return "; ".join(parts)

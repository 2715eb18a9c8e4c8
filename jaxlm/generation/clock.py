"""Where the time of generating goes: prompts, new tokens, compiling."""

import dataclasses
import time
from collections.abc import Callable
from typing import Any, TypeVar

import jax

T = TypeVar("T")
_COMPILED = "/jax/core/compile/backend_compile_duration"  # JAX's own event, also for programs read from its cache
_programs = 0


def _count_programs(event: str, duration_secs: float, **_: str | int) -> None:
    global _programs
    _programs += event == _COMPILED


jax.monitoring.register_event_duration_secs_listener(_count_programs)


@dataclasses.dataclass
class Part:
    """Tokens, and the seconds that they took."""

    tokens: int = 0
    seconds: float = 0.0

    def __str__(self) -> str:
        rate = f"{self.tokens / self.seconds:,.0f}" if self.seconds else "?"
        return f"{self.tokens:,} tokens in {self.seconds:.2f} s ({rate} tokens/s)"


class Clock:
    """`prompt` and `new` are what was computed, compiling left out; `compiling` is that, in seconds.

    `slides` counts how often a text had filled the model's window, and went on from the second half of it.
    """

    def __init__(self) -> None:
        self.prompt, self.new, self.compiling, self.slides = Part(), Part(), 0.0, 0

    def call(self, part: Part, function: Callable[..., T], *arguments: Any, **options: Any) -> T:
        """`function(...)`, waited for; its time is the part's, but for that until its program was compiled."""
        programs, begin = _programs, time.perf_counter()
        out = function(*arguments, **options)
        if _programs > programs:
            compiled = time.perf_counter()
            self.compiling += compiled - begin
            begin = compiled
        jax.block_until_ready(out)
        part.seconds += time.perf_counter() - begin
        return out

    def forget_tokens(self) -> None:
        """Begins anew, but for what compiling took."""
        self.prompt, self.new, self.slides = Part(), Part(), 0

    def summary(self) -> str:
        """One line: what was made, how fast, and what compiling took."""
        lines = [f"generated {self.new}", f"prompts {self.prompt}"]
        if self.compiling:
            lines.append(f"compiling took {self.compiling:.1f} s")
        if self.slides:
            lines.append(f"a full window (model.max_seq_len) went on from its second half {self.slides:,} times")
        return "; ".join(lines)

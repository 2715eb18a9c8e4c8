"""Learning-rate schedules, worked out on the host; adding one is one entry in SCHEDULES."""

import math
from collections.abc import Callable

from jaxlm.config import TrainingConfig

Schedule = Callable[[int], float]  # optimizer updates done so far -> learning rate

# Each is the decay after warm-up: fraction of the way done, in [0, 1] -> factor, 1 at the start, 0 at the end.
SCHEDULES: dict[str, Callable[[TrainingConfig], Callable[[float], float]]] = {
    "cosine": lambda c: lambda x: 0.5 * (1 + math.cos(math.pi * x)),
    "linear": lambda c: lambda x: 1 - x,
    "polynomial": lambda c: lambda x: (1 - x) ** c.lr_power,
    "constant": lambda c: lambda x: 1.0,
    "wsd": lambda c: lambda x: min((1 - x) / c.decay_fraction, 1.0),
}


def schedule_end(config: TrainingConfig, total_steps: int) -> int:
    """The update at which the learning rate reaches its last value."""
    return config.schedule_steps if config.schedule_steps is not None else total_steps


def effective_warmup(config: TrainingConfig, total_steps: int) -> int:
    """warmup_steps, but at most a tenth of the run and of the schedule."""
    return min(config.warmup_steps, min(total_steps, schedule_end(config, total_steps)) // 10)


def build_schedule(config: TrainingConfig, total_steps: int) -> Schedule:
    """Warm-up to learning_rate, then the decay to min_lr_ratio * learning_rate at the schedule's end.

    Update number s (from 0) uses `schedule(s)`: the first already moves, the last one uses the end value. The end is
    at `schedule_steps`, or at `total_steps`.
    """
    end, warmup = schedule_end(config, total_steps), effective_warmup(config, total_steps)
    decay = SCHEDULES[config.lr_scheduler](config)
    peak, floor, start = config.learning_rate, config.min_lr_ratio, config.warmup_min_ratio

    def schedule(step: int) -> float:
        if step < warmup:
            log, linear = math.log(step + 2) / math.log(warmup + 2), (step + 1) / (warmup + 1)
            return peak * (start + (1 - start) * (log if config.warmup_shape == "log" else linear))
        done = min((step - warmup) / max(end - 1 - warmup, 1), 1.0)
        return peak * (floor + (1 - floor) * decay(done))

    return schedule

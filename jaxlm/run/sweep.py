"""A sweep: the points that it tries, and what its folder knows of each (sweep.json)."""

import dataclasses
import json
import math
import os
import random
import re
import statistics
from collections.abc import Sequence
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

from jaxlm.config import Config, shown
from jaxlm.config.fields import field_values, plain
from jaxlm.config.schema import FIELDS
from jaxlm.data.atomic import atomic_write
from jaxlm.errors import UserError

FILE = "sweep.json"
NEW, BEGUN, DONE, FAILED = "not begun", "not finished", "done", "failed"
MOST_POINTS, LONGEST_NAME = 10_000, 120
Point: TypeAlias = dict[str, Any]  # {"section.field": value}


class Axis(NamedTuple):
    """What a field is to be: one of `values`; or, where there are none, anything from `low` to `high`."""

    field: str
    values: Sequence[Any]
    low: float = 0
    high: float = 0
    log: bool = False  # evenly by the logarithm
    whole: bool = False  # integers alone

    def at(self, share: float) -> float:
        """The number at `share`, from 0 to 1, of the range; one that is not whole has 5 digits, but for the ends."""
        if share in (0, 1):
            return (self.low, self.high)[int(share)]
        value = self.low * (self.high / self.low) ** share if self.log else self.low + (self.high - self.low) * share
        return round(value) if self.whole else min(max(float(f"{value:.5g}"), self.low), self.high)

    def draw(self, rng: random.Random) -> Any:
        """A value; numbers of a range are as likely by their size, or by its logarithm."""
        if self.values:
            return rng.choice(self.values)
        if not self.whole:
            return self.at(rng.random())
        return min(math.floor(self._replace(high=self.high + 1, whole=False).at(rng.random())), self.high)


def points(axes: Sequence[Axis], trials: int | None, seed: int) -> list[Point]:
    """All combinations of the axes' values; or, of as many `trials`, different ones drawn from them.

    Raises:
      UserError: there are too many, or not so many.
    """
    if trials is None:
        if (size := math.prod(len(axis.values) for axis in axes)) > MOST_POINTS:
            raise UserError(f"--vary gives {size:,} points; {MOST_POINTS:,} at most, or some of them with --trials N")
        found = dict.fromkeys(product(*(axis.values for axis in axes)))
    else:
        rng, found = random.Random(seed), {}
        for _ in range(100 * trials + 1000):
            found[tuple(axis.draw(rng) for axis in axes)] = None
            if len(found) == trials:
                break
        else:
            raise UserError(f"--trials ({trials}): --vary gave only {len(found)} different points; lower it")
    return [dict(zip((axis.field for axis in axes), values, strict=True)) for values in found]


@dataclasses.dataclass
class Trial:
    """A point, and how it went. `name` is that of its run's folder."""

    name: str
    values: Point
    status: str = NEW
    seconds: float = 0.0  # that it took, also before it was stopped
    loss: float | None = None  # the lowest on the validation text, nats a token
    bits_per_byte: float | None = None  # of that evaluation
    tokens_per_second: float | None = None  # the median
    held_out_bytes: int | None = None  # of the validation text
    reason: str = ""  # why it failed

    def judge(self, folder: Path) -> None:
        """Takes the figures from the folder of its run, which has ended."""
        from jaxlm.report.runs import read_run  # jinja2 comes with it, which no other command waits for

        run = read_run(folder)
        rates = [rate for _, rate in run.finite("train/tokens_per_second")]
        self.tokens_per_second = statistics.median(rates) if rates else None
        if evaluated := run.finite("eval/loss"):
            step, self.loss = min(evaluated, key=lambda point: point[1])
            self.bits_per_byte = run.at("eval/bits_per_byte", step)
        self.status, self.reason = (DONE, "") if evaluated else (FAILED, "its validation loss was never finite")


def named(found: Sequence[Point]) -> list[Trial]:
    """A trial for each point, under a name for its folder: learning_rate=0.0003,n_layers=2."""
    trials: dict[str, Trial] = {}
    for point in found:
        text = ",".join(f"{field.rpartition('.')[2]}={shown(value)}" for field, value in point.items())
        name = re.sub(r"[^\w.,=+-]", "_", text)[:LONGEST_NAME]
        name = f"{name}_{len(trials)}" if name in trials else name
        trials[name] = Trial(name, {field: plain(value) for field, value in point.items()})
    return [*trials.values()]


def arguments_of(config: Config, vary: dict[str, str], trials: int | None) -> dict[str, Any]:
    """What makes a sweep, by name; the values that it varies, and its folder, are of no importance."""
    rest = {name: plain(x) for name, x in field_values(config).items() if name not in vary}
    del rest["training.checkpoint_dir"]
    return {**{f"--vary {field}": text for field, text in vary.items()}, "--trials": trials, **rest}


def write(folder: Path, arguments: dict[str, Any], trials: Sequence[Trial]) -> None:
    """Writes sweep.json, whole or not at all."""
    values = {"arguments": arguments, "trials": [dataclasses.asdict(trial) for trial in trials]}
    atomic_write(folder / FILE, json.dumps(values, indent=1) + "\n")


def read(folder: Path, arguments: dict[str, Any]) -> list[Trial] | None:
    """The trials of the sweep in `folder`; None if it holds none yet.

    Raises:
      UserError: it is another sweep's, or a run's.
    """
    ways = "name another --training.checkpoint_dir, or start over with --fresh (the old folder is kept)"
    if not os.path.isfile(folder / FILE):
        if os.path.isfile(folder / "config.json"):
            raise UserError(f"training.checkpoint_dir ({folder}) holds a run, not a sweep; {ways}")
        return None
    try:
        saved = json.loads((folder / FILE).read_text(encoding="utf-8"))
        before, trials = dict(saved["arguments"]), [Trial(**trial) for trial in saved["trials"]]
    except (OSError, ValueError, TypeError, LookupError) as error:
        raise UserError(f"{folder / FILE}: not readable ({error}); {ways}") from error
    defaults = {name: plain(field.default) for name, field in FIELDS.items()}  # of fields that a newer version has
    old, new = defaults | before, defaults | arguments
    names = sorted(name for name in before.keys() | arguments if f"--vary {name}" not in before.keys() | arguments)
    pairs = [(name, old.get(name), new.get(name)) for name in names]
    if changed := [f"{name} was {json.dumps(a)}, is {json.dumps(b)}" for name, a, b in pairs if a != b]:
        raise UserError(f"{folder} holds a sweep with other arguments: {'; '.join(changed)}. Set it back, {ways}")
    return trials

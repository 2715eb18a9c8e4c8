"""How many rows each update takes, and which ones of the stream, as training.batch_schedule says."""

import dataclasses
import re
from bisect import bisect_left
from collections.abc import Mapping
from fractions import Fraction
from typing import Any

from jaxlm.errors import UserError


@dataclasses.dataclass(frozen=True)
class Batches:
    """The batches of a run. Updates are numbered from 0; they take the rows of the stream one after the other.

    Args:
      rows: of a micro-batch, over all devices.
      accumulation: micro-batches of an update, before the schedule changes it.
      schedule: (update, times): from that update on, `times` times as many micro-batches.
      offset: rows that come before the first update; other than 0 where batches have changed in the middle of a run.
    """

    rows: int
    accumulation: int = 1
    schedule: tuple[tuple[int, int], ...] = ()
    offset: int = 0

    def micro_batches(self, step: int) -> int:
        """How many update `step` has."""
        times = [times for first, times in self.schedule if first <= step]
        return self.accumulation * (times[-1] if times else 1)

    def position(self, step: int) -> int:
        """Rows of the stream that come before update `step`: all that the updates before it take."""
        taken, before = step, 1  # in rows of an update without the schedule
        for first, times in self.schedule:
            taken += (times - before) * max(0, step - first)
            before = times
        return self.offset + taken * self.rows * self.accumulation

    def updates_for(self, rows: Fraction | int, most: int) -> int:
        """Updates that take all `rows` first rows of the stream, `most` + 1 if those are more than `most`."""
        return bisect_left(range(most + 1), rows, key=self.position)

    def counts(self, steps: range) -> list[int]:
        """The numbers of micro-batches that occur in `steps`, in that order."""
        starts = [first for first, _ in self.schedule if first in steps]
        return list(dict.fromkeys(map(self.micro_batches, [*steps[:1], *starts])))


def batches_of(start: Mapping[str, Any]) -> Batches:
    """Those of a run's start, a line of its starts.jsonl, in rows alone."""
    schedule = read_schedule(tuple(filter(None, start.get("batch_schedule", "").split(","))))  # older ones have none
    return Batches(start["rows_an_update"], schedule=schedule)


def read_schedule(items: tuple[str, ...]) -> tuple[tuple[int, int], ...]:
    """training.batch_schedule as `Batches` has it, its updates from 0; UserError if it is not of its form."""
    schedule: list[tuple[int, int]] = []
    for item in items:
        found = re.fullmatch(r"(\d{1,10}):(\d{1,10})", item)
        first, times = (int(found[1]), int(found[2])) if found else (0, 0)
        if first < 2 or times < 1:
            raise UserError(
                f"training.batch_schedule ({item}) must be UPDATE:TIMES, such as 1001:2 for twice the micro-batches "
                "from update 1001 on; UPDATE is at least 2, TIMES at least 1"
            )
        if schedule and first - 1 <= schedule[-1][0]:
            raise UserError(f"training.batch_schedule ({item}): updates must come in order, each once; sort them")
        schedule.append((first - 1, times))
    return tuple(schedule)

"""How a field is declared."""

import dataclasses
import typing
from typing import TypeVar

T = TypeVar("T")


def option(
    default: T,
    help: str,
    *,
    choices: tuple[str, ...] = (),
    low: float | None = None,
    high: float | None = None,
    above: float | None = None,
    below: float | None = None,
    others: bool = False,
    path: bool = False,
    resumable: bool = False,
) -> T:
    """Declares a field. `low`/`high` are inclusive bounds, `above`/`below` exclusive ones.

    `others` says that more than `choices` may be valid. `path` marks names of files and folders, in which ~ stands for
    a home folder; `resumable` a field that does not change the training itself, so that a run may go on with another
    value.
    """
    metadata = {"help": help, "choices": choices, "low": low, "high": high, "above": above, "below": below}
    metadata |= {"others": others, "path": path, "resumable": resumable}
    return typing.cast(T, dataclasses.field(default=default, metadata=metadata))


def split_list(text: str) -> list[str]:
    """What stands between commas; of nothing, an empty text, which is refused wherever one is looked at."""
    return [part.strip() for part in text.split(",") if part.strip()] or [""]


class Unset(float):
    """A default that the model of training.init_from replaces; the same number, written by a user, stays."""


@dataclasses.dataclass(frozen=True)
class Section:
    """Fields, read only; a list that is given is kept as a tuple, and of text what is between its commas."""

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if isinstance(value, str) and isinstance(field.default, tuple):
                value = split_list(value)
            if isinstance(value, list):  # lists are welcome in config files; frozen sections hold tuples
                object.__setattr__(self, field.name, tuple(value))

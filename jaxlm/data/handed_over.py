"""Rows that a program hands over. They are not copied: each pass over the text reads them again."""

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias, cast

import numpy as np

from jaxlm.config import DataConfig
from jaxlm.data.documents import Found, RowFormat
from jaxlm.data.formats import INPUT_IDS, columns_read
from jaxlm.data.nested import cleaner
from jaxlm.errors import UserError

if TYPE_CHECKING:
    import datasets

# Rows of str, dict or token ids that can be read again and again, a datasets.Dataset, or a function that returns them.
Dataset: TypeAlias = Iterable[Any] | Callable[[], Iterable[Any]]
KINDS = "rows are text (str), dict, or token ids (integer arrays)"


class HandedOver(NamedTuple):
    """What `Trainer(config, train_dataset=..., eval_dataset=...)` got."""

    train: Dataset
    validation: Dataset | None


class PythonRows:
    """The rows of a data set, as mappings. Messages call it `name`, and its rows `name[0]`, `name[1]`, ...

    Raises:
      UserError: it is nothing that can be read again and again.
    """

    def __init__(self, given: Dataset, name: str, data: DataConfig) -> None:
        self.name, self._column = name, data.text_column
        self._columns: list[str] | None = None
        self._clean: dict[str, Callable[[Any], Any]] = {}
        if isinstance(given, str | bytes) or hasattr(given, "keys"):  # a dict of columns, a DatasetDict, a DataFrame
            raise UserError(f"{name} is one {_kind(given)}, not rows; hand over a list or a datasets.Dataset")
        if isinstance(given, Iterator):
            raise UserError(
                f"{name} is a {_kind(given)}, which can be read once, and text is read more often; hand over a list, "
                "a datasets.Dataset, or a function that returns a new iterator"
            )
        self._given = given
        shape = getattr(given, "format", None)  # a transform makes other columns of those that are stored
        transformed = isinstance(shape, dict) and shape.get("type") == "custom"
        # Of a datasets.Dataset, what else it holds may be costly to decode.
        if hasattr(given, "select_columns") and not transformed:
            table = cast("datasets.Dataset", given)
            self._columns = table.column_names
            if known := [column for column in columns_read(data) if column in (self._columns or ())]:
                self._given = table.select_columns(known)
                if table.features is not None:  # a stream may not know them
                    schema = table.features.arrow_schema
                    self._clean = {column: cleaner(schema.field(column).type) for column in known}

    def _pass(self) -> Iterator[Any]:
        given = self._given
        if not isinstance(given, Iterable) and hasattr(given, "__getitem__") and hasattr(given, "__len__"):
            return (given[i] for i in range(len(given)))  # such as one of torch.utils.data
        rows = given() if not isinstance(given, Iterable) and callable(given) else given
        if not isinstance(rows, Iterable):
            raise UserError(f"{self.name} ({_kind(rows)}) holds no rows; {KINDS}")
        return iter(rows)

    def __iter__(self) -> Iterator[tuple[str, Mapping[str, Any]]]:
        """A new pass over the rows, with their places."""
        for i, row in enumerate(self._pass()):
            place = f"{self.name}[{i}]"
            if isinstance(row, Mapping):
                yield place, row
            elif isinstance(row, str):
                yield place, {self._column: row}
            elif isinstance(row, list | tuple) or hasattr(row, "__array__"):
                yield place, {INPUT_IDS: row}
            else:
                raise UserError(f"{place} is {_kind(row)}; {KINDS}")

    def first(self) -> Mapping[str, Any]:
        return next((row for _, row in self), {})

    def read(self, format_: RowFormat) -> Found:
        """A new pass over the documents. Raises UserError where a column is missing."""
        if self._columns is not None:
            format_.columns(self._columns, self.name)
        return (format_.document(self._cleaned(row), place) for place, row in self)

    def _cleaned(self, row: Mapping[str, Any]) -> Mapping[str, Any]:
        return {**row, **{name: clean(row[name]) for name, clean in self._clean.items()}} if self._clean else row

    def measured(self, data: DataConfig) -> tuple[int, str]:
        """How many there are, and a hash of what is read of them; UserError: there is none."""
        digest, count = hashlib.sha256(), 0
        for count, (_, row) in enumerate(self, 1):  # noqa: B007 - the last one
            content = {column: row[column] for column in columns_read(data) if column in row}
            digest.update(json.dumps(content, skipkeys=True, default=_plain).encode() + b"\n")
        if not count:
            raise UserError(f"{self.name} holds no rows")
        return count, digest.hexdigest()


def _kind(value: object) -> str:
    return type(value).__name__


def _plain(value: object) -> object:
    """What JSON has instead of an array, or of what is no text: it has to tell any two contents apart."""
    if not isinstance(value, bytes) and (isinstance(value, Sequence) or hasattr(value, "__array__")):
        return np.asarray(value).tolist()
    return repr(value)


def handed_over(data: DataConfig, train: Dataset | None, validation: Dataset | None) -> HandedOver | None:
    """The data sets of a run; None: there are none, and `data` names its text.

    Raises:
      UserError: a held-out one alone, or beside what `data` names.
    """
    if train is None:
        if validation is not None:
            raise UserError("eval_dataset is set but train_dataset is not; hand over both")
        return None
    for name in ("train_files", "validation_files", "sources"):
        if named := vars(data)[name]:
            listed = ", ".join(named)
            raise UserError(f"data.{name} ({listed}) and train_dataset both name the text; leave one out")
    return HandedOver(train, validation)

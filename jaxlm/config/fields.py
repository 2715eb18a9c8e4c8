"""Fields by name: their types, configurations from and to plain values, what differs between two of them."""

import dataclasses
import difflib
import types
import typing
from collections.abc import Iterable, Mapping
from typing import Any

from jaxlm.config.schema import SECTIONS, Config
from jaxlm.errors import UserError

SHOWN = 200  # characters of a wrong value that a message repeats


def nearest(name: str, known: Iterable[str]) -> str:
    """' (did you mean X?)' for the known name closest to `name`, or ''."""
    close = difflib.get_close_matches(name, list(known), n=1)
    return f" (did you mean {close[0]}?)" if close else ""


def accepts(annotation: Any, value: Any) -> bool:
    """Whether `value` has the declared type: an int passes for a float, a bool passes for neither."""
    options = typing.get_args(annotation) if isinstance(annotation, types.UnionType) else (annotation,)
    for kind in options:
        if typing.get_origin(kind) is tuple:
            item_type = typing.get_args(kind)[0]
            if isinstance(value, tuple) and all(item_type is Any or isinstance(item, item_type) for item in value):
                return True
        elif kind is float:
            if isinstance(value, int | float) and not isinstance(value, bool):
                return True
        elif isinstance(value, kind) and (kind is bool or not isinstance(value, bool)):
            return True
    return False


def type_name(annotation: Any) -> str:
    """How a declared type is called in messages, such as 'int or none'."""
    options = typing.get_args(annotation) if isinstance(annotation, types.UnionType) else (annotation,)
    names = {type(None): "none", bool: "true or false", str: "text"}
    return " or ".join(
        "list of text" if typing.get_origin(kind) is tuple else names.get(kind, kind.__name__) for kind in options
    )


def excerpt(value: Any) -> str:
    """`value` for a message, cut where it is long."""
    try:
        text = repr(value)
    except ValueError:  # Python refuses to write out an int of thousands of digits
        return f"{type(value).__name__} too large to show"
    return text if len(text) <= SHOWN else f"{text[:SHOWN]}..."


def shown(value: Any) -> str:
    """A field's value as the command line takes it: true, none, 0.1, a,b or []."""
    if isinstance(value, tuple | list):
        return ",".join(map(str, map(plain, value))) or "[]"
    if isinstance(value, bool):
        return str(value).lower()
    return "none" if value is None else str(plain(value)) or '""'


def replace_fields(config: Config, values: Mapping[str, Any]) -> Config:
    """A copy of `config` with the fields named in `values` ("section.field") set.

    Raises:
      UserError: a name is unknown.
    """
    changes: dict[str, dict[str, Any]] = {name: {} for name in SECTIONS}
    for dotted, value in values.items():
        section, _, field = dotted.partition(".")
        if section not in SECTIONS:
            raise UserError(
                f"{dotted}: unknown section {section!r}{nearest(section, SECTIONS)}; use model, training or data"
            )
        known = [f.name for f in dataclasses.fields(SECTIONS[section])]
        if field not in known:
            elsewhere = [f"{s}.{field}" for s in SECTIONS if field in {f.name for f in dataclasses.fields(SECTIONS[s])}]
            hint = f" (did you mean {elsewhere[0]}?)" if elsewhere else nearest(field, known)
            raise UserError(f"{dotted}: unknown field{hint}")
        changes[section][field] = value
    sections = {name: dataclasses.replace(getattr(config, name), **changes[name]) for name in SECTIONS}
    return Config(**typing.cast(Any, sections))


def to_dict(config: Config) -> dict[str, dict[str, Any]]:
    """The configuration as plain JSON values, by section; an object in report_to as the name of its class."""
    return {
        name: {field.name: plain(getattr(getattr(config, name), field.name)) for field in dataclasses.fields(section)}
        for name, section in SECTIONS.items()
    }


def plain(value: Any) -> Any:
    """A field's value as JSON has it: a tuple as a list, an object as "module:Class"."""
    if isinstance(value, tuple):
        return [plain(item) for item in value]
    if value is None or isinstance(value, bool | int | float | str):
        return value
    return f"{type(value).__module__}:{type(value).__qualname__}"


def from_dict(values: Any, where: str) -> Config:
    """The configuration held by the JSON object `values`; fields left out keep their defaults.

    Raises:
      UserError: not an object of sections, or an unknown name. `where` says where it came from.
    """
    if not isinstance(values, dict) or not all(isinstance(section, dict) for section in values.values()):
        raise UserError(f'{where}: expected {{"model": {{}}, "training": {{}}, "data": {{}}}}')
    unknown = [name for name in values if name not in SECTIONS]
    if unknown:
        raise UserError(
            f"{where}: unknown section {unknown[0]!r}{nearest(unknown[0], SECTIONS)}; use model, training, data"
        )
    fields = {f"{section}.{name}": value for section in values for name, value in values[section].items()}
    try:
        return replace_fields(Config(), fields)
    except UserError as error:
        raise UserError(f"{where}: {error}") from error


def with_derived(config: Config) -> Config:
    """With what follows from other fields filled in: zero_stage and scan_layers."""
    stage = config.training.zero_stage or 0
    scan = config.model.scan_layers
    if scan is None:
        scan = config.model.gradient_checkpointing or stage == 3
    return replace_fields(config, {"training.zero_stage": stage, "model.scan_layers": scan})


def changed_fields(old: Config, new: Config) -> dict[str, tuple[Any, Any]]:
    """{"section.field": (old, new)} for the fields that change the training and differ."""
    return {
        f"{name}.{field.name}": (getattr(getattr(old, name), field.name), getattr(getattr(new, name), field.name))
        for name, section in SECTIONS.items()
        for field in dataclasses.fields(section)
        if not field.metadata["resumable"]
        and getattr(getattr(old, name), field.name) != getattr(getattr(new, name), field.name)
    }

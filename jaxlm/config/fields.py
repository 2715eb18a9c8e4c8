"""Fields by name: their types, configurations from and to plain values, what differs between two of them."""

import dataclasses
import difflib
import operator
import tomllib
import types
import typing
from collections.abc import Callable, Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

from jaxlm.config.schema import FIELDS, PYTHON, SECTIONS, STDLIB, Config, DataConfig
from jaxlm.errors import UserError

SHOWN = 200  # characters of a wrong value that a message repeats
TEXTS = ("data.train_files", "data.dataset_name", "data.sources")  # what names the text, one at a time


def nearest(name: str, known: Iterable[str]) -> str:
    """' (did you mean X?)' for the known name closest to `name`, in any case, or ''."""
    by_lower = {each.lower(): each for each in known}
    close = difflib.get_close_matches(name.lower(), by_lower, n=1)
    return f" (did you mean {by_lower[close[0]]}?)" if close else ""


def _last(name: str) -> str:
    return name.lstrip("-").rpartition(".")[2].replace("-", "_").lower()


def meant(name: str, known: Iterable[str]) -> str:
    """As `nearest`, for an option: also by its name alone, without its section, and by that of other trainers.

    Args:
      known: options, as they are written here.
    """
    known, word = list(known), _last(name)
    same = [each for each in known if _last(each) == word]
    if not same:
        tables = tomllib.loads((Path(__file__).parent / "names.toml").read_text(encoding="utf-8")).values()
        there = next((table[word] for table in tables if word in table), None)
        if there == "":
            return " (there is no such option; docs/pytorch.md says what is done)"
        same = [each for each in known if there and each.lstrip("-") in there.replace("--", "").split()]
        if there and not same and there.split()[0] not in FIELDS:
            return f" (here that is {there})"
    return f" (did you mean {' or '.join(same)}?)" if same else nearest(name, known)


def kinds_of(annotation: Any) -> tuple[Any, ...]:
    """The types that a declared type allows, such as int and NoneType for int | None."""
    return typing.get_args(annotation) if isinstance(annotation, types.UnionType) else (annotation,)


def check_choice(name: str, value: str, choices: Collection[str]) -> None:
    """Raises UserError, which `name` begins, unless `value` is one of `choices`."""
    if value not in choices:
        raise UserError(f"{name} ({value[:SHOWN]}) is not one of {', '.join(choices)}{nearest(value, choices)}")


def accepts(annotation: Any, value: object) -> bool:
    """Whether `value` has the declared type: an int passes for a float, a bool passes for neither."""
    if typing.get_origin(annotation) is tuple:
        item_type = typing.get_args(annotation)[0]
        return isinstance(value, tuple) and (item_type is Any or all(isinstance(item, item_type) for item in value))
    kinds = kinds_of(annotation)
    if isinstance(value, bool):
        return bool in kinds
    return isinstance(value, (*kinds, int) if float in kinds else kinds)


def type_name(annotation: Any) -> str:
    """How a declared type is called in messages, such as 'int or none'."""
    if typing.get_origin(annotation) is tuple:
        return "list of text"
    names = {type(None): "none", bool: "true or false", str: "text"}
    return " or ".join(names.get(kind, kind.__name__) for kind in kinds_of(annotation))


def excerpt(value: object, write: Callable[[object], str] = repr) -> str:
    """`value` for a message, as `write` has it, cut where it is long."""
    try:
        text = write(value)
    except ValueError:  # Python refuses to write out an int of thousands of digits
        return f"{type(value).__name__} too large to show"
    return text if len(text) <= SHOWN else f"{text[:SHOWN]}..."


def shown(value: object) -> str:
    """A field's value as the command line takes it: true, none, 0.1, a,b or []."""
    if isinstance(value, tuple | list):
        return ",".join(map(str, map(plain, value))) or "[]"
    if isinstance(value, bool):
        return str(value).lower()
    return "none" if value is None else str(plain(value)) or '""'


def field_values(config: Config) -> dict[str, Any]:
    """Every field's value by its dotted name, "section.field"."""
    return {dotted: operator.attrgetter(dotted)(config) for dotted in FIELDS}


def replace_fields(config: Config, values: Mapping[str, Any]) -> Config:
    """A copy of `config` with the fields named in `values` ("section.field") set.

    A text that is named (files, a data set, sources) replaces the one before, and options that this leaves without use
    get their defaults.

    Raises:
      UserError: a name is unknown, or two texts are named.
    """
    named = {dotted: values[dotted] for dotted in TEXTS if values.get(dotted) not in (None, (), [])}
    if len(named) > 1:
        both = " and ".join(f"{dotted} ({shown(value)})" for dotted, value in named.items())
        raise UserError(f"{both} both name the text; leave one out")
    others: dict[str, Any] = {}
    if "data.sources" in named:
        others = {"data.train_files": ()}
    elif named:
        others = {"data.sources": (), "data.anneal_weights": (), "data.anneal_from": None}
    if "data.dataset_name" in named:
        others |= {"data.train_files": (), "data.validation_files": ()}
        if named["data.dataset_name"] != config.data.dataset_name:
            others["data.dataset_config"] = None
    values = others | dict(values)
    changed = _with_fields(config, values)
    stale = without_use(changed.data).keys() - without_use(config.data).keys() - values.keys()
    return _with_fields(changed, {dotted: FIELDS[dotted].default for dotted in stale})


def without_use(data: DataConfig) -> dict[str, str]:
    """{option of the text that has no use: the one because of which it has none}."""
    unused = dict.fromkeys(("data.dataset_config", "data.dataset_split", "data.validation_split"), "data.dataset_name")
    held_out = None
    if data.train_files or data.sources:
        text = "data.train_files" if data.train_files else "data.sources"
        unused = dict.fromkeys([*unused, "data.dataset_name"], text)
        held_out = "data.validation_files" if data.validation_files else None
    elif data.dataset_name not in (STDLIB, PYTHON):
        unused, held_out = {}, None if data.validation_split is None else "data.validation_split"
    return unused | ({"data.validation_fraction": held_out} if held_out else {})


def _with_fields(config: Config, values: Mapping[str, Any]) -> Config:
    changes: dict[str, dict[str, Any]] = {name: {} for name in SECTIONS}
    for dotted, value in values.items():
        section, _, field = dotted.partition(".")
        _check_section(section, where=dotted)
        if dotted not in FIELDS:
            raise UserError(f"{dotted}: unknown field{meant(dotted, FIELDS)}")
        changes[section][field] = value
    sections = {name: dataclasses.replace(getattr(config, name), **changes[name]) for name in SECTIONS}
    return Config(**typing.cast(Any, sections))


def _check_section(name: str, where: str) -> None:
    if name not in SECTIONS:
        raise UserError(f"{where}: unknown section {name!r}{nearest(name, SECTIONS)}; use model, training or data")


def to_dict(config: Config) -> dict[str, dict[str, Any]]:
    """The configuration as plain JSON values, by section; an object in report_to as the name of its class."""
    return {name: {field: plain(x) for field, x in vars(section).items()} for name, section in vars(config).items()}


def plain(value: Any) -> Any:
    """A field's value as JSON has it: a tuple as a list, an object as "module:Class"."""
    if isinstance(value, tuple):
        return [plain(item) for item in value]
    if value is None or isinstance(value, bool | int | float | str):
        return value
    return f"{type(value).__module__}:{type(value).__qualname__}"


def from_dict(values: object, where: str) -> Config:
    """The configuration held by the JSON object `values`; fields left out keep their defaults.

    Raises:
      UserError: not an object of sections, or an unknown name. `where` says where it came from.
    """
    stray = (
        next((name for name, x in values.items() if not isinstance(x, dict)), "") if isinstance(values, dict) else ""
    )
    if not isinstance(values, dict) or stray:
        found = f"; {stray} stands outside of them{meant(stray, FIELDS)}" if stray else ""
        raise UserError(f'{where}: expected {{"model": {{}}, "training": {{}}, "data": {{}}}}{found}')
    for name in values:
        _check_section(name, where)
    fields = {f"{section}.{name}": value for section in values for name, value in values[section].items()}
    try:
        return _with_fields(Config(), fields)
    except UserError as error:
        raise UserError(f"{where}: {error}") from error


def with_derived(config: Config) -> Config:
    """With what follows from other fields filled in: zero_stage, scan_layers, and defaults for what has no use."""
    stage = config.training.zero_stage or 0
    scan = config.model.scan_layers
    if scan is None:
        scan = config.model.gradient_checkpointing or stage == 3
    unused = {dotted: FIELDS[dotted].default for dotted in without_use(config.data)}
    return _with_fields(config, unused | {"training.zero_stage": stage, "model.scan_layers": scan})


def changed_fields(old: Config, new: Config) -> dict[str, tuple[Any, Any]]:
    """{"section.field": (old, new)} for the fields that change the training and differ."""
    before, after = field_values(old), field_values(new)
    changed = [name for name in FIELDS if before[name] != after[name] and not FIELDS[name].metadata["resumable"]]
    return {name: (before[name], after[name]) for name in changed}

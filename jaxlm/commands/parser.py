"""The parser of the command line: options of configuration files and fields, and values by type."""

import argparse
import dataclasses
import glob
import json
import os
import re
import sys
import typing
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NoReturn

from jaxlm.config import SECTIONS, Config, load_config, replace_fields, shipped_configs, shown, type_name
from jaxlm.config.fields import excerpt, kinds_of, meant
from jaxlm.config.option import split_list
from jaxlm.config.schema import FIELDS
from jaxlm.errors import UserError

MOST_USED = (  # listed first in their sections
    *("checkpoint_dir", "init_from", "batch_size", "gradient_accumulation_steps", "learning_rate", "num_epochs"),
    *("max_steps", "warmup_steps", "lr_scheduler", "eval_steps", "save_steps", "logging_steps", "report_to"),
    *("train_files", "validation_files", "dataset_name", "dataset_config", "max_length"),
)


class Parser(argparse.ArgumentParser):
    """argparse without abbreviations, whose errors are UserErrors that name the nearest known option."""

    def __init__(self, description: str, **more: Any) -> None:
        kind = argparse.RawDescriptionHelpFormatter
        super().__init__(description=description, allow_abbrev=False, formatter_class=kind, **more)
        self._negative_number_matcher = re.compile(r"-\d*\.?\d+(e[+-]?\d+)?$", re.IGNORECASE)  # -1e-3, too

    def parse_known_args(self, args=None, namespace=None):  # type: ignore[no-untyped-def]
        self._words = list(sys.argv[1:] if args is None else args)
        found, rest = super().parse_known_args(args, namespace)
        forgotten = [word for word in rest if word.partition("=")[0] in FIELDS and "=" in word]
        if forgotten:  # training.batch_size=4, without the dashes
            rest = [word for word in rest if word not in forgotten]
            found, more = super().parse_known_args([f"--{word}" for word in forgotten], found)
            rest += more
        for name, value in vars(found).items():
            if value in ([], [[]]):  # what Python before 3.13 makes of --name=--
                raise UserError(f"--{name} (--): is no value; --help lists all options")
        return found, rest

    def error(self, message: str) -> NoReturn:
        if "arguments are required" in message:  # perhaps because another was meant by an option that there is not
            names = self._option_string_actions
            unknown = [word for word in self._words if re.match("--.", word) and word.partition("=")[0] not in names]
            message = f"unrecognized arguments: {unknown[0]}" if unknown else message
        unrecognized = re.match(r"unrecognized arguments: (--?[^\s=]+|\S+)", message)
        if unrecognized and unrecognized[1].startswith("-"):
            known = [name for action in self._actions for name in action.option_strings if name != "--fresh"]
            raise UserError(f"{unrecognized[1]}: unknown option{meant(unrecognized[1], known)}; --help lists all")
        if unrecognized:
            is_file = "--data.train_files" in self._option_string_actions and glob.glob(unrecognized[1])
            message = (
                f"{unrecognized[1]}: belongs to no option; {'text is named by --data.train_files; ' * bool(is_file)}"
                "quote a pattern ('*.txt') or a text with blanks, put commas between the values of a list, name an "
                "option for each value"
            )
        elif message.endswith("expected one argument"):
            message += " (a value that begins with - is written --name=value)"
        raise UserError(f"{message}; --help lists all options")


def add_config_file(parser: Parser) -> None:
    """Adds --config FILE."""
    text = f"configuration, .py or .json, or a shipped one: {', '.join(shipped_configs())}; not needed with "
    action = parser.add_argument("--config", metavar="FILE", help=text + "--training.init_from, whose model is taken")
    set_completer(action, lambda prefix: [*shipped_configs(), *_paths(prefix, ".py", ".json", "/")])


def path(text: str) -> Path:
    """The type of an option that is a file or folder; shells leave a ~ behind "=" as it is."""
    if not text:
        raise argparse.ArgumentTypeError("is empty; name a file or a folder, or leave it out")
    return Path(os.path.expanduser(text))


def add_model_folder(parser: Parser) -> None:
    """Adds --model DIR."""
    text = "a run's folder (its best_model), best_model, final_model, a checkpoint; or what transformers opens"
    action = parser.add_argument("--model", required=True, metavar="DIR", help=text)
    set_completer(action, lambda prefix: _paths(prefix, "/"))


def set_completer(action: argparse.Action, complete: Callable[[str], Iterable[str]]) -> None:
    """Lets shells complete an option's value: `complete` gets what has been typed of it."""
    action.completer = lambda prefix, **_: list(complete(prefix))  # type: ignore[attr-defined]


def _paths(prefix: str, *endings: str) -> list[str]:
    return [path for ending in endings for path in glob.glob(f"{glob.escape(prefix)}*{ending}")]


def add_config_options(parser: Parser, sections: Sequence[str] = tuple(SECTIONS)) -> None:
    """Adds --SECTION.FIELD VALUE for every field of `sections`."""
    actions = [action for action in parser._actions if action.required or action.dest == "config"]
    required = [" ".join([*action.option_strings[:1], str(action.metavar)]) for action in actions]
    parser.usage = " ".join(["%(prog)s", *required, "[options]"])  # argparse would list every field
    for name in sections:
        group = parser.add_argument_group(f"{name} options")
        for field in sorted(dataclasses.fields(SECTIONS[name]), key=lambda field: field.name not in MOST_USED):
            add_field(group, f"{name}.{field.name}", field)


def add_field(group: argparse._ActionsContainer, name: str, field: dataclasses.Field[Any]) -> None:
    """Adds --NAME VALUE for a field made by `jaxlm.config.option.option`; what is not given is not in the namespace.

    Of one that takes several values it has a list, as each may have a --NAME of its own.
    """
    choices = field.metadata["choices"]
    shown_choices = f" [{'|'.join(choices)}]" if choices else ""
    text = f"{field.metadata['help']}{shown_choices} ({type_name(field.type)}; default: {shown(field.default)})"
    kinds = kinds_of(field.type)
    several = any(typing.get_origin(kind) is tuple for kind in kinds)
    about: dict[str, Any] = {"metavar": "VALUE", "default": argparse.SUPPRESS, "help": text.replace("%", "%%")}
    action = group.add_argument(f"--{name}", action="append" if several else "store", **about)
    if choices or not {str, tuple} & {typing.get_origin(kind) or kind for kind in kinds}:  # else it may be a path
        values = [*choices, *["true", "false"] * (bool in kinds), *["none"] * (type(None) in kinds)]
        set_completer(action, lambda _: values)


def overrides(arguments: argparse.Namespace) -> dict[str, Any]:
    """{"section.field": value} of the config options that were given, converted to their declared types."""
    found = dict[str, Any]()
    for name, given in vars(arguments).items():
        if name in FIELDS and isinstance(given, list):
            parts = [convert(name, text, FIELDS[name].type) for text in given]
            found[name] = parts[-1] if None in parts else sum(parts, ())
        elif name in FIELDS:
            found[name] = convert(name, given, FIELDS[name].type)
    return found


def convert(name: str, text: str, annotation: Any) -> Any:
    """`text` as a value of the declared type: true|false, none|null, a number, a string, a list (JSON or commas).

    Raises:
      UserError: it is none; names the option.
    """
    kinds = kinds_of(annotation)
    if type(None) in kinds and text.lower() in ("none", "null"):
        return None
    for kind in kinds:
        if typing.get_origin(kind) is tuple:
            return _convert_list(name, text)
        if kind is bool and text.lower() in ("true", "false"):
            return text.lower() == "true"
        if kind in (int, float):
            try:
                return kind(text)
            except ValueError:
                continue
        if kind is str:
            return text
    raise UserError(f"{name} ({excerpt(text)}) must be {type_name(annotation)}")


def _convert_list(name: str, text: str) -> tuple[str, ...]:
    if not text.lstrip().startswith("["):
        return tuple(split_list(text))
    try:
        values = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(f'{name} ({excerpt(text)}) is not a JSON list ({error}); write ["a", "b"] or a,b') from error
    if not all(isinstance(value, str) for value in values):
        raise UserError(f'{name} ({excerpt(text)}) holds something else than text; write ["a", "b"] or a,b')
    return tuple(values)


def config_from(arguments: argparse.Namespace) -> Config:
    """The file given by --config with the command line's overrides."""
    given = overrides(arguments)
    if arguments.config is None and "training.init_from" not in given:
        raise UserError("the following arguments are required: --config (such as --config small); --help lists all")
    return replace_fields(Config() if arguments.config is None else load_config(arguments.config), given)


def parse_size(option: str, text: str, low: int = 1, high: int = 2**50) -> int:
    """Bytes in "80GB" or "80G" (10^9), "79.6GiB" (2^30), "500MB" and so on from K to T, in any case.

    Raises:
      UserError: it is none of these, or not from `low` to `high`; names `option`.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?) ?([KMGT])(B|IB)?", text.strip().upper())
    if match is None:
        raise UserError(f"{option} ({text}) must be a number with a unit from K to T, such as 500MB, 80GB or 79.6GiB")
    size = float(match[1]) * (1024 if match[3] == "IB" else 1000) ** (" KMGT".index(match[2]))
    if not low <= size <= high:
        raise UserError(f"{option} ({text}) must be from {_show_size(low)} to {_show_size(high)}")
    return int(size)


def _show_size(size: int) -> str:
    """`size` in the largest binary unit that divides it, such as 4GiB."""
    power = max(power for power in range(5) if size % 1024**power == 0)
    return f"{size // 1024**power}{('B', 'KiB', 'MiB', 'GiB', 'TiB')[power]}"

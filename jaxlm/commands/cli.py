"""The command line: configuration files, overrides by type, exit codes."""

import argparse
import dataclasses
import json
import os
import re
import sys
import types
import typing
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any, NoReturn

from jaxlm.config import (
    SECTIONS,
    Config,
    excerpt,
    load_config,
    nearest,
    replace_fields,
    shipped_configs,
    shown,
    type_name,
)
from jaxlm.errors import RunFailed, Stopped, UserError, printable
from jaxlm.monitor.signals import StopRequest

EXIT_FAILED, EXIT_USER_ERROR, EXIT_STOPPED = 1, 2, 75
OUT_OF_MEMORY = (
    "the device's memory is full: set model.gradient_checkpointing true, or lower training.batch_size and raise "
    "training.gradient_accumulation_steps by as much; jaxlm estimate_memory says what fits"
)


class Parser(argparse.ArgumentParser):
    """argparse without abbreviations, whose errors are UserErrors that name the nearest known option."""

    def __init__(self, description: str, prog: str | None = None, **more: Any) -> None:
        super().__init__(
            description=description,
            prog=prog,
            allow_abbrev=False,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            **more,
        )

    def parse_known_args(self, args=None, namespace=None):  # type: ignore[no-untyped-def]
        found, rest = super().parse_known_args(args, namespace)
        for name, value in vars(found).items():
            if value == []:  # what Python before 3.13 makes of --name=--
                raise UserError(f"--{name} (--): is no value; --help lists all options")
        return found, rest

    def error(self, message: str) -> NoReturn:
        known = [name for action in self._actions for name in action.option_strings]
        unknown = re.match(r"unrecognized arguments: (--?[^\s=]+)", message)
        if unknown:
            raise UserError(f"{unknown[1]}: unknown option{nearest(unknown[1], known)}; --help lists all")
        stray = re.match(r"unrecognized arguments: (\S+)", message)
        if stray:
            raise UserError(
                f"{stray[1]}: belongs to no option; quote a pattern ('*.txt') or a text with blanks, name an option "
                "for each value; --help lists all options"
            )
        if message.endswith("expected one argument"):
            message += " (a value that begins with - is written --name=value)"
        raise UserError(f"{message}; --help lists all options")


def add_config_file(parser: Parser) -> None:
    """Adds --config FILE."""
    names = ", ".join(shipped_configs())
    action = parser.add_argument(
        "--config", required=True, metavar="FILE", help=f"configuration, .py or .json, or one that comes along: {names}"
    )
    action.completer = _complete_config  # type: ignore[attr-defined]


def add_model_folder(parser: Parser) -> None:
    """Adds --model DIR."""
    action = parser.add_argument(
        "--model", required=True, metavar="DIR", help="best_model, final_model or a checkpoint"
    )
    action.completer = _complete_folder  # type: ignore[attr-defined]


def add_config_options(parser: Parser, sections: Sequence[str] = tuple(SECTIONS)) -> None:
    """Adds --SECTION.FIELD VALUE for every field of `sections`."""
    required = [f"{action.option_strings[0]} {action.metavar}" for action in parser._actions if action.required]
    parser.usage = " ".join(["%(prog)s", *required, "[options]"])  # argparse would list every field
    for name in sections:
        group = parser.add_argument_group(f"{name} options")
        hints = typing.get_type_hints(SECTIONS[name])
        for field in dataclasses.fields(SECTIONS[name]):
            choices = f" [{'|'.join(field.metadata['choices'])}]" if field.metadata["choices"] else ""
            default = shown(field.default)
            action = group.add_argument(
                f"--{name}.{field.name}",
                metavar="VALUE",
                default=argparse.SUPPRESS,
                help=f"{field.metadata['help']}{choices} ({type_name(hints[field.name])}; default: {default})".replace(
                    "%", "%%"
                ),
            )
            values = _values(field.metadata["choices"], hints[field.name])
            if values is not None:
                offer(action, values)


def offer(action: argparse.Action, values: Iterable[str]) -> None:
    """Names the values that a shell offers for an option."""
    action.completer = partial(_complete_value, list(values))  # type: ignore[attr-defined]


def _values(choices: Sequence[str], annotation: Any) -> list[str] | None:
    """What a shell may offer for a field; None where it takes any text, such as a path."""
    kinds = typing.get_args(annotation) if isinstance(annotation, types.UnionType) else (annotation,)
    if not choices and (str in kinds or any(typing.get_origin(kind) is tuple for kind in kinds)):
        return None
    return [*choices, *["true", "false"] * (bool in kinds), *["none"] * (type(None) in kinds)]


def _complete_value(values: list[str], **_: Any) -> list[str]:
    return values


def _complete_folder(prefix: str, **_: Any) -> list[str]:
    from argcomplete.completers import DirectoriesCompleter

    return list(DirectoriesCompleter()(prefix))


def _complete_config(prefix: str, **_: Any) -> list[str]:
    from argcomplete.completers import FilesCompleter

    return [*shipped_configs(), *FilesCompleter(("py", "json"))(prefix)]


def overrides(arguments: argparse.Namespace) -> dict[str, Any]:
    """{"section.field": value} of the config options that were given, converted to their declared types."""
    given = {name: text for name, text in vars(arguments).items() if name.partition(".")[0] in SECTIONS and "." in name}
    hints = {name: typing.get_type_hints(section) for name, section in SECTIONS.items()}
    return {
        dotted: convert(dotted, text, hints[dotted.partition(".")[0]][dotted.partition(".")[2]])
        for dotted, text in given.items()
    }


def convert(dotted: str, text: str, annotation: Any) -> Any:
    """`text` as a value of the declared type: true|false, none|null, a number, a string, a list (JSON or commas).

    Raises:
      UserError: it is none.
    """
    kinds = typing.get_args(annotation) if isinstance(annotation, types.UnionType) else (annotation,)
    if type(None) in kinds and text.lower() in ("none", "null"):
        return None
    for kind in kinds:
        if typing.get_origin(kind) is tuple:
            return _convert_list(dotted, text)
        if kind is bool and text.lower() in ("true", "false"):
            return text.lower() == "true"
        if kind in (int, float):
            try:
                return kind(text)
            except ValueError:
                continue
        if kind is str:
            return text
    raise UserError(f"{dotted} ({excerpt(text)}) must be {type_name(annotation)}")


def _convert_list(dotted: str, text: str) -> tuple[str, ...]:
    if not text.lstrip().startswith("["):
        return tuple(part.strip() for part in text.split(",") if part.strip())
    try:
        values = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(f'{dotted} ({excerpt(text)}) is not a JSON list ({error}); write ["a", "b"] or a,b') from error
    if not all(isinstance(value, str) for value in values):
        raise UserError(f'{dotted} ({excerpt(text)}) holds something else than text; write ["a", "b"] or a,b')
    return tuple(values)


def config_from(arguments: argparse.Namespace) -> Config:
    """The file given by --config with the command line's overrides."""
    return replace_fields(load_config(arguments.config), overrides(arguments))


def main(command: Callable[[], None]) -> NoReturn:
    """Runs `command` and ends the process: 0 done, 1 failed, 2 the user can mend it, 75 stopped; 1 and a traceback."""
    sys.excepthook = _on_bug
    try:
        with StopRequest(at_once=True):
            try:
                command()
            finally:
                sys.stdout.flush()  # here, where a reader that went away can still be dealt with
    except UserError as error:
        _end(f"error: {printable(error)}", EXIT_USER_ERROR)
    except RunFailed as error:
        _end(f"failed: {printable(error)}", EXIT_FAILED)
    except Stopped as stopped:
        print(f"stopped: {printable(stopped)}", file=sys.stderr)
        sys.exit(EXIT_STOPPED)
    except RuntimeError as error:
        if not _is_out_of_memory(error):
            raise
        _end(f"failed: {OUT_OF_MEMORY} ({printable(error)})", EXIT_FAILED)
    except BrokenPipeError:  # the reader of what we print went away, as with `| head`: nobody to tell, so end quietly
        nowhere = os.open(os.devnull, os.O_WRONLY)
        for stream in (sys.stdout, sys.stderr):
            os.dup2(nowhere, stream.fileno())
        sys.exit(1)
    sys.exit(0)


def _is_out_of_memory(error: RuntimeError) -> bool:
    """Whether JAX says that a device's memory is full; asked without importing JAX."""
    jax = sys.modules.get("jax")
    return jax is not None and isinstance(error, jax.errors.JaxRuntimeError) and "RESOURCE_EXHAUSTED" in str(error)


def _one_of_several() -> bool:
    """Whether this process has joined others; asked without importing JAX."""
    jax = sys.modules.get("jax")
    return jax is not None and jax.distributed.is_initialized() and jax.process_count() > 1


def _on_bug(*error: Any) -> None:
    sys.__excepthook__(*error)
    if _one_of_several():
        _end("failed: by the error above, or because another process ended; the same command goes on", EXIT_FAILED)


def _end(message: str, code: int) -> NoReturn:
    """Ends the process with an error. One of several ends at once: the others, who would wait for it, then end too."""
    print(message, file=sys.stderr, flush=True)
    if _one_of_several():
        os._exit(code)
    sys.exit(code)

"""Configuration files: a Python module that defines `config`, JSON, or one that comes along, by its name."""

import json
import os
import runpy
import traceback
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from types import TracebackType

from jaxlm.config.fields import from_dict, nearest
from jaxlm.config.schema import Config
from jaxlm.errors import UserError, printable

PACKAGE = Path(__file__).parents[1]


def shipped_configs() -> dict[str, Path]:
    """{name: file} of the configurations that come with the program: its own, or those of the checkout."""
    folder = next(parent for parent in (PACKAGE, PACKAGE.parent) if (parent / "configs").is_dir()) / "configs"
    return {file.stem: file for file in sorted(folder.glob("*.py"))}


def load_config(path: str) -> Config:
    """The configuration in a Python file (a module that defines `config`) or a JSON file, or a shipped one by its name.

    Raises:
      UserError: missing, unreadable, not valid, or without a configuration.
    """
    shipped = shipped_configs()
    if path in shipped and not os.path.lexists(path):
        path = str(shipped[path])
    file = Path(path)
    if not os.path.isfile(file):  # Path's own would raise where a name is too long, or a folder is closed to us
        reason = "is a folder" if os.path.isdir(file) else "no such file"
        raise UserError(
            f"--config ({path}): {reason}{nearest(path, shipped)}; name a .py or .json file, or one that comes along: "
            f"{', '.join(shipped)}"
        )
    if file.suffix == ".json":
        try:
            return from_dict(json.loads(file.read_text(encoding="utf-8")), f"--config ({path})")
        except (ValueError, RecursionError, OSError) as error:
            raise UserError(f"--config ({path}): not readable as JSON: {error}") from error
    if file.suffix != ".py":
        raise UserError(f"--config ({path}): must end in .py or .json")
    with ExitStack() as user_code:
        user_code.push(partial(_raise_user_error, path))
        found = runpy.run_path(path)
    if not isinstance(found.get("config"), Config):
        raise UserError(f"--config ({path}): must define `config = Config(...)` (from jaxlm.config import Config)")
    return found["config"]


def _raise_user_error(
    path: str, _: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
) -> None:
    """At the end of a context: one line for whatever the user's code in `path` raised, except for signals."""
    if isinstance(error, Exception | SystemExit):
        lines = [frame.lineno for frame in traceback.extract_tb(trace) if frame.filename == path]
        line = lines[-1] if lines else getattr(error, "lineno", None)  # the code of a SyntaxError never ran
        where = f"--config ({path})" + (f": line {line}" if line else "")
        raise UserError(f"{where}: {type(error).__name__}: {printable(error)}") from error

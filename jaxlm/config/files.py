"""Configuration files: a Python module that defines `config`, JSON, or one that comes with jaxlm, by its name."""

import json
import os
import re
import runpy
import sys
import traceback
from pathlib import Path

from jaxlm.config.fields import from_dict, meant, nearest
from jaxlm.config.schema import FIELDS, Config
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
    shipped, where = shipped_configs(), f"--config ({path})"
    file = shipped[path] if path in shipped and not os.path.lexists(path) else Path(path)
    if not os.path.isfile(file):  # Path's own would raise where a name is too long, or a folder is closed to us
        reason = "is a folder" if os.path.isdir(file) else "no such file"
        names = f"name a .py or .json file, or one that comes with jaxlm: {', '.join(shipped)}"
        raise UserError(f"{where}: {reason}{nearest(path, shipped)}; {names}")
    # For modules of the user's own, as in training.report_to; at the end, so that they hide none.
    sys.path += [folder for folder in (os.getcwd(), str(file.resolve().parent)) if folder not in sys.path]
    if file.suffix == ".json":
        try:
            return from_dict(json.loads(file.read_text(encoding="utf-8")), where)
        except (ValueError, RecursionError, OSError) as error:
            raise UserError(f"{where}: not readable as JSON: {error}") from error
    if file.suffix != ".py":
        raise UserError(f"{where}: must end in .py or .json")
    try:
        found = runpy.run_path(str(file))
    except SyntaxError as error:
        raise UserError(f"{where}: line {error.lineno}: {error.msg}") from error
    except (Exception, SystemExit) as error:  # whatever the user's own code raises is a mistake in their file
        unknown = re.search(r"^(\w+)Config\.__init__\(\) got an unexpected keyword argument '(\w+)'$", str(error))
        hint = "" if unknown is None else meant(f"{unknown[1].lower()}.{unknown[2]}", FIELDS)
        lines = [f": line {at.lineno}" for at in traceback.extract_tb(error.__traceback__) if at.filename == str(file)]
        raise UserError(f"{where}{''.join(lines[-1:])}: {type(error).__name__}: {printable(error)}{hint}") from error
    if not isinstance(found.get("config"), Config):
        raise UserError(f"{where}: must define `config = Config(...)` (from jaxlm.config import Config)")
    return found["config"]

#!/usr/bin/env bash
# OmegaConf makes texts numbers and then texts again: in a field of type str, 007 is 7 and the commit 12e4567 is inf.
#
# omegaconf 2.4.0. In a structured config the field run is a str, and one would take run=007 on the command line to be
# the text "007": the documentation says that values are checked against the type and converted to it. But the text is
# read as YAML before the type is looked at, and what has become a number, or a truth value, is then made a text again.
# "1e3" is "1000.0", "3.10" is "3.1", "1_000" is "1000", "0x1F" is "31", and "no", of the language Norwegian, is
# "False". Names of runs, versions, short commit ids and languages are other ones after that, with no error, as the
# result is a text; two runs write to one folder. It is the same in from_cli, from_dotlist and YAML files. An int field
# refuses 1e3, so that the type seems to be looked at.
# Right: set texts as such, config.run = "007", or with quotes that reach OmegaConf, 'run="007"'; and compare what came
# out. In the library: omegaconf/omegaconf.py, from_dotlist (each value is read as YAML), and omegaconf/nodes.py,
# StringNode (str(value)).
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q omegaconf==2.4.0
cat >"$folder/show.py" <<'PYTHON'
from dataclasses import dataclass

from omegaconf import OmegaConf
from omegaconf.errors import ValidationError


@dataclass
class Config:
    run: str = "first"
    steps: int = 1


def read(text: str) -> object:
    return OmegaConf.merge(OmegaConf.structured(Config), OmegaConf.from_dotlist([text]))


for text in ("007", "3.10", "1e3", "12e4567", "1_000", "0x1F", "no", "abc", "'007'"):
    file = OmegaConf.merge(OmegaConf.structured(Config), OmegaConf.create(f"run: {text}"))
    print(f"{text}: {read(f'run={text}').run}, from YAML {file.run}")
config = OmegaConf.structured(Config)
config.run = "007"
print(f"assigned: {config.run}, from_cli: {OmegaConf.merge(config, OmegaConf.from_cli(['run=1e3'])).run}")
try:
    print(f"steps=1e3: {read('steps=1e3').steps}")
except ValidationError:
    print("steps=1e3: ValidationError")
PYTHON
found=$("$folder/venv/bin/python" "$folder/show.py" 2>"$folder/stderr")
echo "$found"
[[ $found == "007: 7, from YAML 7
3.10: 3.1, from YAML 3.1
1e3: 1000.0, from YAML 1000.0
12e4567: inf, from YAML inf
1_000: 1000, from YAML 1000
0x1F: 31, from YAML 31
no: False, from YAML False
abc: abc, from YAML abc
'007': 007, from YAML 007
assigned: 007, from_cli: 1000.0
steps=1e3: ValidationError" ]] || {
  echo "this has changed"
  exit 1
}

#!/usr/bin/env bash
# datasets gives each tool call the arguments of all other tools, as null, if the rows are from a list or a Parquet file.
#
# datasets 5.2.0 with pyarrow 26.0.1. Two conversations, each with a call of another tool. One would take a row to come back
# as it was put in, whichever way. But objects at one place of a table have one set of keys: Dataset.from_list, and a Parquet
# file that is written from it, give the call of weather(city) the argument of add(x) beside its own, as null (and each tool's
# schema the other's properties). A chat template writes them out, so a model that is trained on that writes null arguments
# into its calls. from_generator and load_dataset("json") of the same rows have them as they are: these make a column of the
# type Json of objects that differ. Right: one of the two, or arguments and tools as strings of JSON.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q datasets==5.2.0 pyarrow==26.0.1 jinja2==3.1.6
cat >"$folder/calls.py" <<'PYTHON'
import json
import sys
from pathlib import Path

import datasets
from datasets import Dataset
from jinja2 import Template

folder = Path(sys.argv[1])
datasets.disable_progress_bars()
template = Template("{% for m in messages %}{{ m.tool_calls[0].function.arguments | tojson }}{% endfor %}")  # of a chat


def conversation(tool: str, arguments: dict) -> dict:
    call = {"type": "function", "function": {"name": tool, "arguments": arguments}}
    return {"messages": [{"role": "assistant", "content": "", "tool_calls": [call]}]}


ROWS = [conversation("weather", {"city": "Bern"}), conversation("add", {"x": 1})]
path = folder / "rows.jsonl"
path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
cache = {"cache_dir": folder / "cache"}
made = {"from_list": Dataset.from_list(ROWS)}
made["from_generator"] = Dataset.from_generator(lambda: iter(ROWS), **cache)
made["from_list"].to_parquet(folder / "rows.parquet")
made["parquet"] = Dataset.from_parquet(str(folder / "rows.parquet"), **cache)
made["load_dataset"] = datasets.load_dataset("json", data_files=str(path), split="train", **cache)
for name, rows in made.items():
    print(f"{name}: {template.render(messages=rows[0]['messages'])}")
PYTHON
found=$(HF_HOME="$folder/home" "$folder/venv/bin/python" "$folder/calls.py" "$folder" 2>"$folder/stderr")
echo "$found"
[[ $found == 'from_list: {"city": "Bern", "x": null}
from_generator: {"city": "Bern"}
parquet: {"city": "Bern", "x": null}
load_dataset: {"city": "Bern"}' ]] || {
  echo "this has changed"
  exit 1
}

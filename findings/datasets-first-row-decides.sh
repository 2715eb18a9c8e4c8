#!/usr/bin/env bash
# datasets leaves out fields that the first row does not have: from_list, from_generator, and what map's function adds.
#
# datasets 5.2.0 with pyarrow 26.0.1. Rows of a conversation may have "tools" or "system" and may not. One would take
# Dataset.from_list for a table with a column for every key of any row, as pandas makes it, or for an error. It takes the keys
# of the first row: if that has no tools, no row has, without a word. from_generator does the same, and so does map with what
# its function returns: if the first row gets no label, none does (the other way round it is a KeyError). A key that comes
# first thousands of rows later is left out, too. IterableDataset.from_generator has everything, and load_dataset("json") of
# the same rows as well. Right: features= for from_generator, or rows that all have the same keys, None where there is
# nothing.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q datasets==5.2.0 pyarrow==26.0.1
cat >"$folder/rows.py" <<'PYTHON'
import json
import sys
from pathlib import Path

import datasets
from datasets import Dataset, Features, IterableDataset, Value

folder = Path(sys.argv[1])
datasets.disable_progress_bars()
ROWS = [{"text": "a"}, {"text": "b", "tools": "t"}]
MANY = [{"text": "a"}] * 2500 + [{"text": "b", "tools": "t"}]
(folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in MANY))


def generate(rows: list):
    yield from rows


def label(row: dict) -> dict:
    return {"label": 1} if row["text"] == "b" else {}


def columns(name: str, rows: Dataset) -> None:
    print(f"{name}: {', '.join(rows.column_names)}")


cache = {"cache_dir": folder / "cache"}
columns("from_list", Dataset.from_list(ROWS))
columns("from_generator", Dataset.from_generator(generate, gen_kwargs={"rows": ROWS}, **cache))
columns("from_generator, many rows", Dataset.from_generator(generate, gen_kwargs={"rows": MANY}, **cache))
columns("map", Dataset.from_dict({"text": ["a", "b"]}).map(label))
streamed = IterableDataset.from_generator(generate, gen_kwargs={"rows": ROWS})
print(f"streamed: {', '.join(list(streamed)[-1])}")
columns("load_dataset", datasets.load_dataset("json", data_files=str(folder / "rows.jsonl"), split="train", **cache))
features = Features({"text": Value("string"), "tools": Value("string")})
given = Dataset.from_generator(generate, gen_kwargs={"rows": ROWS}, features=features, **cache)
print(f"from_generator with features: {given['tools'][:]}")
full = Dataset.from_list([{"tools": None} | row for row in ROWS])
print(f"from_list of full rows: {full['tools'][:]}")
PYTHON
found=$(HF_HOME="$folder/home" "$folder/venv/bin/python" "$folder/rows.py" "$folder" 2>"$folder/stderr")
echo "$found"
[[ $found == "from_list: text
from_generator: text
from_generator, many rows: text
map: text
streamed: text, tools
load_dataset: text, tools
from_generator with features: [None, 't']
from_list of full rows: [None, 't']" ]] || {
  echo "this has changed"
  exit 1
}

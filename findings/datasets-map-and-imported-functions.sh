#!/usr/bin/env bash
# datasets' map returns the rows of the old code after a change of the function that it calls, if that is imported.
#
# datasets 5.2.0 with pyarrow 26.0.1. map keeps its result in a file under a hash of the function; a change of the
# function's text, of what it closes over or of a function beside it in the program makes another hash. One would take that
# to hold for whatever the function calls. But what is imported from a module of one's own (clean.py beside train.py) goes
# into the hash by its name alone: after a correction in clean.py a new process gets the rows of the uncorrected one from
# the cache, and there is no word of it. So a fix of the data has no effect, and the next run is compared with its like. It
# is the same for filter and from_generator. Right: the module's text as an entry of fn_kwargs, which goes into the hash, or
# load_from_cache_file=False.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q datasets==5.2.0 pyarrow==26.0.1
cat >"$folder/train.py" <<'PYTHON'
import sys
from pathlib import Path

import datasets
from clean import clean, keep

datasets.disable_progress_bars()
rows = datasets.load_dataset("json", data_files=sys.argv[1], split="train", cache_dir=sys.argv[2])
generated = datasets.Dataset.from_generator(lambda: ({"text": clean(x)} for x in ["One  ", "Two"]), cache_dir=sys.argv[2])
text = {"module": (Path(__file__).parent / "clean.py").read_text()}
print("map:", rows.map(lambda row: {"text": clean(row["text"])})["text"][:])
print("filter:", rows.filter(lambda row: keep(row["text"]))["text"][:])
print("from_generator:", generated["text"][:])
mapped = rows.map(lambda row, module: {"text": clean(row["text"])}, fn_kwargs=text)
print("map with the module's text in fn_kwargs:", mapped["text"][:])
PYTHON
printf '{"text": "One  "}\n{"text": "Two"}\n' >"$folder/rows.jsonl"
train() {
  HF_HOME="$folder/home" "$folder/venv/bin/python" -B "$folder/train.py" "$folder/rows.jsonl" "$folder/cache" 2>"$folder/stderr"
}
printf 'def clean(text):\n    return text.lower()\n\n\ndef keep(text):\n    return True\n' >"$folder/clean.py"
first=$(train)
printf 'def clean(text):\n    return text.strip()\n\n\ndef keep(text):\n    return text == "Two"\n' >"$folder/clean.py"
found="as written first:
$first
after the change of clean.py:
$(train)"
echo "$found"
[[ $found == "as written first:
map: ['one  ', 'two']
filter: ['One  ', 'Two']
from_generator: ['one  ', 'two']
map with the module's text in fn_kwargs: ['one  ', 'two']
after the change of clean.py:
map: ['one  ', 'two']
filter: ['One  ', 'Two']
from_generator: ['one  ', 'two']
map with the module's text in fn_kwargs: ['One', 'Two']" ]] || {
  echo "this has changed"
  exit 1
}

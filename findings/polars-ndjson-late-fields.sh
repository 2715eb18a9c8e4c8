#!/usr/bin/env bash
# polars reads JSON lines without what the first hundred of them lack: whole fields, and the texts in lists.
#
# polars 2.1.0. read_ndjson and scan_ndjson guess the columns from the first 100 lines (infer_schema_length). One would take
# what comes later and doesn't fit for an error: a number with a fraction behind whole numbers is one, and so is a text behind
# nulls. But a key that comes first in line 101 is left out, in an object within a row just so, and if a list was empty so
# far, it is one of nulls: ["search"] is read as [None]. Nothing says so, and written again the file has lost it; lists of
# tools or of tags are often empty for long. Right: infer_schema_length=None, which reads all lines first, or a schema.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q polars==2.1.0
cat >"$folder/read.py" <<'PYTHON'
import json
import sys
from pathlib import Path

import polars

ROWS = {
    "a late key": ({"text": "a"}, {"text": "b", "score": 0.5}),
    "a late key within": ({"meta": {"id": 1}}, {"meta": {"id": 2, "lang": "de"}}),
    "an empty list": ({"tools": []}, {"tools": ["search"]}),
    "a null": ({"text": None}, {"text": "b"}),
    "a fraction": ({"score": 1}, {"score": 0.5}),
}
path = Path(sys.argv[1]) / "rows.jsonl"
for name, (first, last) in ROWS.items():
    path.write_text((json.dumps(first) + "\n") * 100 + json.dumps(last) + "\n")
    for length in (100, None):
        read = []
        for function in (polars.read_ndjson, lambda *a, **k: polars.scan_ndjson(*a, **k).collect()):
            try:
                read.append(json.dumps(function(path, infer_schema_length=length).row(-1, named=True)))
            except polars.exceptions.PolarsError as error:
                read.append(type(error).__name__)
        assert read[0] == read[1]
        print(f"{name}, {length or 'all'} lines: {read[0]}")
PYTHON
found=$("$folder/venv/bin/python" "$folder/read.py" "$folder" 2>"$folder/stderr")
echo "$found"
[[ $found == 'a late key, 100 lines: {"text": "b"}
a late key, all lines: {"text": "b", "score": 0.5}
a late key within, 100 lines: {"meta": {"id": 2}}
a late key within, all lines: {"meta": {"id": 2, "lang": "de"}}
an empty list, 100 lines: {"tools": [null]}
an empty list, all lines: {"tools": ["search"]}
a null, 100 lines: ComputeError
a null, all lines: {"text": "b"}
a fraction, 100 lines: ComputeError
a fraction, all lines: {"score": 0.5}' ]] || {
  echo "this has changed"
  exit 1
}

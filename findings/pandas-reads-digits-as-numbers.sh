#!/usr/bin/env bash
# pandas reads strings in JSON lines as numbers if all of a column are digits: "007" is 7, and "3.10" is 3.1.
#
# pandas 3.1.1. JSON says which values are strings, so one would take read_json(lines=True) to keep them, unlike read_csv,
# which has to guess. It guesses, too: a column whose strings all read as numbers becomes one of numbers. Zeros in front and
# at the end are gone, "1e5" is 100000.0, and long ids are rounded to 17 digits. Answers of arithmetic sets, options,
# versions and document ids look like that. One other string in the column and all stay strings, so that the next shard or
# chunk (chunksize=) of a file may have other types, and a comparison with "3.10" or a join finds nothing. Columns named
# "..._at" or "date" become times. Right: dtype=False, which keeps all strings, or json.loads.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q pandas==3.1.1 numpy==2.4.6
cat >"$folder/read.py" <<'PYTHON'
import json
import sys
from pathlib import Path

import pandas

COLUMNS = {
    "code": ["007", "010"],
    "version": ["3.9", "3.10"],
    "answer": ["1e5", "12"],
    "id": ["12345678901234567890123", "1"],
    "option": ["1", "A"],
    "seen_at": ["2024-01-05"],
}
path = Path(sys.argv[1]) / "rows.jsonl"
for name, values in COLUMNS.items():
    path.write_text("".join(json.dumps({name: value}) + "\n" for value in values))
    usual = pandas.read_json(path, lines=True)[name]
    exact = pandas.read_json(path, lines=True, dtype=False)[name].tolist() == values
    print(f"{name}: {values} is {usual.astype(object).tolist()}, with dtype=False exact {exact}")
chunks = [["1.50", "2"], ["3", "x"]]
path.write_text("".join(json.dumps({"answer": value}) + "\n" for chunk in chunks for value in chunk))
print("in chunks:", [chunk["answer"].tolist() for chunk in pandas.read_json(path, lines=True, chunksize=2)])
PYTHON
found=$("$folder/venv/bin/python" "$folder/read.py" "$folder" 2>"$folder/stderr")
echo "$found"
[[ $found == "code: ['007', '010'] is [7, 10], with dtype=False exact True
version: ['3.9', '3.10'] is [3.9, 3.1], with dtype=False exact True
answer: ['1e5', '12'] is [100000.0, 12.0], with dtype=False exact True
id: ['12345678901234567890123', '1'] is [1.2345678901234568e+22, 1.0], with dtype=False exact True
option: ['1', 'A'] is ['1', 'A'], with dtype=False exact True
seen_at: ['2024-01-05'] is [Timestamp('2024-01-05 00:00:00')], with dtype=False exact True
in chunks: [[1.5, 2.0], ['3', 'x']]" ]] || {
  echo "this has changed"
  exit 1
}

#!/usr/bin/env bash
# duckdb reads 2.7 as 3 if the first 20,480 lines of a JSON or CSV file have whole numbers, and as null if they have nulls.
#
# duckdb 2.0.1. The columns of a file are guessed from its first 20,480 rows (sample_size). One would take what comes later
# and doesn't fit for an error that names the line, as a text behind whole numbers is one, or a new key. A number with a
# fraction does fit: it is rounded to a whole one, 0.4 to 0, in lists and objects as well, and in CSV. Behind nulls alone
# every value is null. Behind empty lists texts come with quotes about them. There is no warning, and sums look plausible;
# scores that are 0 or 1 for long are such a column, or a field that only the second source of a mixture fills. Written
# again, the file has lost them. Right: sample_size=-1, which reads all of the file first, or the columns' types by name.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q duckdb==2.0.1
cat >"$folder/read.py" <<'PYTHON'
import json
import sys
from pathlib import Path

import duckdb

folder = Path(sys.argv[1])
LATE = {"a number": (1, 2.7), "a probability": (0, 0.4), "in a list": ([1], [2.5]), "in an object": ({"p": 1}, {"p": 2.5})}
LATE |= {"behind nulls": (None, 2.7), "behind empty lists": ([], ["x"]), "a text": (1, "x y")}
path = folder / "rows.jsonl"
for name, (first, last) in LATE.items():
    path.write_text((json.dumps({"x": first}) + "\n") * 21_000 + json.dumps({"x": last}) + "\n")
    read = []
    for options in ("", ", sample_size=-1"):
        try:
            rows = duckdb.sql(f"select x from read_json('{path}'{options})").fetchall()
            read.append(json.dumps(rows[-1][0]))
        except duckdb.Error as error:
            read.append(type(error).__name__)
    print(f"{name}: {json.dumps(last)} is {read[0]}, with sample_size=-1 {read[1]}")
path = folder / "rows.csv"
path.write_text("x\n" + "1\n" * 21_000 + "2.7\n")
print("in CSV: 2.7 is", duckdb.sql(f"select x from '{path}'").fetchall()[-1][0])
PYTHON
found=$("$folder/venv/bin/python" "$folder/read.py" "$folder" 2>"$folder/stderr")
echo "$found"
[[ $found == 'a number: 2.7 is 3, with sample_size=-1 2.7
a probability: 0.4 is 0, with sample_size=-1 0.4
in a list: [2.5] is [2], with sample_size=-1 [2.5]
in an object: {"p": 2.5} is {"p": 2}, with sample_size=-1 {"p": 2.5}
behind nulls: 2.7 is null, with sample_size=-1 2.7
behind empty lists: ["x"] is ["\"x\""], with sample_size=-1 ["x"]
a text: "x y" is InvalidInputException, with sample_size=-1 "\"x y\""
in CSV: 2.7 is 3' ]] || {
  echo "this has changed"
  exit 1
}

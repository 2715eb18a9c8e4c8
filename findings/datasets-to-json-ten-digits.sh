#!/usr/bin/env bash
# datasets' to_json writes ten digits behind the point: small numbers lose their digits or become 0, and NaN becomes null.
#
# datasets 5.2.0 with pandas 3.1.1 and pyarrow 26.0.1. One would take Dataset.to_json for JSON as json.dumps writes it,
# where a number that is read again is the same number. It goes through pandas' to_json with its ten decimals: 1/3 keeps ten
# digits, a probability of 1.23456789e-7 keeps four, and 3.14e-11 is 0.0 (yet 2.5e-20 is right, as the smallest are written
# with an exponent). Probabilities of a teacher, weights of rows and embeddings are written like that, and a 0.0 later goes
# into a log or a division. NaN and inf are both null and come back as None. Right: Parquet, which is exact, or json.dumps
# row by row; to_json(..., double_precision=15), the most there is, still counts decimals, not digits.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q datasets==5.2.0 pyarrow==26.0.1 pandas==3.1.1
cat >"$folder/write.py" <<'PYTHON'
import json
import math
import sys
from pathlib import Path

import datasets
from datasets import Dataset

datasets.disable_progress_bars()
path = Path(sys.argv[1]) / "rows.jsonl"
PUT = [1 / 3, 1.23456789e-7, 3.14e-11, 2.5e-20, math.nan, math.inf]
rows = Dataset.from_dict({"p": PUT})
for options in ({}, {"double_precision": 15}):
    rows.to_json(path, **options)
    print(options, [json.loads(line)["p"] for line in path.read_text().splitlines()])
rows.to_parquet(path.with_suffix(".parquet"))
back = Dataset.from_parquet(str(path.with_suffix(".parquet")), cache_dir=sys.argv[1])["p"][:]
print("Parquet is exact:", str(back) == str(PUT))
PYTHON
found=$(HF_HOME="$folder/home" "$folder/venv/bin/python" "$folder/write.py" "$folder" 2>"$folder/stderr")
echo "$found"
[[ $found == "{} [0.3333333333, 1.235e-07, 0.0, 2.5e-20, None, None]
{'double_precision': 15} [0.333333333333333, 1.23456789e-07, 3.14e-11, 2.5e-20, None, None]
Parquet is exact: True" ]] || {
  echo "this has changed"
  exit 1
}

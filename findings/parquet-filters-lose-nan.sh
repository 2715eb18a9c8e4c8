#!/usr/bin/env bash
# A filter on a Parquet file leaves out rows with NaN that the same filter finds in memory, in pyarrow, datasets and duckdb.
#
# pyarrow 26.0.1, datasets 5.2.0, duckdb 2.0.1 and polars 2.1.0. To find rows whose loss isn't under 5, or isn't a filler of
# -1, one filters by not (loss < 5) or loss != -1. A NaN is such a row, and in a table in memory it is found. One would take
# a filter for the same rows wherever the table lies. But of a file each group of rows is judged by its least and greatest
# number first, and NaN doesn't count for these: a group whose numbers are all under 5 is left out as a whole, with its NaN.
# Whether a NaN is found depends on the other numbers of its group, so on the row_group_size of whoever wrote the file. The
# check that should find a diverged run finds nothing, and so does the filter for the rest. polars finds them all. "or
# is_nan(loss)" mends one file below and not the other. Right: read the column, and filter in memory.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q pyarrow==26.0.1 datasets==5.2.0 duckdb==2.0.1 polars==2.1.0
cat >"$folder/filters.py" <<'PYTHON'
import sys
from pathlib import Path

import datasets
import duckdb
import polars
import pyarrow
import pyarrow.compute as pc
import pyarrow.parquet

folder = Path(sys.argv[1])
path = str(folder / "rows.parquet")
datasets.disable_progress_bars()
loss = pc.field("loss")
nan = float("nan")
GROUPS = {"1.0, NaN, 2.0": ([1.0, nan, 2.0], 3), "1.0, NaN, 7.0": ([1.0, nan, 7.0], 3), "1.0, NaN | 7.0": ([1.0, nan, 7.0], 2)}
for name, (numbers, size) in GROUPS.items():
    rows = pyarrow.table({"row": range(3), "loss": numbers})
    pyarrow.parquet.write_table(rows, path, row_group_size=size)
    print(f"groups {name}:")
    print("  a table in memory:", rows.filter(~(loss < 5))["row"].to_pylist())
    print("  pyarrow:", pyarrow.parquet.read_table(path, filters=~(loss < 5))["row"].to_pylist())
    found = pyarrow.parquet.read_table(path, filters=~(loss < 5) | loss.is_nan())
    print("  pyarrow, or is_nan:", found["row"].to_pylist())
    streamed = datasets.load_dataset("parquet", data_files=path, filters=~(loss < 5), split="train", streaming=True)
    print("  datasets:", [row["row"] for row in streamed])
    for source in ("rows", f"'{path}'"):
        found = duckdb.sql(f"select row from {source} where not (loss < 5)").fetchall()
        print(f"  duckdb, {'in memory' if source == 'rows' else 'file'}:", [row for (row,) in found])
    found = polars.scan_parquet(path).filter(~(polars.col("loss") < 5)).collect()
    print("  polars:", found["row"].to_list())
PYTHON
found=$(HF_HOME="$folder/home" "$folder/venv/bin/python" "$folder/filters.py" "$folder" 2>"$folder/stderr")
echo "$found"
[[ $found == "groups 1.0, NaN, 2.0:
  a table in memory: [1]
  pyarrow: []
  pyarrow, or is_nan: [1]
  datasets: []
  duckdb, in memory: [1]
  duckdb, file: []
  polars: [1]
groups 1.0, NaN, 7.0:
  a table in memory: [1, 2]
  pyarrow: [1, 2]
  pyarrow, or is_nan: [1, 2]
  datasets: [1, 2]
  duckdb, in memory: [1, 2]
  duckdb, file: [1, 2]
  polars: [1, 2]
groups 1.0, NaN | 7.0:
  a table in memory: [1, 2]
  pyarrow: [2]
  pyarrow, or is_nan: [2]
  datasets: [2]
  duckdb, in memory: [1, 2]
  duckdb, file: [2]
  polars: [1, 2]" ]] || {
  echo "this has changed"
  exit 1
}

#!/usr/bin/env bash
# A sample of 10 percent in duckdb is a few whole blocks of neighbouring rows: of 1,000 rows all of them or none.
#
# duckdb 2.0.1. "using sample 10%" is for a mixture's share of a source, or rows to look at. One would take about each
# tenth row. A share is drawn by blocks of 2,048 rows, each of which comes whole or not at all: of 10,000 rows 0, 2,048
# or 4,096, and more than half of the draws are empty with a file of less than a thousand rows. As neighbours in a file
# are often of one document or source, a sample of it has few sources, and looks as if it were good. The documentation
# does say that shares are drawn by the method "system", by vectors, and that it is meant for large tables. Right: using
# sample 10 percent (bernoulli), or a number of rows, which is drawn row by row.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q duckdb==2.0.1
cat >"$folder/show.py" <<'PYTHON'
import duckdb


def draws(rows: int, sample: str) -> list[list[int]]:
    query = f"select range from range({rows}) using sample {sample}"
    return [[row[0] for row in duckdb.sql(query.format(seed=seed)).fetchall()] for seed in range(40)]


for rows, sample in ((1000, "10 percent (system, {seed})"), (10_000, "10 percent (system, {seed})")):
    print(f"{rows} rows, 10 percent: {sorted({len(draw) for draw in draws(rows, sample)})} rows")
default = [len(draw) for draw in draws(1000, "10%")]
print(f"1000 rows, no method named: {'all or none' if set(default) <= {0, 1000} else 'others'}")
drawn = draws(100_000, "10 percent (system, {seed})")[1]
blocks = {row // 2048 for row in drawn}
print(f"100000 rows: {len(drawn)} rows out of {len(blocks)} of 49 blocks")
for sample in ("10 percent (bernoulli, {seed})", "100 rows (reservoir, {seed})"):
    sizes = [len(draw) for draw in draws(1000, sample)]
    print(f"1000 rows, {sample.split('(')[1].split(',')[0]}: {'70 to 130 rows' if 70 <= min(sizes) <= max(sizes) <= 130 else sizes}")
PYTHON
found=$("$folder/venv/bin/python" "$folder/show.py" 2>"$folder/stderr")
echo "$found"
[[ $found == "1000 rows, 10 percent: [0, 1000] rows
10000 rows, 10 percent: [0, 1808, 2048, 3856, 4096] rows
1000 rows, no method named: all or none
100000 rows: 16384 rows out of 8 of 49 blocks
1000 rows, bernoulli: 70 to 130 rows
1000 rows, reservoir: 70 to 130 rows" ]] || {
  echo "this has changed"
  exit 1
}

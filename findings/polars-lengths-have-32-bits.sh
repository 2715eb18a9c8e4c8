#!/usr/bin/env bash
# Lengths in polars are unsigned numbers of 32 bits: texts of 5 GB are 0.7 GB in all, and a length of 1 less 3 is 4294967294.
#
# polars 2.1.0. str.len_bytes, str.len_chars, list.len and pl.len give UInt32. One would take a sum of them for the sum:
# polars adds numbers of 8 and 16 bits in 64 "to prevent overflow", but those of 32 in 32, so that the bytes or tokens of a
# corpus are counted modulo 4,294,967,296, in sum, cum_sum and group_by, and in SQL. (The mean is right, so the two don't
# fit.) Differences are worse: a length less 3 is never under 0, so that a filter "length - 3 > 0" keeps the short rows,
# clip(0) does nothing, and diff() alone is signed. Nothing warns or raises. Right: .cast(pl.Int64) behind each length,
# before anything is done with it.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q polars==2.1.0
cat >"$folder/lengths.py" <<'PYTHON'
import polars as pl

corpus = pl.select(pl.repeat("x" * 1_000_000, 5000).alias("text"))  # one text in memory, 5000 views
length = pl.col("text").str.len_bytes()
print(f"bytes of 5000 texts of 1000000: sum {corpus.select(length.sum()).item()}, mean {corpus.select(length.mean()).item()}")
print(f"in SQL: {corpus.sql('select sum(octet_length(text)) from self').item()}")
print(f"cast first: {corpus.select(length.cast(pl.Int64).sum()).item()}")
rows = pl.DataFrame({"tokens": [[1], [1, 2, 3, 4]]})
length = pl.col("tokens").list.len()
print(f"lengths 1 and 4, less 3: {rows.select(length - 3).to_series().to_list()}")
print(f"rows with length - 3 > 0: {rows.filter(length - 3 > 0).height}, with length > 3: {rows.filter(length > 3).height}")
print(f"number of rows less 3: {rows.select(pl.len() - 3).item()}")
PYTHON
found=$("$folder/venv/bin/python" "$folder/lengths.py" 2>"$folder/stderr")
echo "$found"
[[ $found == "bytes of 5000 texts of 1000000: sum 705032704, mean 1000000.0
in SQL: 705032704
cast first: 5000000000
lengths 1 and 4, less 3: [4294967294, 1]
rows with length - 3 > 0: 2, with length > 3: 1
number of rows less 3: 4294967295" ]] || {
  echo "this has changed"
  exit 1
}

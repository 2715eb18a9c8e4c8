#!/usr/bin/env bash
# With 53 system prompts in place of 52, a Parquet file of 2,000 rows has 20 MB in place of 1: its dictionary is full.
#
# pyarrow 26.0.1. A column in which a few texts come again and again is stored as a dictionary of them and a number a row, by
# default; one would take the size for a matter of how many different texts there are, so that one more adds its own 20 KB.
# The dictionary of a row group has a limit, dictionary_pagesize_limit, of 1 MB. Reaching it, the writer gives dictionaries
# up for the rest of the row group (FallbackToPlainEncoding in Arrow's column_writer.cc) and writes every text out, however
# often it comes; compression by snappy doesn't see beyond 64 KB, and zstd finds little more. Short texts as categories never
# come near 1 MB; prompts, documents that questions refer to and lists of tools do. What helps: dictionary_pagesize_limit=2**26
# for pyarrow's writer.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3.11 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q pyarrow==26.0.1
cat >"$folder/write.py" <<'PYTHON'
import random
import sys
from pathlib import Path

import pyarrow
import pyarrow.parquet

path = Path(sys.argv[1])
OPTIONS = {"default": {}, "zstd": {"compression": "zstd"}, "a larger limit": {"dictionary_pagesize_limit": 2**26}}
sizes = {}
for n in (52, 53, 106):
    rng = random.Random(0)
    prompts = [rng.randbytes(10_000).hex() for _ in range(n)]
    table = pyarrow.table({"prompt": [prompts[row % n] for row in range(2000)]})
    for name, options in OPTIONS.items():
        pyarrow.parquet.write_table(table, path, **options)
        assert pyarrow.parquet.read_table(path).equals(table)
        sizes[n, name] = path.stat().st_size
    print(f"{n} prompts of 20 KB in 2,000 rows:", ", ".join(f"{name} {sizes[n, name] / 1e6:.1f} MB" for name in OPTIONS))
cliff = all(sizes[53, name] > 10 * sizes[52, name] for name in ("default", "zstd"))
level = all(sizes[n, "a larger limit"] < 25_000 * n for n in (52, 53, 106))
sys.exit(not (cliff and level))
PYTHON
"$folder/venv/bin/python" "$folder/write.py" "$folder/rows.parquet" || {
  echo "this has changed"
  exit 1
}

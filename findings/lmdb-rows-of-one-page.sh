#!/usr/bin/env bash
# LMDB stores rows of 4,096 bytes in 8,192 each, and rows of 2,048 in 4,096: round numbers of tokens take twice their room.
#
# Python's lmdb 3.0.0 (LMDB 0.9.36), with pages of 4,096 bytes. One would take a row of 1,024 tokens in int32, or 2,048 in
# uint16, for exactly one page, and a database of a million rows for about their 4 GB. A value that doesn't fit twice on a page
# with its key (me_nodemax in mdb.c) goes to pages of its own, and the first of these starts with a header of 16 bytes
# (PAGEHDRSZ): 4,096 bytes need two pages, and 2,048 one whole page. The file, what a copy of it sends and what the page cache
# holds are twice as large, and nothing says so, unless one asks env.stat() for overflow_pages. 4,080 bytes fit one page, and
# 2,000 go two to a page. What helps: rows of a few tokens less, several rows in a value (16 rows lose 6 percent), or
# compressing them.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3.11 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q lmdb==3.0.0
cat >"$folder/rows.py" <<'PYTHON'
import sys
from pathlib import Path

import lmdb

print("LMDB", ".".join(map(str, lmdb.version())))
for size in (2000, 2048, 4080, 4096, 16 * 4096):
    path = Path(sys.argv[1]) / str(size)
    rows = 2**26 // size
    with lmdb.open(str(path), map_size=2**30) as env:
        with env.begin(write=True) as transaction:
            for row in range(rows):
                transaction.put(row.to_bytes(8, "big"), bytes(size), append=True)
        page, last = env.stat()["psize"], env.info()["last_pgno"]
        print(f"{rows} rows of {size} bytes, pages of {page}: {(last + 1) * page / (rows * size):.2f} times their size")
PYTHON
found=$("$folder/venv/bin/python" "$folder/rows.py" "$folder")
echo "$found"
[[ $found == "LMDB 0.9.36
33554 rows of 2000 bytes, pages of 4096: 1.03 times their size
32768 rows of 2048 bytes, pages of 4096: 2.01 times their size
16448 rows of 4080 bytes, pages of 4096: 1.01 times their size
16384 rows of 4096 bytes, pages of 4096: 2.01 times their size
1024 rows of 65536 bytes, pages of 4096: 1.06 times their size" ]] || {
  echo "this has changed"
  exit 1
}

#!/usr/bin/env bash
# Of a .zst file with several frames, some functions of zstandard give all and some the first frame alone, and none says so.
#
# zstandard 0.25.0. A .zst file may be several frames in a row: shards that `cat` has put together, what pzstd writes, a log
# that was appended to. The zstd program and most readers (pyarrow, datasets, pandas, polars, duckdb) give all of it. One
# would take the functions of the package to give the same text, or an error for what they leave. open(), stream_reader() and
# copy_stream() give all; decompress(), read_to_iter() and decompressobj() stop behind the first frame: half of the corpus
# here, whole lines, without a word. stream_reader() does so though its read_across_frames is False. For decompressobj(),
# unused_data has the rest; decompress() has allow_extra_data=False, which raises. Right: stream_reader().
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q zstandard==0.25.0
cat >"$folder/read.py" <<'PYTHON'
import io
import sys
from pathlib import Path

import zstandard

path = Path(sys.argv[1]) / "rows.jsonl.zst"
shard = "".join(f'{{"text": "row {i}"}}\n' for i in range(10_000)).encode()
path.write_bytes(zstandard.ZstdCompressor().compress(shard) * 2)  # as `cat one.zst two.zst` has it
data = path.read_bytes()


def copied() -> bytes:
    out = io.BytesIO()
    zstandard.ZstdDecompressor().copy_stream(io.BytesIO(data), out)
    return out.getvalue()


def refused() -> bytes:
    try:
        return zstandard.ZstdDecompressor().decompress(data, allow_extra_data=False)
    except zstandard.ZstdError as error:
        return type(error).__name__.encode()


READ = {
    "open": lambda: zstandard.open(path).read(),
    "stream_reader": lambda: zstandard.ZstdDecompressor().stream_reader(io.BytesIO(data)).read(),
    "copy_stream": copied,
    "decompress": lambda: zstandard.ZstdDecompressor().decompress(data),
    "read_to_iter": lambda: b"".join(zstandard.ZstdDecompressor().read_to_iter(io.BytesIO(data))),
    "decompressobj": lambda: zstandard.ZstdDecompressor().decompressobj().decompress(data),
    "decompress, no extra data": refused,
}
for name, read in READ.items():
    print(f"{name}: {read().count(bytes([10])):,} of {2 * shard.count(bytes([10])):,} rows")
PYTHON
found=$("$folder/venv/bin/python" "$folder/read.py" "$folder" 2>"$folder/stderr")
echo "$found"
[[ $found == "open: 20,000 of 20,000 rows
stream_reader: 20,000 of 20,000 rows
copy_stream: 20,000 of 20,000 rows
decompress: 10,000 of 20,000 rows
read_to_iter: 10,000 of 20,000 rows
decompressobj: 10,000 of 20,000 rows
decompress, no extra data: 0 of 20,000 rows" ]] || {
  echo "this has changed"
  exit 1
}

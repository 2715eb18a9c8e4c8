#!/usr/bin/env bash
# datasets' format "numpy" gives whole numbers as float32 where one of them is null, and "jax" all of them modulo 2^32.
#
# datasets 5.2.0 with jax 0.10.2, numpy 2.4.6 and pyarrow 26.0.1. One would take with_format for another container of the
# same numbers: the columns are int64 and float64, and NumPy has both. float64 comes as float32, so that a time of today is
# half a minute off. A null among whole numbers makes floats of them, as in pandas, but of 32 bits: in that slice 16777217
# is 16777216, and in a slice without a null it is right. With "jax" an int64 is cut to its lower 32 bits, where jnp.asarray
# of the same Python number raises OverflowError: 2^40 + 7 is 7. Times, hashes, offsets in files and ids of documents are
# such numbers. Nothing warns. Right: columns=[...] with output_all_columns=True, so that only the columns of tokens have a
# format; or dtype=np.float64 where that is enough.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q datasets==5.2.0 pyarrow==26.0.1 numpy==2.4.6 jax==0.10.2 jaxlib==0.10.2
cat >"$folder/formats.py" <<'PYTHON'
import datasets
import numpy as np
from datasets import Dataset

rows = Dataset.from_dict({"time": [1764460000.5] * 3, "id": [16777217, 16777217, None], "offset": [2**40 + 7] * 3})
print({name: feature.dtype for name, feature in rows.features.items()})
for format, options in ((None, {}), ("numpy", {}), ("jax", {}), ("numpy", {"dtype": np.float64})):
    for end in (2, 3):
        columns = ["time", "id", "offset"] if format != "jax" or end == 2 else ["time", "offset"]
        got = rows.with_format(format, **options)[:end]
        texts = [f"{name} {got[name][0]:.1f} {getattr(got[name], 'dtype', '')}".strip() for name in columns]
        print(f"{format} {'float64 ' if options else ''}of {end} rows: {', '.join(texts)}")
PYTHON
found=$(HF_HOME="$folder/home" "$folder/venv/bin/python" "$folder/formats.py" 2>"$folder/stderr")
echo "$found"
[[ $found == "{'time': 'float64', 'id': 'int64', 'offset': 'int64'}
None of 2 rows: time 1764460000.5, id 16777217.0, offset 1099511627783.0
None of 3 rows: time 1764460000.5, id 16777217.0, offset 1099511627783.0
numpy of 2 rows: time 1764460032.0 float32, id 16777217.0 int64, offset 1099511627783.0 int64
numpy of 3 rows: time 1764460032.0 float32, id 16777216.0 float32, offset 1099511627783.0 int64
jax of 2 rows: time 1764460032.0 float32, id 16777217.0 int32, offset 7.0 int32
jax of 3 rows: time 1764460032.0 float32, offset 7.0 int32
numpy float64 of 2 rows: time 1764460000.5 float64, id 16777217.0 float64, offset 1099511627783.0 float64
numpy float64 of 3 rows: time 1764460000.5 float64, id 16777217.0 float64, offset 1099511627783.0 float64" ]] || {
  echo "this has changed"
  exit 1
}

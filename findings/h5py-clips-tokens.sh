#!/usr/bin/env bash
# h5py writes numbers that do not fit the data set's type as its largest or smallest, without a word.
#
# h5py 3.16.0 with numpy 2.4.6. Token stores often are of uint16. One would take a token of 70,000 to be refused, as
# NumPy refuses a Python number and pyarrow and datasets refuse an array's, or to wrap around, as NumPy's astype does.
# HDF5 clips: 70,000 is written as 65,535, and -100, the label that a loss leaves out, as 0, which is a real token:
# padding and prompts are learned after all. Fractions are cut off, NaN is 0 and 1e6 in float16 is infinity. It is so in
# create_dataset with dtype, in every assignment to a part of a data set, and on reading with astype. A list of numbers
# in create_dataset is refused, as NumPy makes the array of it, so that a test with a list says that it is safe. Right:
# check the range, or astype in NumPy with casting="safe", before writing. In the library: HDF5 converts in H5Tconv and
# clips what overflows, unless a callback is set for it (H5Pset_type_conv_cb); h5py sets none.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q h5py==3.16.0 numpy==2.4.6
cat >"$folder/show.py" <<'PYTHON'
import tempfile

import h5py
import numpy as np


def show(name: str, values: object, dtype: str, how: str) -> None:
    with tempfile.TemporaryFile() as file, h5py.File(file, "w") as store:
        try:
            if how == "create":
                data = store.create_dataset("x", data=values, dtype=dtype)
            else:
                data = store.create_dataset("x", len(values), dtype if how == "assign" else values.dtype)
                data[:] = values
            found = data.astype(dtype)[:] if how == "read" else data[:]
            print(f"{name}: {found.tolist()}")
        except OverflowError as error:
            print(f"{name}: {error}")


tokens = np.array([70000, -100, 3])
show("create_dataset", tokens, "uint16", "create")
show("assigned", tokens, "uint16", "assign")
show("read with astype", tokens, "uint16", "read")
show("create_dataset of a list", tokens.tolist(), "uint16", "create")
show("fractions and NaN in int16", np.array([2.7, np.nan, 1e9]), "int16", "create")
show("float16", np.array([1e6, 1.0]), "float16", "create")
print(f"NumPy's astype: {tokens.astype(np.uint16).tolist()}")
PYTHON
found=$("$folder/venv/bin/python" "$folder/show.py" 2>"$folder/stderr")
echo "$found"
[[ $found == "create_dataset: [65535, 0, 3]
assigned: [65535, 0, 3]
read with astype: [65535, 0, 3]
create_dataset of a list: Python integer 70000 out of bounds for uint16
fractions and NaN in int16: [2, 0, 32767]
float16: [inf, 1.0]
NumPy's astype: [4464, 65436, 3]" ]] || {
  echo "this has changed"
  exit 1
}

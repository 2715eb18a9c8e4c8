#!/usr/bin/env bash
# Reading file["tokens"][i] row by row, h5py unpacks a whole chunk for every row, however large its cache of chunks is.
#
# h5py 3.16.0 with HDF5 2.0.0. A compressed data set is stored in chunks of rows, and HDF5 keeps the last ones unpacked,
# so that one would take file["tokens"][i], as in a loader's __getitem__, for cheap as long as neighbours are read, and for a
# matter of rdcc_nbytes otherwise. But that cache belongs to the open data set, not to the file: file["tokens"] opens it, and
# when the row is read and the object is gone, HDF5 closes it and drops its chunks. Of 256 rows in one chunk each then
# costs the unpacking of all 256, and the time of an epoch grows with the square of the chunk. With rows = file["tokens"]
# kept, the same reads take a fiftieth of the time or less; while any such object lives, all others use its cache, too, so
# that the loss comes and goes with a variable elsewhere. What helps: keep the data set, not only the file.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3.11 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q h5py==3.16.0 numpy==2.4.6
cat >"$folder/rows.py" <<'PYTHON'
import sys
import time

import h5py
import numpy as np

path = sys.argv[1]
print("HDF5", h5py.version.hdf5_version)
tokens = np.random.default_rng(0).integers(0, 5000, (512, 1024), np.int32)
with h5py.File(path, "w") as file:
    file.create_dataset("tokens", data=tokens, chunks=(256, 1024), compression="gzip")


def seconds(keep: bool, cache: int) -> float:
    """To read 256 rows of one chunk, the best of three."""
    found = []
    for _ in range(3):
        with h5py.File(path, rdcc_nbytes=cache) as file:
            kept = file["tokens"] if keep else None
            start = time.perf_counter()
            rows = [file["tokens"][row] for row in range(256)]
            found.append(time.perf_counter() - start)
            assert np.array_equal(rows, tokens[:256])
            del kept
    return min(found)


opened, opened_with_more, kept = seconds(False, 2**23), seconds(False, 2**30), seconds(True, 2**23)
print(f"opened for each row: {opened:.3f} s, with a cache of 1 GB {opened_with_more:.3f} s; with one object kept: {kept:.3f} s")
sys.exit(not min(opened, opened_with_more) > 8 * kept)
PYTHON
"$folder/venv/bin/python" "$folder/rows.py" "$folder/tokens.h5" || {
  echo "this has changed"
  exit 1
}

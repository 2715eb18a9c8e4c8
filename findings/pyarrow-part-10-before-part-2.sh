#!/usr/bin/env bash
# pyarrow writes a table's rows in order into part-0 to part-11, and reads part-10 and part-11 before part-2.
#
# pyarrow 26.0.1. write_dataset with max_rows_per_file cuts a table into files, and its docstring promises that with
# preserve_order=True the order of rows is preserved. One would take dataset() or read_table() of the folder to give the
# rows back in that order, as they do for up to ten files. But the files are named by numbers without zeros in front and
# are read in the order of their names as texts: rows of the eleventh file come third. A small trial is in order and the
# real thing is not; lengths and sums are right. Scores, embeddings or labels that were kept in an array of their own
# belong to other rows, and a curriculum, or packed texts that go on in the next row, are out of order. The docstrings
# of dataset and read_table say nothing of the order of files. polars 2.1.0 reads such a folder in the same order.
# Right: a column with the row's number and sort_by after reading; or dataset() of a list of the paths in the order of
# their numbers, which is kept; or own file names with zeros in front, by a ParquetWriter each: basename_template has
# none. In the library: cpp/src/arrow/dataset/file_base.cc and dataset_writer.cc ({i} is replaced by the plain number),
# and cpp/src/arrow/dataset/discovery.cc, FileSystemDatasetFactory (files sorted by path).
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q pyarrow==26.0.1
cat >"$folder/show.py" <<'PYTHON'
import tempfile
from pathlib import Path

import pyarrow
import pyarrow.dataset
import pyarrow.parquet

for rows in (20, 24):
    with tempfile.TemporaryDirectory() as folder:
        table = pyarrow.table({"row": range(rows)})
        settings = {"max_rows_per_file": 2, "max_rows_per_group": 2, "preserve_order": True}
        pyarrow.dataset.write_dataset(table, folder, format="parquet", **settings)
        paths = sorted(Path(folder).iterdir(), key=lambda path: int(path.stem.split("-")[1]))
        assert sum((pyarrow.parquet.read_table(path)["row"].to_pylist() for path in paths), []) == list(range(rows))
        print(f"{len(paths)} files, read_table: {pyarrow.parquet.read_table(folder)['row'].to_pylist()}")
        print(f"dataset: {pyarrow.dataset.dataset(folder).to_table()['row'].to_pylist()}")
        listed = pyarrow.dataset.dataset([str(path) for path in paths]).to_table()["row"].to_pylist()
        print(f"a list of paths: {listed}")
PYTHON
found=$("$folder/venv/bin/python" "$folder/show.py" 2>"$folder/stderr")
echo "$found"
[[ $found == "10 files, read_table: [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16, 17, 18, 19]
dataset: [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16, 17, 18, 19]
a list of paths: [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16, 17, 18, 19]
12 files, read_table: [0, 1, 2, 3, 20, 21, 22, 23, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16, 17, 18, 19]
dataset: [0, 1, 2, 3, 20, 21, 22, 23, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16, 17, 18, 19]
a list of paths: [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16, 17, 18, 19, 20, 21, 22, 23]" ]] || {
  echo "this has changed"
  exit 1
}

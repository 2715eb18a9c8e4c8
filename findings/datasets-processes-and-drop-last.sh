#!/usr/bin/env bash
# With num_proc, datasets' map drops the last batch of each process, or hands all rows back as they were.
#
# datasets 5.2.0. With drop_last_batch=True, map leaves out a last batch that is not full, and num_proc is for speed:
# one would take the result to be the same rows. But each process cuts its own part: 100 rows in batches of 30 are 90
# rows with one process, 60 with two, 120 of 130 and 960 of 1,000 with more. If no part has a full batch, nothing is
# dropped and nothing is mapped: with four processes all 100 rows come back, the function has seen none of them, and
# there is no word of it. The usual use is packing texts into rows of a fixed length, where that is the data as it was
# before packing. Dataset.batch is cut in the same way: its parts of 34, 33 and 33 rows are batches of 30, 4, 30, 3, 30
# and 3. Right: num_proc=None wherever a batch's size matters, or parts that are a multiple of batch_size.
# In the library: datasets/arrow_dataset.py, Dataset._map_single, which rounds its rows down, if need be to 0.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q datasets==5.2.0
cat >"$folder/show.py" <<'PYTHON'
import datasets

datasets.disable_progress_bars()


def mapped(batch: dict) -> dict:
    return {"x": [-1] * len(batch["x"])}


for rows, processes in ((100, None), (100, 2), (100, 4), (130, 4), (1000, 8)):
    data = datasets.Dataset.from_dict({"x": list(range(rows))})
    data = data.map(mapped, batched=True, batch_size=30, drop_last_batch=True, num_proc=processes)
    print(f"{rows} rows, num_proc={processes}: {len(data)} rows, {data['x'][:].count(-1)} of them mapped")
batches = datasets.Dataset.from_dict({"x": list(range(100))}).batch(30, num_proc=3)
print(f"batch, num_proc=3: {[len(x) for x in batches['x']]}")
PYTHON
found=$(HF_HOME="$folder/home" "$folder/venv/bin/python" "$folder/show.py" 2>"$folder/stderr")
echo "$found"
[[ $found == "100 rows, num_proc=None: 90 rows, 90 of them mapped
100 rows, num_proc=2: 60 rows, 60 of them mapped
100 rows, num_proc=4: 100 rows, 0 of them mapped
130 rows, num_proc=4: 120 rows, 120 of them mapped
1000 rows, num_proc=8: 960 rows, 960 of them mapped
batch, num_proc=3: [30, 4, 30, 3, 30, 3]" ]] || {
  echo "this has changed"
  exit 1
}

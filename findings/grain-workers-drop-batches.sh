#!/usr/bin/env bash
# In grain each worker makes batches of its own rows and drops its own rest: with eight workers 100 rows are not one batch.
#
# grain 0.2.18. One would take the number of worker processes for a matter of speed: the same batches in the same order, and
# at the end a rest of less than a batch that is dropped. But batch before mp_prefetch, and Batch in a DataLoader (which has
# no other place for it), run in the workers, each of which has every n-th row. With 4 workers the first batch begins with
# rows 0, 4 and 8, so a run with other workers sees other batches. With drop_remainder each worker drops its own rest: of
# 100 rows in batches of 16, four are lost without workers, 36 with four, and all with eight, which is an epoch without a
# step and without an error. Without drop_remainder, an evaluation ends with several small batches, and a mean over batches
# takes them for whole ones. The rows' order and random_map's numbers are the same for any number of workers, so that one
# expects it of batches, too. Right: batch behind mp_prefetch, or in the MapDataset, before to_iter_dataset.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q grain==0.2.18 numpy==2.4.6
cat >"$folder/batches.py" <<'PYTHON'
import grain
from absl import flags

ROWS, BATCH = 100, 16


def loader(workers: int) -> grain.DataLoader:
    shards = grain.sharding.NoSharding()
    order = grain.samplers.IndexSampler(ROWS, num_epochs=1, shard_options=shards, shuffle=False, seed=0)
    batches = [grain.transforms.Batch(BATCH, drop_remainder=True)]
    return grain.DataLoader(data_source=range(ROWS), sampler=order, operations=batches, worker_count=workers)


def in_workers(workers: int) -> grain.IterDataset:
    rows = grain.MapDataset.range(ROWS).to_iter_dataset().batch(BATCH, drop_remainder=True)
    return rows.mp_prefetch(grain.MultiprocessingOptions(num_workers=workers))


def behind_workers(workers: int) -> grain.IterDataset:
    rows = grain.MapDataset.range(ROWS).to_iter_dataset()
    return rows.mp_prefetch(grain.MultiprocessingOptions(num_workers=workers)).batch(BATCH, drop_remainder=True)


def in_map(workers: int) -> grain.IterDataset:
    rows = grain.MapDataset.range(ROWS).batch(BATCH, drop_remainder=True).to_iter_dataset()
    return rows.mp_prefetch(grain.MultiprocessingOptions(num_workers=workers))


if __name__ == "__main__":
    flags.FLAGS.mark_as_parsed()
    for way in (loader, in_workers, behind_workers, in_map):
        for workers in (0, 4, 8):
            batches = [batch.tolist() for batch in way(workers)]
            begin = f", the first begins with {batches[0][:3]}" if batches else ""
            print(f"{way.__name__}, {workers} workers: {len(batches)} batches{begin}")
PYTHON
found=$("$folder/venv/bin/python" "$folder/batches.py" 2>"$folder/stderr")
echo "$found"
[[ $found == "loader, 0 workers: 6 batches, the first begins with [0, 1, 2]
loader, 4 workers: 4 batches, the first begins with [0, 4, 8]
loader, 8 workers: 0 batches
in_workers, 0 workers: 6 batches, the first begins with [0, 1, 2]
in_workers, 4 workers: 4 batches, the first begins with [0, 4, 8]
in_workers, 8 workers: 0 batches
behind_workers, 0 workers: 6 batches, the first begins with [0, 1, 2]
behind_workers, 4 workers: 6 batches, the first begins with [0, 1, 2]
behind_workers, 8 workers: 6 batches, the first begins with [0, 1, 2]
in_map, 0 workers: 6 batches, the first begins with [0, 1, 2]
in_map, 4 workers: 6 batches, the first begins with [0, 1, 2]
in_map, 8 workers: 6 batches, the first begins with [0, 1, 2]" ]] || {
  echo "this has changed"
  exit 1
}

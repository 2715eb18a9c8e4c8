#!/usr/bin/env bash
# With drop_remainder=False grain's DataLoader drops the remainder all the same: no process ever reads those rows.
#
# grain 0.2.18. Each process of a run reads its shard of the rows. ShardOptions says that with drop_remainder=False the
# rest is distributed over the first shards, so one would take all shards together to have each row once: it is the
# setting for an evaluation. But the loader gives every process the same number of rows, rounded down, whatever its
# shard holds. With 10 rows and 3 processes one row is left out, the last of the first shard or of the set, and no
# setting of drop_remainder reads it: both lose as many rows. 15 rows on 8 processes lose 7 of 15 rows. In an
# evaluation, the score is that of other rows than with one process, and depends on the number of processes. There is no
# warning. It also shuffles inside the shards alone, though it calls that a global shuffle: each process reads the same
# rows in every epoch. Right: MapDataset, sliced [process::processes], which gives the first processes one row more.
# In the library: grain/_src/python/data_loader.py, _SamplerMapDataset (length: the sampler's size // shard_count).
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q grain==0.2.18
cat >"$folder/show.py" <<'PYTHON'
import grain


def read(rows: int, processes: int, drop: bool, shuffle: bool = False, epochs: int = 1) -> list[list[int]]:
    parts = []
    for process in range(processes):
        shard = grain.sharding.ShardOptions(process, processes, drop_remainder=drop)
        sampler = grain.samplers.IndexSampler(rows, shard, shuffle=shuffle, num_epochs=epochs, seed=0)
        parts.append(list(grain.DataLoader(data_source=list(range(rows)), sampler=sampler, worker_count=0)))
    return parts


for drop in (True, False):
    parts = read(10, 3, drop)
    print(f"drop_remainder={drop}: {parts}, never read {sorted(set(range(10)) - set(sum(parts, [])))}")
parts = read(15, 8, False)
print(f"15 rows, 8 processes, drop_remainder=False: never read {sorted(set(range(15)) - set(sum(parts, [])))}")
sliced = [list(grain.MapDataset.range(10)[process::3]) for process in range(3)]
print(f"MapDataset, sliced: {sliced}")
shuffled = read(9, 3, True, shuffle=True, epochs=4)
print(f"shuffled, four epochs, each process's rows: {[sorted(set(part)) for part in shuffled]}")
PYTHON
found=$("$folder/venv/bin/python" "$folder/show.py" 2>"$folder/stderr")
echo "$found"
[[ $found == "drop_remainder=True: [[0, 1, 2], [3, 4, 5], [6, 7, 8]], never read [9]
drop_remainder=False: [[0, 1, 2], [4, 5, 6], [7, 8, 9]], never read [3]
15 rows, 8 processes, drop_remainder=False: never read [1, 3, 5, 7, 9, 11, 13]
MapDataset, sliced: [[0, 3, 6, 9], [1, 4, 7], [2, 5, 8]]
shuffled, four epochs, each process's rows: [[0, 1, 2], [3, 4, 5], [6, 7, 8]]" ]] || {
  echo "this has changed"
  exit 1
}

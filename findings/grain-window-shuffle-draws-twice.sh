#!/usr/bin/env bash
# grain's shuffle in windows reads some rows twice and others never, if the last window is not full.
#
# grain 0.2.18. WindowShuffleMapDataset shuffles each window of so many rows, so that reading stays near one place. Its
# text says that each index stands for exactly one shuffled index, so one would take an epoch to be all rows, once each,
# whatever their number. But the last window is shuffled as if it were full, and what falls behind the end is taken from
# the set's beginning. Of 1,050 rows in windows of 100, half the last window, 23 rows, is not in the epoch, and 23
# others are twice; of 100 rows in a window of 1,000, 32 are missing, and 26 come twice or more. With repeat() it is
# other rows in each epoch; in an evaluation, which reads the rows once, they are just not there. The length is right,
# and nothing is said. Right: a window that divides the number of rows, shuffle(), or WindowShuffleIterDataset, which
# has all rows.
# In the library: grain/_src/python/dataset/transformations/shuffle.py (WindowShuffleMapDataset.__getitem__).
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q grain==0.2.18
cat >"$folder/show.py" <<'PYTHON'
from collections import Counter

import grain
from grain.experimental import WindowShuffleIterDataset, WindowShuffleMapDataset


def show(name: str, rows: int, read: list[int]) -> None:
    seen = Counter(read)
    print(f"{name}: {len(read)} read, {rows - len(seen)} never, {sum(n > 1 for n in seen.values())} more than once")


for rows, window in ((1000, 100), (1050, 100), (10, 4), (100, 1000)):
    data = grain.MapDataset.range(rows)
    name = f"{rows} rows, windows of {window}"
    show(name, rows, list(WindowShuffleMapDataset(data, window_size=window, seed=0)))
    show(f"{name}, as iterator", rows, list(WindowShuffleIterDataset(data.to_iter_dataset(), window_size=window, seed=0)))
repeated = WindowShuffleMapDataset(grain.MapDataset.range(1050), window_size=100, seed=0).repeat(10)
print(f"1050 rows, windows of 100, ten epochs: {1050 - len(set(repeated))} never")
shuffled = list(grain.MapDataset.range(1050).shuffle(seed=0))
show("1050 rows, shuffle()", 1050, shuffled)
PYTHON
found=$("$folder/venv/bin/python" "$folder/show.py" 2>"$folder/stderr")
echo "$found"
[[ $found == "1000 rows, windows of 100: 1000 read, 0 never, 0 more than once
1000 rows, windows of 100, as iterator: 1000 read, 0 never, 0 more than once
1050 rows, windows of 100: 1050 read, 23 never, 23 more than once
1050 rows, windows of 100, as iterator: 1050 read, 0 never, 0 more than once
10 rows, windows of 4: 10 read, 1 never, 1 more than once
10 rows, windows of 4, as iterator: 10 read, 0 never, 0 more than once
100 rows, windows of 1000: 100 read, 32 never, 26 more than once
100 rows, windows of 1000, as iterator: 100 read, 0 never, 0 more than once
1050 rows, windows of 100, ten epochs: 0 never
1050 rows, shuffle(): 1050 read, 0 never, 0 more than once" ]] || {
  echo "this has changed"
  exit 1
}

#!/usr/bin/env bash
# webdataset's shardshuffle gives the shards the same order in every epoch, also when no seed is asked for.
#
# webdataset 1.0.2 with numpy 2.4.6. One would take shardshuffle=6 to draw another order of the shards whenever the data
# set is gone through, as the shuffle of samples does without a seed and as one knows it of data loaders. The docstring
# says no more than "the number of shards to shuffle", and of the seed "Defaults to None". But a missing seed is drawn
# once, when the data set is made, and each pass starts a new generator of it: all epochs read the shards in one order.
# The shuffle of samples sees a window of some thousand samples alone, so that texts that are far apart in the first
# epoch never share a batch, and the shards at the end are always the last ones. With a seed, shuffle() of samples has
# one order for all epochs as well, inside and out. No warning is given for either. detshuffle=True, whose name promises
# the opposite, is what draws another order in each epoch; it is False by default.
# Right: WebDataset(..., shardshuffle=n, detshuffle=True, seed=seed), or resampled=True, whose shards are drawn anew. In
# the library: webdataset/compat.py, WebDataset.__init__ (self.seed, and detshuffle or shuffle), and
# webdataset/filters.py, _shuffle: random.Random(seed) per pass.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q webdataset==1.0.2 numpy==2.4.6
cat >"$folder/show.py" <<'PYTHON'
import tempfile
from pathlib import Path

import webdataset

with tempfile.TemporaryDirectory() as folder:
    paths = []
    for shard in range(6):
        paths.append(str(Path(folder) / f"{shard}.tar"))
        with webdataset.TarWriter(paths[-1]) as writer:
            for row in range(2):
                writer.write({"__key__": f"{shard}-{row}", "txt": "a text"})

    def shards(**settings: object) -> list[str]:
        data = webdataset.WebDataset(paths, shardshuffle=6, **settings)
        return ["".join(sample["__key__"][0] for sample in data)[::2] for epoch in range(4)]

    print(f"no seed, of 20 data sets with one order in all epochs: {sum(len(set(shards())) == 1 for _ in range(20))}")
    print(f"seed=1, the shards of four epochs: {shards(seed=1)}")
    print(f"detshuffle=True, seed=1: {shards(detshuffle=True, seed=1)}")
    for settings in ({"seed": 1}, {}):
        data = webdataset.WebDataset(paths, shardshuffle=False).shuffle(12, initial=12, **settings)
        orders = {tuple(sample["__key__"] for sample in data) for epoch in range(4)}
        print(f"shuffle of samples, {settings or 'no seed'}: {len(orders)} order(s) in four epochs")
PYTHON
found=$("$folder/venv/bin/python" "$folder/show.py" 2>"$folder/stderr")
echo "$found"
[[ $found == "no seed, of 20 data sets with one order in all epochs: 20
seed=1, the shards of four epochs: ['140532', '140532', '140532', '140532']
detshuffle=True, seed=1: ['140532', '054132', '145320', '120453']
shuffle of samples, {'seed': 1}: 1 order(s) in four epochs
shuffle of samples, no seed: 4 order(s) in four epochs" ]] || {
  echo "this has changed"
  exit 1
}

#!/usr/bin/env bash
# In datasets, rows that take() holds out of a shuffled stream are trained on from the second epoch, behind skip().
#
# datasets 5.2.0. For a stream, the documentation splits by shuffling first, then take(n) to evaluate and skip(n) to
# train ("shuffle your dataset before splitting it", in its page on streaming), and calls set_epoch before each epoch so
# that it is shuffled anew; transformers' Trainer calls that by itself. One would take the two parts to stay apart. But
# both count rows of the shuffled stream, which is another one in each epoch: the first n of epoch 1 are other rows than
# those of epoch 0. Of 100 rows held out of 1,000, with a buffer of 100, training has none in epoch 0, and has had 54 of
# them once two more epochs are over. The held-out loss then falls because its rows are learned by heart. It takes no
# error and no warning. Right: take and skip first, of rows that are in random order already, and shuffle after that, or
# rows split by a hash of their text.
# In the library: datasets/iterable_dataset.py, SkipExamplesIterable and TakeExamplesIterable, whose
# shuffle_data_sources keeps the order of shards, while the buffer of BufferShuffledExamplesIterable below them gets the
# epoch's seed.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q datasets==5.2.0
cat >"$folder/show.py" <<'PYTHON'
import datasets

rows = datasets.Dataset.from_dict({"x": list(range(1000))}).to_iterable_dataset(num_shards=4)


def seen(data: datasets.IterableDataset) -> set[int]:
    return {row["x"] for row in data}


def show(name: str, train: datasets.IterableDataset, held_out: datasets.IterableDataset) -> None:
    held, trained = seen(held_out), set()
    for epoch in range(3):
        train.set_epoch(epoch)
        trained |= seen(train)
        print(f"{name}: after epoch {epoch}, {len(trained & held)} of {len(held)} held-out rows were trained on")


shuffled = rows.shuffle(seed=0, buffer_size=100)
show("shuffle, then take and skip", shuffled.skip(100), shuffled.take(100))
show("take and skip, then shuffle", rows.skip(100).shuffle(seed=0, buffer_size=100), rows.take(100))
PYTHON
found=$(HF_HOME="$folder/home" "$folder/venv/bin/python" "$folder/show.py" 2>"$folder/stderr")
echo "$found"
[[ $found == "shuffle, then take and skip: after epoch 0, 0 of 100 held-out rows were trained on
shuffle, then take and skip: after epoch 1, 30 of 100 held-out rows were trained on
shuffle, then take and skip: after epoch 2, 54 of 100 held-out rows were trained on
take and skip, then shuffle: after epoch 0, 0 of 100 held-out rows were trained on
take and skip, then shuffle: after epoch 1, 0 of 100 held-out rows were trained on
take and skip, then shuffle: after epoch 2, 0 of 100 held-out rows were trained on" ]] || {
  echo "this has changed"
  exit 1
}

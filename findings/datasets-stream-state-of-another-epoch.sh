#!/usr/bin/env bash
# A state of a datasets stream works in its own epoch alone, and on each pass: later epochs then start in the middle.
#
# datasets 5.2.0. A stream's state_dict() is for resuming: "the iteration will restart at the next example from when the
# state was saved", except for what was in a shuffle's buffer. The state has an "epoch", so that one would take
# load_state_dict to bring it back. It does not. The state is kept aside and used whenever the stream is read while its
# own epoch is the state's one. So a state from epoch 1 loaded into a new stream, which is at epoch 0, does nothing: the
# stream starts at its first row, in the order of epoch 0, and all that was read is read again. And a stream that goes
# on without set_epoch starts every later epoch where the state was saved: the rows before it are never read again, in
# any epoch. Neither is said, and a loader over the stream does the same. Right: set_epoch(state["epoch"]) beside
# load_state_dict, and set_epoch with a larger number before each later epoch, also where nothing is shuffled.
# In the library: datasets/iterable_dataset.py, "if self._starting_state_dict and self.epoch ==
# self._starting_state_dict["epoch"]", and nothing that clears _starting_state_dict after its use.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q datasets==5.2.0
cat >"$folder/show.py" <<'PYTHON'
import datasets


def stream() -> datasets.IterableDataset:
    return datasets.Dataset.from_dict({"x": list(range(10))}).to_iterable_dataset(num_shards=2)


def rows(data: datasets.IterableDataset) -> list[int]:
    return [row["x"] for row in data]


def state_after(count: int, epoch: int) -> dict:
    data = stream()
    data.set_epoch(epoch)
    for _, _ in zip(range(count), data):
        pass
    return data.state_dict()


data = stream()
data.load_state_dict(state_after(7, epoch=0))
for name in ("the epoch that was resumed", "the next epoch", "the one after that"):
    print(f"saved in epoch 0: {name} has {rows(data)}")
data = stream()
data.load_state_dict(state_after(7, epoch=1))
print(f"saved in epoch 1, and loaded: {rows(data)}")
data.set_epoch(1)
print(f"set_epoch(1): {rows(data)}")
data.set_epoch(2)
print(f"set_epoch(2): {rows(data)}")
PYTHON
found=$(HF_HOME="$folder/home" "$folder/venv/bin/python" "$folder/show.py" 2>"$folder/stderr")
echo "$found"
[[ $found == "saved in epoch 0: the epoch that was resumed has [7, 8, 9]
saved in epoch 0: the next epoch has [7, 8, 9]
saved in epoch 0: the one after that has [7, 8, 9]
saved in epoch 1, and loaded: [0, 1, 2, 3, 4, 5, 6, 7, 8, 9]
set_epoch(1): [7, 8, 9]
set_epoch(2): [0, 1, 2, 3, 4, 5, 6, 7, 8, 9]" ]] || {
  echo "this has changed"
  exit 1
}

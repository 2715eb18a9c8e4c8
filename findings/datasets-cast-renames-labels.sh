#!/usr/bin/env bash
# Cast to the same labels in another order, datasets keeps the numbers: what was "no" is "yes" afterwards.
#
# datasets 5.2.0. Two sources of one task often number their labels differently. concatenate_datasets refuses them, as
# the features can't be aligned, and cast is what one does about that. As cast from strings goes by names, and names
# that are not there are an error, one would take cast from ClassLabel to ClassLabel to go by names as well. It takes
# the numbers over: all rows of one source have the wrong label, the features are equal, and the two are put together
# without a word. cast_column does the same, and a class that is moved by one (a list sorted anew) does so, too. Right:
# align_labels_with_mapping, or cast to strings by int2str and back.
# In the library: datasets/features/features.py, ClassLabel.cast_storage (whole numbers are checked for their range
# alone).
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q datasets==5.2.0
cat >"$folder/show.py" <<'PYTHON'
import datasets
from datasets import ClassLabel, Dataset

datasets.disable_progress_bars()
texts = ["no", "yes", "maybe"]
first, second = ClassLabel(names=["no", "yes", "maybe"]), ClassLabel(names=["maybe", "no", "yes"])


def made(label: ClassLabel) -> Dataset:
    return Dataset.from_dict({"text": texts, "label": texts}).cast_column("label", label)


def names(data: Dataset) -> list[str]:
    return data.features["label"].int2str(data["label"][:])


print(f"texts: {texts}")
print(f"from strings: {names(made(first))}, {names(made(second))}")
try:
    datasets.concatenate_datasets([made(first), made(second)])
except ValueError:
    print("put together: refused")
cast = made(second).cast_column("label", first)
print(f"second, cast to first: {names(cast)}")
print(f"put together: {names(datasets.concatenate_datasets([made(first), cast]))}")
mapping = {name: number for number, name in enumerate(first.names)}
print(f"align_labels_with_mapping: {names(made(second).align_labels_with_mapping(mapping, 'label'))}")
PYTHON
found=$(HF_HOME="$folder/home" "$folder/venv/bin/python" "$folder/show.py" 2>"$folder/stderr")
echo "$found"
[[ $found == "texts: ['no', 'yes', 'maybe']
from strings: ['no', 'yes', 'maybe'], ['no', 'yes', 'maybe']
put together: refused
second, cast to first: ['yes', 'maybe', 'no']
put together: ['no', 'yes', 'maybe', 'yes', 'maybe', 'no']
align_labels_with_mapping: ['no', 'yes', 'maybe']" ]] || {
  echo "this has changed"
  exit 1
}

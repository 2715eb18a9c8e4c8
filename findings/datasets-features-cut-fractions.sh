#!/usr/bin/env bash
# Given features, datasets cuts fractions off without a word, and map makes the column wider instead of saying so.
#
# datasets 5.2.0. With features one says what a column is. Values outside are refused: 70,000 in uint16 is an error, and
# so is cast_column of 1.7 to int32. So one would take 2.7 in an int64 column to be an error as well. from_dict,
# from_list and from_generator make 2 of it, and 0 of -0.9: scores, weights of tokens or rewards in a schema that was
# written for whole numbers (or read off the first rows) are other numbers, in any order of the rows. map goes the other
# way: 40,000 * 2 in a column of uint16 has no error, the column is int64 afterwards (four times the memory), unless
# features are given. Right: from_dict without features, then cast, which refuses what it would have to change.
# In the library: datasets/arrow_writer.py, TypedSequence.__arrow_array__ (pa.array with the type, then
# cast_array_to_feature).
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q datasets==5.2.0
cat >"$folder/show.py" <<'PYTHON'
import datasets
from datasets import Dataset, Features, Value

datasets.disable_progress_bars()


def show(name: str, make) -> None:
    try:
        print(f"{name}: {make()}")
    except Exception as error:
        print(f"{name}: {type(error).__name__}")


whole = Features({"score": Value("int64")})
small = Features({"score": Value("uint16")})
scores = [1, 2.7, -0.9]
rows = [{"score": score} for score in scores]
show("from_dict", lambda: Dataset.from_dict({"score": scores}, features=whole)["score"][:])
show("from_list", lambda: Dataset.from_list(rows, features=whole)["score"][:])
show("from_generator", lambda: Dataset.from_generator(lambda: iter(rows), features=whole)["score"][:])
show("fractions first", lambda: Dataset.from_list(rows[::-1], features=whole)["score"][:])
show("cast", lambda: Dataset.from_list(rows).cast(whole)["score"][:])
show("too large", lambda: Dataset.from_dict({"score": [70000]}, features=small)["score"][:])
doubled = Dataset.from_dict({"score": [40000]}, features=small).map(lambda row: {"score": row["score"] * 2})
show("map of uint16", lambda: (doubled["score"][:], doubled.features["score"].dtype))
PYTHON
found=$(HF_HOME="$folder/home" "$folder/venv/bin/python" "$folder/show.py" 2>"$folder/stderr")
echo "$found"
[[ $found == "from_dict: [1, 2, 0]
from_list: [1, 2, 0]
from_generator: [1, 2, 0]
fractions first: [0, 2, 1]
cast: ArrowInvalid
too large: ArrowInvalid
map of uint16: ([80000], 'int64')" ]] || {
  echo "this has changed"
  exit 1
}

#!/usr/bin/env bash
# datasets' class_encode_column gives whole numbers new numbers once there are more than ten: label 2 becomes 4.
#
# datasets 5.2.0 with pyarrow 26.0.1. class_encode_column makes a ClassLabel of a column, as
# train_test_split(stratify_by_column=...) wants one. One would take labels that are whole numbers from 0 on to stay as they
# are, and so they do up to ten of them. But the classes are sorted as texts, "0", "1", "10", "11", "2": of twelve, all from
# 2 on get other numbers, and the row says 4 where the file says 2. A model that is trained on the encoded column and scored
# against the file's numbers, or by a table of names in the file's order, is wrong in most classes and right in 0 and 1. The
# documentation says nothing of the order. Right: cast_column(name, ClassLabel(num_classes=12)), which keeps the numbers.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q datasets==5.2.0 pyarrow==26.0.1
cat >"$folder/labels.py" <<'PYTHON'
import datasets
from datasets import ClassLabel, Dataset

datasets.disable_progress_bars()
for count in (10, 12):
    rows = Dataset.from_dict({"label": list(range(count))})
    print(f"0 to {count - 1}, class_encode_column: {rows.class_encode_column('label')['label'][:]}")
    print(f"0 to {count - 1}, cast_column: {rows.cast_column('label', ClassLabel(num_classes=count))['label'][:]}")
PYTHON
found=$(HF_HOME="$folder/home" "$folder/venv/bin/python" "$folder/labels.py" 2>"$folder/stderr")
echo "$found"
[[ $found == "0 to 9, class_encode_column: [0, 1, 2, 3, 4, 5, 6, 7, 8, 9]
0 to 9, cast_column: [0, 1, 2, 3, 4, 5, 6, 7, 8, 9]
0 to 11, class_encode_column: [0, 1, 4, 5, 6, 7, 8, 9, 10, 11, 2, 3]
0 to 11, cast_column: [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11]" ]] || {
  echo "this has changed"
  exit 1
}

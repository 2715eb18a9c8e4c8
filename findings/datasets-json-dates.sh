#!/usr/bin/env bash
# datasets rewrites texts in JSON that look like dates, also where the features say that they are strings.
#
# datasets 5.2.0 with pyarrow 26.0.1. One would take load_dataset("json") with Features({"text": Value("string")}) to give
# the texts of the file. But the reader guesses first, a block of the file at a time: if all texts of a block are dates it makes
# timestamps of them, and the cast to the features writes those out in another form. "2024-01-05" comes as
# "2024-01-05 00:00:00", and whether it does depends on its neighbours: answers that are dates, say, in one of the files. Without
# features they are datetimes, or, behind a first file of strings, such texts again. The same in streaming. Right: to read
# the lines oneself, as in Dataset.from_generator.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q datasets==5.2.0 pyarrow==26.0.1
cat >"$folder/read.py" <<'PYTHON'
import json
import sys
from pathlib import Path

import datasets

folder = Path(sys.argv[1])
datasets.disable_progress_bars()
features = datasets.Features({"text": datasets.Value("string")})
FILES = {"dates.jsonl": ["2024-01-05", "2024-01-06T10:00"], "both.jsonl": ["2024-01-05", "on Monday"]}
for name, texts in FILES.items():
    (folder / name).write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))


def lines(name: str):
    for line in (folder / name).open():
        yield json.loads(line)


for name in FILES:
    files = {"data_files": str(folder / name), "split": "train", "features": features}
    read = datasets.load_dataset("json", **files, cache_dir=folder / "cache")
    streamed = datasets.load_dataset("json", **files, streaming=True)
    own = datasets.Dataset.from_generator(lines, gen_kwargs={"name": name}, features=features, cache_dir=folder / "cache")
    print(f"{name}: {read['text'][:]}, streamed {[row['text'] for row in streamed]}, own {own['text'][:]}")
PYTHON
found=$(HF_HOME="$folder/home" "$folder/venv/bin/python" "$folder/read.py" "$folder" 2>"$folder/stderr")
echo "$found"
dates="['2024-01-05 00:00:00', '2024-01-06 10:00:00']"
both="['2024-01-05', 'on Monday']"
[[ $found == "dates.jsonl: $dates, streamed $dates, own ['2024-01-05', '2024-01-06T10:00']
both.jsonl: $both, streamed $both, own $both" ]] || {
  echo "this has changed"
  exit 1
}

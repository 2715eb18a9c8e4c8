#!/usr/bin/env bash
# The Python package jq rounds whole numbers above 2^53, also in rows that it only passes on; the program jq does not.
#
# jq 1.13.0 from the Python package index, which has jq 1.8.2 inside. Since 1.7 the program keeps a number as it is
# written as long as a filter does not calculate with it, and Python's json reads whole numbers of any size: one would
# take ids to come out as they went in. Results of the package are made from floating-point numbers. 9007199254740993
# comes out as 9007199254740992, in first(), in all() and in text(), so that it cannot be told from its neighbour; a
# number goes in by input_value as rounded as by input_text; 1.10 is 1.1, 3.0 is 3, and 1e1000 is 1.8e308. Ids of posts,
# hashes of 64 bits, and counters in nanoseconds are above 2^53. Inside of a filter the digits are there: == and
# group_by tell neighbours apart, and tojson and tostring show them. Right: ids as strings in the data, or tojson at the
# filter's end and json.loads behind it.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q jq==1.13.0
cat >"$folder/show.py" <<'PYTHON'
import json

import jq

ROWS = '[{"id": 9007199254740992}, {"id": 9007199254740993}, {"id": 9007199254740995}]'
rows = json.loads(ROWS)


def ids(found: list[dict]) -> list[int]:
    return [row["id"] % 1000 for row in found]


print(f"json, last three digits: {ids(rows)}")
print(f"jq, first(): {ids(jq.compile('.').input_text(ROWS).first())}")
print(f"jq, text(): {ids(json.loads(jq.compile('.').input_text(ROWS).text()))}")
print(f"jq, input_value: {ids(jq.compile('.').input_value(rows).first())}")
print(f"jq, tojson: {ids(json.loads(jq.compile('tojson').input_text(ROWS).first()))}")
same_id = jq.compile("map(select(.id == 9007199254740993)) | length")
print(f"rows with the id of the second: {same_id.input_text(ROWS).first()}")
print(f"groups by id: {jq.compile('group_by(.id) | map(length)').input_text(ROWS).first()}")
print(f"other numbers: {jq.compile('.').input_text('[1.10, 3.0, 1e1000]').first()}")
PYTHON
found=$("$folder/venv/bin/python" "$folder/show.py" 2>"$folder/stderr")
echo "$found"
[[ $found == "json, last three digits: [992, 993, 995]
jq, first(): [992, 992, 996]
jq, text(): [992, 992, 996]
jq, input_value: [992, 992, 996]
jq, tojson: [992, 993, 995]
rows with the id of the second: 1
groups by id: [1, 1, 1]
other numbers: [1.1, 3, 1.7976931348623157e+308]" ]] || {
  echo "this has changed"
  exit 1
}

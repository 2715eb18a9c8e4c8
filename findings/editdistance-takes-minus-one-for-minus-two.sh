#!/usr/bin/env bash
# editdistance takes -1 and -2 for the same element, as it compares hashes alone: their distance is 0.
#
# editdistance 0.8.1. The README says that any iterable of hashable objects will do, so that one counts the errors of
# token ids or labels with it. One would take two elements to be the same if they are equal, as in a set or dict, where
# the hash comes first and the comparison after it. editdistance has no second step: elements with one hash are one
# element. In CPython hash(-1) is -2, so that -1 and -2, two marks of padding or of a label that is left out, count as
# equal, and so do -1.0 and -2.0, and n and n + 2**61 - 1, which happens with identifiers of 64 bits. The error rate of
# a wrong answer is 0.0. rapidfuzz 3.14.6 tells -1 from -2, and makes the second mistake.
# Right: number the elements first, in a dict: {element: number}, from 0 on, and compare the numbers. In the library:
# editdistance/bycython.pyx, eval: the elements' hash() goes into arrays of int64.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q editdistance==0.8.1
cat >"$folder/show.py" <<'PYTHON'
import editdistance

pairs = [(-1, -2), (-1.0, -2.0), (5, 5 + 2**61 - 1), (-1, -3), (1, 2), ((0, -1), (0, -2))]
for first, second in pairs:
    print(f"{first} and {second}: {editdistance.eval([first], [second])}")
truth, answer = [17, 4, -1, -1, 9], [17, 4, -2, -2, 9]
print(f"{truth} and {answer}: {editdistance.eval(truth, answer)}")
numbers = {}
for element in truth + answer:
    numbers.setdefault(element, len(numbers))
print(f"numbered: {editdistance.eval([numbers[e] for e in truth], [numbers[e] for e in answer])}")
PYTHON
found=$("$folder/venv/bin/python" "$folder/show.py" 2>"$folder/stderr")
echo "$found"
[[ $found == "-1 and -2: 0
-1.0 and -2.0: 0
5 and 2305843009213693956: 0
-1 and -3: 1
1 and 2: 1
(0, -1) and (0, -2): 0
[17, 4, -1, -1, 9] and [17, 4, -2, -2, 9]: 0
numbered: 2" ]] || {
  echo "this has changed"
  exit 1
}

#!/usr/bin/env bash
# The fewer elements grain shuffles, the longer each of them takes: milliseconds where there are ten.
#
# grain 0.2.18. MapDataset.shuffle keeps no permutation: where an element goes is worked out for each index, which one would
# take to cost the same for any number of elements, or less for few. But the index goes through a cipher on a range of at
# least 2^16 numbers, again and again until it falls among the elements: 65,536 / n times on average. With 10 elements that is
# thousands of steps for each one, with a million a few, so that a data set of a few rows, a test's or the smallest part of a
# mixture, can be what a fast loader waits for.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q grain==0.2.18
cat >"$folder/shuffle.py" <<'PYTHON'
import statistics
import time

import grain


def seconds(elements: int) -> float:
    """An element's, by the mean over a whole epoch or over 2,000 of it, the median of three seeds."""
    each = []
    for seed in range(3):
        shuffled, count = grain.MapDataset.range(elements).shuffle(seed=seed), min(elements, 2000)
        started = time.perf_counter()
        for i in range(count):
            shuffled[i]
        each.append((time.perf_counter() - started) / count)
    return statistics.median(each)


few, many = seconds(10), seconds(1_000_000)
print(f"an element of 10 takes over 50 times as long as one of 1,000,000: {few > 50 * many}")
PYTHON
found=$("$folder/venv/bin/python" "$folder/shuffle.py" 2>"$folder/stderr")
echo "$found"
[[ $found == "an element of 10 takes over 50 times as long as one of 1,000,000: True" ]] || {
  echo "this has changed"
  exit 1
}

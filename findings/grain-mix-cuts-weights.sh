#!/usr/bin/env bash
# grain's mix cuts weights to whole numbers near a hundred, so that a mixture has other shares than were asked for.
#
# grain 0.2.18 (dataset/transformations/mix.py, _float_to_int_proportions). One would take MapDataset.mix with the weights
# 0.7 and 0.3 for a mixture that is never further from them than a row or two, as it is an order by index and not by
# chance. But the weights are scaled so that the smallest is 100, and cut: 233 and 100. After 20,000 rows six are missing, and
# the gap grows with every 3,330 rows; with weights such as 1 and 1.009 both become 100.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q grain==0.2.18
cat >"$folder/mix.py" <<'PYTHON'
import grain


def share(weights: list[float], rows: int) -> int:
    """How many of the first rows are of the first source."""
    sources = [grain.MapDataset.range(10**6).map(lambda _, name=name: name) for name in range(2)]
    mixed = grain.MapDataset.mix(sources, weights=weights)
    return sum(mixed[i] == 0 for i in range(rows))


for first, second in ((0.7, 0.3), (1.009, 1.0)):
    asked = 20_000 * first / (first + second)
    print(f"{first} to {second}: {share([first, second], 20_000)} of 20000 rows, asked for {asked:.0f}")
PYTHON
found=$("$folder/venv/bin/python" "$folder/mix.py" 2>"$folder/stderr")
echo "$found"
[[ $found == "0.7 to 0.3: 13994 of 20000 rows, asked for 14000
1.009 to 1.0: 10000 of 20000 rows, asked for 10045" ]] || {
  echo "this has changed"
  exit 1
}

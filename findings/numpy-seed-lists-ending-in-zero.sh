#!/usr/bin/env bash
# To NumPy the seeds 7, [7], [7, 0] and [7, 0, 0] are one and the same: zeros at the end of a list do not count.
#
# numpy 2.4.6. The guide to parallel random numbers makes seeds of lists, [worker_id, root_seed], says that [root_seed,
# worker_id] works as well, and that such lists are about as safe against collisions as spawning is. It says nothing of
# zeros or of lengths. One would take [seed], [seed, epoch] and [seed, epoch, shard] to be three families that have
# nothing in common. But a list is filled up with zeros to four words of 32 bits: the generator that initializes the
# model with the seed 7, that of epoch 0, [7, 0], and that of its first shard, [7, 0, 0], give the same numbers, and so
# do [7, 3], of epoch 3, and [7, 3, 0]. The order of rows from which a held-out part was cut with the seed is the order
# of the first epoch. A number of more than 32 bits is several words: [7, 1] is also 7 + 2**32, and [7, 2**32] is [7, 0,
# 1]. Nothing is said. From five words on lists do differ. It is so in every bit generator and in SeedSequence.
# Right: lists of one length in the whole program, each number below 2**32, with a number for the purpose that is never
# 0 at the end; or spawn_key of SeedSequence, which is put behind the four words, so that (), (0,) and (0, 0) differ. In
# the library: numpy/random/bit_generator.pyx, SeedSequence.mix_entropy (words that are missing are mixed in as 0).
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q numpy==2.4.6
cat >"$folder/show.py" <<'PYTHON'
import numpy as np


def draw(seed: object) -> list[int]:
    return np.random.default_rng(seed).integers(1000, size=4).tolist()


for seed in (7, [7], [7, 0], [7, 0, 0], [7, 0, 0, 0], [7, 0, 0, 0, 0], [0, 7], [7, 3], [7, 3, 0]):
    print(f"{seed}: {draw(seed)}")
print(f"[7, 1] is 7 + 2**32: {draw([7, 1]) == draw(7 + 2**32)}")
print(f"[7, 2**32] is [7, 0, 1]: {draw([7, 2**32]) == draw([7, 0, 1])}")
generators = (np.random.PCG64DXSM, np.random.Philox, np.random.SFC64, np.random.MT19937)
same = [kind([7]).random_raw() == kind([7, 0]).random_raw() for kind in generators]
print(f"[7] is [7, 0] in {', '.join(kind.__name__ for kind in generators)}: {same}")
order = [np.random.default_rng(seed).permutation(8).tolist() for seed in ([7], [7, 0])]
print(f"the order of the seed: {order[0]}, of the seed and epoch 0: {order[1]}")
spawned = [draw(np.random.SeedSequence(7, spawn_key=key)) for key in ((), (0,), (0, 0))]
print(f"with spawn_key (), (0,) and (0, 0): {spawned}")
PYTHON
found=$("$folder/venv/bin/python" "$folder/show.py" 2>"$folder/stderr")
echo "$found"
[[ $found == "7: [944, 625, 684, 897]
[7]: [944, 625, 684, 897]
[7, 0]: [944, 625, 684, 897]
[7, 0, 0]: [944, 625, 684, 897]
[7, 0, 0, 0]: [944, 625, 684, 897]
[7, 0, 0, 0, 0]: [305, 797, 203, 53]
[0, 7]: [796, 38, 225, 777]
[7, 3]: [727, 975, 538, 884]
[7, 3, 0]: [727, 975, 538, 884]
[7, 1] is 7 + 2**32: True
[7, 2**32] is [7, 0, 1]: True
[7] is [7, 0] in PCG64DXSM, Philox, SFC64, MT19937: [True, True, True, True]
the order of the seed: [0, 6, 7, 2, 4, 5, 1, 3], of the seed and epoch 0: [0, 6, 7, 2, 4, 5, 1, 3]
with spawn_key (), (0,) and (0, 0): [[944, 625, 684, 897], [305, 797, 203, 53], [848, 392, 804, 152]]" ]] || {
  echo "this has changed"
  exit 1
}

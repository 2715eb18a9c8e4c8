#!/usr/bin/env bash
# Resumed from its state, torchdata's StatefulDataLoader ends the epoch as it should and shuffles all later ones otherwise.
#
# torchdata 0.11.0 with torch 2.13.0. A loader with shuffle=True and a generator of its own, as in runs that are to be
# repeated: state_dict() after a few batches, a new process, load_state_dict, and the rest of the epoch is exact. One would
# take what follows for exact, too, as the orders of all epochs follow from the generator's seed. Without workers they do
# not: every later epoch of the resumed run has another order than in the run without a stop. With workers (num_workers=2)
# the same loader goes on exactly, and without workers it does if the generator is torch's global one; so a test of one of
# these says nothing of the others. Each row still comes once an epoch, so that only a comparison of two runs shows it.
# Right: workers, or a new generator for each epoch, seeded with the epoch's number.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q torch==2.13.0 torchdata==0.11.0
cat >"$folder/resume.py" <<'PYTHON'
import torch
from torchdata.stateful_dataloader import StatefulDataLoader


def loader_of(workers: int, own: bool) -> StatefulDataLoader:
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(0) if own else None
    return StatefulDataLoader(range(1000), batch_size=10, shuffle=True, generator=generator, num_workers=workers)


def epoch(loader: StatefulDataLoader) -> list[int]:
    return torch.cat(list(loader)).tolist()


def main() -> None:
    for workers, own in ((0, True), (2, True), (0, False)):
        loader = loader_of(workers, own)
        whole = [epoch(loader) for _ in range(3)]
        loader = loader_of(workers, own)
        batches = iter(loader)
        for _ in range(3):
            next(batches)
        state = loader.state_dict()
        del batches
        loader = loader_of(workers, own)
        loader.load_state_dict(state)
        same = [epoch(loader) == whole[0][30:], epoch(loader) == whole[1], epoch(loader) == whole[2]]
        print(f"{workers} workers, {'own' if own else 'global'} generator: epochs as without a stop {same}")


if __name__ == "__main__":
    main()
PYTHON
found=$("$folder/venv/bin/python" "$folder/resume.py" 2>"$folder/stderr")
echo "$found"
[[ $found == "0 workers, own generator: epochs as without a stop [True, False, False]
2 workers, own generator: epochs as without a stop [True, True, True]
0 workers, global generator: epochs as without a stop [True, True, True]" ]] || {
  echo "this has changed"
  exit 1
}

#!/usr/bin/env bash
# To orbax a checkpoint whose loss is NaN is the best: it stays, and the good ones are deleted for it.
#
# orbax-checkpoint 0.12.8 with jax 0.10.2. CheckpointManager with best_fn and max_to_keep keeps the best checkpoints, and
# best_step() names one to go on from or to export. A run that diverges has a loss of NaN from some step on, which one would
# take for the worst there is, or for no metric (checkpoints without one are kept aside and never best). The steps are sorted
# by what best_fn gives, and NaN compares with nothing, so that the newest stay at the end of the order, where the best ones
# are: of losses 3, 2, 1, NaN, NaN the two NaN are kept, everything before is deleted, and best_step() is a NaN. With
# best_mode "max" too. Infinity is sorted well. Right: a best_fn that gives infinity, or no metrics to save(), for a loss that
# isn't finite.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q jax==0.10.2 jaxlib==0.10.2 orbax-checkpoint==0.12.8
cat >"$folder/best.py" <<'PYTHON'
import sys

import jax.numpy as jnp
import orbax.checkpoint as ocp

NAN, INF = float("nan"), float("inf")
for number, (mode, bad) in enumerate((("min", NAN), ("max", NAN), ("min", INF))):
    losses = [3.0, 2.0, 1.0, bad, bad]
    options = ocp.CheckpointManagerOptions(
        max_to_keep=2, best_fn=lambda metrics: metrics["loss"], best_mode=mode, enable_async_checkpointing=False
    )
    with ocp.CheckpointManager(f"{sys.argv[1]}/{number}", options=options) as manager:
        for step, loss in enumerate(losses, 1):
            manager.save(step, args=ocp.args.StandardSave({"x": jnp.ones(1)}), metrics={"loss": loss})
        kept = ", ".join(f"step {step} ({losses[step - 1]})" for step in manager.all_steps())
        print(f"{mode} of {losses}: kept {kept}; best is step {manager.best_step()}")
PYTHON
found=$("$folder/venv/bin/python" "$folder/best.py" "$folder" 2>"$folder/stderr")
echo "$found"
[[ $found == "min of [3.0, 2.0, 1.0, nan, nan]: kept step 4 (nan), step 5 (nan); best is step 5
max of [3.0, 2.0, 1.0, nan, nan]: kept step 4 (nan), step 5 (nan); best is step 5
min of [3.0, 2.0, 1.0, inf, inf]: kept step 2 (2.0), step 3 (1.0); best is step 3" ]] || {
  echo "this has changed"
  exit 1
}

#!/usr/bin/env bash
# A run that goes back to an earlier orbax checkpoint saves nothing until it is past the old one's end, and resumes from that.
#
# orbax-checkpoint 0.12.8 with jax 0.10.2. After a spike of the loss one restores an earlier step and goes on, with a smaller
# learning rate, say. One would take save(step) to write the new checkpoints over the old ones of those steps, or to raise.
# CheckpointManager.save returns False, which few look at, and writes nothing, as the step isn't beyond the latest one. The
# old checkpoints stay: if the run ends by then, the next start restores latest_step(), which is the old run's, spike and all,
# and the steps in between are lost. force=True saves a new step in between, for one that exists it raises
# StepAlreadyExistsError. Right: delete() of each later step before going on.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q jax==0.10.2 jaxlib==0.10.2 orbax-checkpoint==0.12.8
cat >"$folder/back.py" <<'PYTHON'
import sys

import jax.numpy as jnp
import orbax.checkpoint as ocp

options = ocp.CheckpointManagerOptions(max_to_keep=5, enable_async_checkpointing=False)


def save(manager: ocp.CheckpointManager, step: int, run: float, **more) -> str:
    try:
        return str(manager.save(step, args=ocp.args.StandardSave({"run": jnp.full(1, run)}), **more))
    except Exception as error:
        return type(error).__name__


def whose(manager: ocp.CheckpointManager) -> str:
    latest = manager.latest_step()
    run = manager.restore(latest, args=ocp.args.StandardRestore({"run": jnp.zeros(1)}))["run"]
    return f"latest is step {latest}, of run {int(run[0])}"


for deletes in (False, True):
    with ocp.CheckpointManager(f"{sys.argv[1]}/{deletes}", options=options) as manager:
        for step in (100, 200, 300):
            save(manager, step, 1)
    with ocp.CheckpointManager(f"{sys.argv[1]}/{deletes}", options=options) as manager:  # restores step 100, and goes on
        if deletes:
            for step in (200, 300):
                manager.delete(step)
        saved = [save(manager, step, 2) for step in (150, 200, 250)]
        print(f"{'deleted' if deletes else 'as is'}: saves at 150, 200, 250: {', '.join(saved)}; {whose(manager)}")
        if not deletes:
            print(f"force: at 150 {save(manager, 150, 2, force=True)}, at 200 {save(manager, 200, 2, force=True)}")
PYTHON
found=$("$folder/venv/bin/python" "$folder/back.py" "$folder" 2>"$folder/stderr")
echo "$found"
[[ $found == "as is: saves at 150, 200, 250: False, False, False; latest is step 300, of run 1
force: at 150 True, at 200 StepAlreadyExistsError
deleted: saves at 150, 200, 250: True, True, True; latest is step 250, of run 2" ]] || {
  echo "this has changed"
  exit 1
}

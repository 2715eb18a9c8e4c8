"""Kill and resume, and the same run again: equal to the last bit? A part of suite.py.

For each setting four runs of the small model by scripts/train.py: a whole one; the same again; the same with nothing in
the compiler's cache, which may choose other kernels; and one that is killed after a checkpoint and started again by the
same command. By default the second and the last must equal the first.
"""

import json
import os
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from lib.machine import say
from lib.worker import answers
from lib.workers import WorkerFailed
from runs import Run

STEPS = {False: (200, 50), True: (40, 10)}  # updates, and those between checkpoints; `cut` or not
SETTINGS: dict[str, dict[str, Any]] = {
    "default": {},
    "training.deterministic false": {"training.deterministic": False},
}
MUST_BE_EQUAL = {("default", "again"), ("default", "killed")}


def difference(run: Run, expected: Run) -> str | None:
    """What differs in the logged losses or the parameters of final_model; None if nothing does."""
    ours, theirs = run.losses(), expected.losses()
    if ours.keys() != theirs.keys():
        return f"{len(ours)} logged updates instead of {len(theirs)}"
    for step, loss in theirs.items():
        if ours[step] != loss:
            return f"the loss of update {step}: {ours[step]!r} instead of {loss!r}"
    arrays, others = parameters(run.folder), parameters(expected.folder)
    if arrays.keys() != others.keys():
        return "final_model has other arrays"
    differing = [name for name, array in others.items() if not np.array_equal(arrays[name], array)]
    return f"final_model: {len(differing)} of {len(others)} arrays, {differing[0]} first" if differing else None


def parameters(folder: Path) -> dict[str, np.ndarray]:
    """The arrays of final_model."""
    import jax
    from flax import nnx

    from jaxlm import load

    state = nnx.to_pure_dict(nnx.state(load(folder / "final_model").model))
    leaves = jax.tree_util.tree_leaves_with_path(state)
    return {jax.tree_util.keystr(path): np.asarray(leaf) for path, leaf in leaves}


def runs_of(spec: dict[str, Any], overrides: dict[str, Any], folder: Path) -> dict[str, Run]:
    """The runs of a setting, all done; "whole" is the one to compare with.

    Raises:
      WorkerFailed: one of them did not end as it should.
    """
    updates, save = STEPS[spec["cut"]]
    overrides = overrides | {"training.max_steps": updates, "training.save_steps": save}
    shared, empty = folder / "caches", folder / "empty_caches"
    shutil.copytree(spec["cache_dir"], shared, ignore=shutil.ignore_patterns("compiled"))
    shutil.copytree(shared, empty)
    whole = Run(spec, folder / "whole", shared, overrides).start()
    whole.wait()
    runs = {name: Run(spec, folder / name, shared, overrides) for name in ("again", "killed")}
    runs["compiled anew"] = Run(spec, folder / "anew", empty, overrides)
    try:
        for run in runs.values():
            run.start()
        runs["killed"].kill_after(f"checkpoint_{save}")
        runs["killed"].start()
        for run in runs.values():
            run.wait()
    finally:
        for run in runs.values():
            run.end()
    return runs | {"whole": whole}


def main() -> None:
    spec, answer = json.loads(sys.argv[1]), answers()
    chosen = ["default"] if spec["cut"] else list(SETTINGS)  # on a CPU the others are the same
    for name in chosen:
        about = {"setting": name, "updates": STEPS[spec["cut"]][0], "killed_after": STEPS[spec["cut"]][1]}
        with tempfile.TemporaryDirectory() as folder:
            try:
                runs = runs_of(spec, SETTINGS[name], Path(folder))
            except WorkerFailed as failure:
                answer(about | {"error": str(failure)})
                continue
            for what in ("again", "compiled anew", "killed"):
                differs = difference(runs[what], runs["whole"])
                verdict = {"passed": differs is None} if (name, what) in MUST_BE_EQUAL else {}
                answer(about | {"what": what, "difference": differs} | verdict)
                say(f"  {name}, {what}: {differs or 'equal to the last bit'}")


if __name__ == "__main__":
    os.environ["JAX_PLATFORMS"] = "cpu"  # of this process, which only compares
    main()

"""The small model's losses on the GPU against those on the CPU, update by update. A part of suite.py.

Four runs at once: float32 without dropout, and bfloat16 with it, on either. Dropout masks are a function of the seed,
so both see the same.
"""

import json
import sys
import tempfile
from pathlib import Path
from typing import Any

from lib.machine import say
from lib.worker import answers
from lib.workers import WorkerFailed
from runs import Run

UPDATES = 20
CPU = {"JAX_PLATFORMS": "cpu", "CUDA_VISIBLE_DEVICES": ""}
SETTINGS: dict[str, dict[str, Any]] = {
    "float32": {
        "overrides": {"training.use_amp": False, "model.dropout": 0, "model.attention_dropout": 0}
        | {"training.learning_rate": 2e-4},  # a tenth of the model's: else a loss that jumps may magnify a rounding
        "environment": {"JAX_DEFAULT_MATMUL_PRECISION": "highest"},  # else a GPU takes TF32, with a tenth of the digits
        "limit": 2e-5,  # on a CPU other orders of sums make 2e-7, and attention that ignores segments 4e-4
    },
    "bfloat16 with dropout": {
        "overrides": {"training.use_amp": True, "model.dropout": 0.1, "model.attention_dropout": 0.1},
        "environment": {},
        "limit": 1e-2,
    },
}


def largest_difference(ours: dict[int, float], expected: dict[int, float]) -> float:
    """Of the losses of each update, relative; infinite where updates are missing, or a loss is no number."""
    if not expected or ours.keys() != expected.keys() or None in (*ours.values(), *expected.values()):
        return 1e30  # JSON has no infinity
    return max(abs(ours[step] - loss) / abs(loss) for step, loss in expected.items())


def main() -> None:
    spec, answer = json.loads(sys.argv[1]), answers()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        pairs = {}
        for name, setting in SETTINGS.items():
            overrides = setting["overrides"] | {"training.max_steps": UPDATES}
            on = {"device": setting["environment"], "cpu": setting["environment"] | CPU}
            pairs[name] = [
                Run(spec, folder / f"{name}-{where}", Path(spec["cache_dir"]), overrides, environment).start()
                for where, environment in on.items()
            ]
        for name, runs in pairs.items():
            result: dict[str, Any] = {"precision": name, "updates": UPDATES, "limit": SETTINGS[name]["limit"]}
            try:
                for run in runs:
                    run.wait()
            except WorkerFailed as failure:
                answer(result | {"error": str(failure)})
                for run in runs:
                    run.end()
                continue
            device, cpu = (run.losses() for run in runs)
            found = largest_difference(device, cpu)
            result |= {"largest_difference": found, "passed": found <= result["limit"]}
            answer(result | {"losses": list(device.values()), "losses_on_cpu": list(cpu.values())})
            say(f"  {name}: largest relative difference {found:.2g}, at most {result['limit']:g}")


if __name__ == "__main__":
    main()

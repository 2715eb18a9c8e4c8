"""Kills a run again and again at random moments, and checks that it always goes on to the same end, bit for bit.

    python benchmarks/soak.py --kills 200 --json benchmarks/results/soak.json

A small model, dropout and accumulation on, saves after every update and keeps two checkpoints; it is killed (SIGKILL,
to which no program can react) at a random moment or in the middle of a save, a swap or a deletion, and started again
with the same command until it finishes. Then parameters and optimizer state must equal those of a run that nobody
disturbed. Rounds follow each other, each with another seed, until the kills are done.
"""

import argparse
import dataclasses
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import jax
import numpy as np
import orbax.checkpoint as ocp

from jaxlm.checkpoints.folder import checkpoint_steps
from jaxlm.config import Config, DataConfig, ModelConfig, TrainingConfig, to_dict

ROOT = Path(__file__).parents[1]
WORDS = ["the", "small", "model", "reads", "a", "row", "and", "writes", "it", "again"]
UPDATES = 24
PATIENCE = 600  # seconds for one start


def configuration(folder: Path, seed: int) -> Config:
    """A run of UPDATES updates in folder/run."""
    text = folder / "text.jsonl"
    if not text.exists():
        rng = random.Random(1)
        documents = (" ".join(rng.choices(WORDS, k=rng.randint(3, 60))) for _ in range(300))
        text.write_text("".join(json.dumps({"text": document}) + "\n" for document in documents))
    return Config(
        model=ModelConfig(vocab_size=300, d_model=128, n_heads=2, n_layers=2, d_ff=512, max_seq_len=64),
        training=TrainingConfig(
            batch_size=2,
            gradient_accumulation_steps=2,
            max_steps=UPDATES,
            learning_rate=1e-3,
            logging_steps=1,
            eval_steps=3,
            save_steps=1,
            save_total_limit=2,
            sample_tokens=0,
            seed=seed,
            checkpoint_dir=str(folder / "run"),
        ),
        data=DataConfig(train_files=(str(text),), max_length=64, cache_dir=str(folder / "cache")),
    )


class Run:
    """`scripts/train.py` of one configuration, started and killed."""

    def __init__(self, folder: Path, seed: int) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder, self.run = folder, folder / "run"
        self.file = folder / "config.json"
        self.file.write_text(json.dumps(to_dict(configuration(folder, seed))))
        self.log = folder / "log.txt"

    def start(self) -> subprocess.Popen[bytes]:
        command = [sys.executable, str(ROOT / "scripts/train.py"), "--config", str(self.file)]
        with self.log.open("wb") as log:
            return subprocess.Popen(command, stdout=log, stderr=log, cwd=ROOT)

    def finish(self) -> None:
        """Lets it run to its end."""
        code = self.start().wait(PATIENCE)
        if code:
            raise SystemExit(f"a start ended with {code} instead of 0:\n{self.log.read_text()}")

    def under_way(self) -> str:
        """What is being saved, swapped or deleted, by its name; empty if nothing is."""
        try:
            names = [path.name for path in os.scandir(self.run)]
        except FileNotFoundError:
            return ""
        suspects = [name for name in names if ".new" in name or name.endswith(".old")]
        return next(("".join(c for c in name if not c.isdigit()) for name in suspects), "")

    def kill(self, rng: random.Random, in_save: bool) -> str | None:
        """Starts it and kills it; what was under way then, None if it finished first."""
        process = self.start()
        started = time.monotonic()
        steps_then = set(checkpoint_steps(self.run))
        waits = rng.randint(1, 4) if in_save else 0  # saves to let pass
        moment = rng.uniform(0, 12)
        was_saving = False
        while process.poll() is None:
            saving = bool(self.under_way()) if in_save else False
            waits -= saving and not was_saving
            was_saving = saving
            if (in_save and saving and waits <= 0) or (not in_save and time.monotonic() - started > moment):
                time.sleep(rng.choice([0, 0.001, 0.004, 0.01]) if in_save else 0)
                process.send_signal(signal.SIGKILL)
                process.wait()
                new = "" if set(checkpoint_steps(self.run)) != steps_then else ", before its first save"
                return (self.under_way() or "nothing") + new
            time.sleep(0.0005)
        if process.returncode:
            raise SystemExit(f"a start ended with {process.returncode}:\n{self.log.read_text()}")
        return None


def arrays(run: Path) -> list[np.ndarray]:
    """Parameters and optimizer state at the end, read with plain Orbax."""
    with ocp.StandardCheckpointer() as checkpointer:
        last = run / f"checkpoint_{UPDATES}"
        trees = [checkpointer.restore((last / item).resolve()) for item in ("params", "optimizer")]
    return [np.asarray(x) for x in jax.tree.leaves(trees)]


@dataclasses.dataclass
class Result:
    """Of a whole soak."""

    kills: int = 0
    rounds: int = 0
    bit_equal: int = 0
    moments: Counter[str] = dataclasses.field(default_factory=Counter)  # what was under way, and how often


def soak(folder: Path, kills: int, seed: int) -> Result:
    """Rounds of killing until `kills` are done."""
    rng, result = random.Random(seed), Result()
    while result.kills < kills:
        reference = Run(folder / f"{result.rounds}/undisturbed", result.rounds)
        reference.finish()
        victim = Run(folder / f"{result.rounds}/killed", result.rounds)
        while result.kills < kills:
            moment = victim.kill(rng, in_save=rng.random() < 0.7)
            if moment is None:
                break
            result.kills += 1
            result.moments[moment] += 1
            print(f"kill {result.kills}: {moment}; checkpoints {sorted(checkpoint_steps(victim.run))}", flush=True)
        victim.finish()
        left = [path.name for path in victim.run.iterdir() if ".new" in path.name or path.name.endswith(".old")]
        same = zip(arrays(victim.run), arrays(reference.run), strict=True)
        result.rounds += 1
        result.bit_equal += all(np.array_equal(a, b) for a, b in same) and not left
        print(f"round {result.rounds}: {result.bit_equal} of {result.rounds} bit-equal", flush=True)
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, help="where to write the result")
    arguments = parser.parse_args()
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        result = soak(Path(folder), arguments.kills, arguments.seed)
    saving = sum(count for moment, count in result.moments.items() if not moment.startswith("nothing"))
    shown = vars(result) | {
        "during_a_save": saving,
        "minutes": round((time.monotonic() - started) / 60, 1),
    }
    shown |= {"date": time.strftime("%Y-%m-%d"), "jax": jax.__version__, "orbax": ocp.__version__}
    print(json.dumps(shown))
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(shown, indent=2) + "\n")
    if result.bit_equal != result.rounds:
        raise SystemExit("NOT bit-equal")


if __name__ == "__main__":
    main()

"""Whether memory stays flat over a long run with hooks: python benchmarks/flat.py [--updates N] [--plot FILE.png]

A tiny model trains for 20,000 updates, logs every 10, evaluates and saves every 1,000. Three hooks are called on the
way: one counts updates, one adds a metric, one notes the process's resident memory. What is asked is how much more the
last quarter of the run takes than the second: the first one warms up.
"""

import argparse
import statistics
import sys
import tempfile
from pathlib import Path

from lib.machine import own_versions, say
from lib.report import RESULTS, Report
from lib.worker import status_bytes

from jaxlm import Hook, Running, Trainer, load_config, replace_fields

LINES = [f"After {i} comes {i + 1}, and after {i + 1} comes {i + 2}." for i in range(2000)]
TINY = {
    "model.vocab_size": 400, "model.d_model": 32, "model.n_heads": 2, "model.n_layers": 1, "model.d_ff": 64,
    "model.max_seq_len": 32, "data.max_length": 32, "data.min_length": 2, "training.batch_size": 4,
    "training.gradient_accumulation_steps": 1, "training.logging_steps": 10, "training.save_total_limit": 2,
}  # fmt: skip


class Counting(Hook):
    updates = 0

    def on_update(self, run: Running) -> None:
        self.updates += 1


class Adding(Hook):
    def on_log(self, run: Running, row: dict[str, float]) -> None:
        run.metrics_tracker.update({"custom/loss_squared": row["train/loss"] ** 2}, run.current_step)


class Weighing(Hook):
    """Resident bytes of the process, by update."""

    def __init__(self, every: int) -> None:
        self.every, self.seen = every, list[tuple[int, int]]()

    def on_update(self, run: Running) -> None:
        if run.current_step % self.every == 0:
            self.seen.append((run.current_step, status_bytes("VmRSS")))


def draw(seen: list[tuple[int, int]], path: Path) -> None:
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 2.5), layout="constrained")
    axes.plot([step for step, _ in seen], [size / 2**20 for _, size in seen])
    axes.set(xlabel="updates", ylabel="resident memory, MiB", ylim=(0, None))
    figure.savefig(path, dpi=120)


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--updates", type=int, default=20_000, help="(default: 20,000)")
    parser.add_argument("--plot", type=Path, help="a picture of it")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the JSON file (default: results/)")
    options = parser.parse_args(arguments)
    report = Report(
        "flat", ["benchmarks/flat.py", *arguments], options.out, versions=own_versions("jax", "jaxlib", "grain")
    )
    every = max(options.updates // 20, 1)
    steps = {"training.max_steps": options.updates, "training.eval_steps": every, "training.save_steps": every}
    counting, weighing = Counting(), Weighing(max(options.updates // 200, 1))
    with tempfile.TemporaryDirectory() as folder:
        where = {"training.checkpoint_dir": f"{folder}/run", "data.cache_dir": f"{folder}/cache"}
        config = replace_fields(load_config("small"), TINY | steps | where)
        Trainer(config, train_dataset=LINES, hooks=[counting, Adding(), weighing]).train()
    quarter = len(weighing.seen) // 4
    early, late = (
        statistics.median(size for _, size in part)
        for part in (weighing.seen[quarter : 2 * quarter], weighing.seen[-quarter:])
    )
    report.content["results"] = [
        {"updates": counting.updates, "second_quarter_bytes": early, "last_quarter_bytes": late, "seen": weighing.seen}
    ]
    report.close()
    say(f"{counting.updates:,} updates: {early / 2**20:.0f} MiB in the second quarter, {late / 2**20:.0f} in the last")
    if options.plot:
        draw(weighing.seen, options.plot)


if __name__ == "__main__":
    main(sys.argv[1:])

"""A small sweep over learning rates, through the Python API: python examples/sweep.py

A run each, in a folder of its own; a run that was stopped goes on, and one that is finished is not run again. At the
end, runs/sweep/report.html compares them. A minute on 2 CPU cores.
"""

from pathlib import Path

from jaxlm import Trainer, load_config, replace_fields
from jaxlm.report import write_report

FOLDER = Path("runs/sweep")
LEARNING_RATES = (3e-4, 1e-3, 3e-3)

base = replace_fields(
    load_config("small"),
    {
        "model.d_model": 128,
        "model.n_layers": 2,
        "model.d_ff": 512,
        "model.max_seq_len": 128,
        "data.max_length": 128,
        "data.validation_fraction": 0.01,
        "training.gradient_accumulation_steps": 1,
        "training.max_steps": 50,
        "training.eval_steps": 25,
        "training.sample_tokens": 0,
    },
)


def run(learning_rate: float) -> float:
    """Trains, and gives the last model's bits per byte of held-out text."""
    place = {"training.checkpoint_dir": str(FOLDER / f"{learning_rate:g}")}
    result = Trainer(replace_fields(base, place | {"training.learning_rate": learning_rate})).train()
    return result.last["eval/bits_per_byte"]


if __name__ == "__main__":
    results = {learning_rate: run(learning_rate) for learning_rate in LEARNING_RATES}
    for learning_rate, bits in results.items():
        best = "  <- best" if bits == min(results.values()) else ""
        print(f"learning rate {learning_rate:<6g}  {bits:.3f} bits per byte{best}")
    report = FOLDER / "report.html"
    write_report([FOLDER / f"{learning_rate:g}" for learning_rate in LEARNING_RATES], report)
    print(report)

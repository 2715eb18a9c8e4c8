"""What a run's folder says about the run: its configuration, its tokenizer, each of its starts."""

import json
from pathlib import Path

from jaxlm.checkpoints.folder import move_later_aside
from jaxlm.config import Config, to_dict
from jaxlm.data.atomic import atomic_write
from jaxlm.data.tokenizer import Tokenizer
from jaxlm.monitor.start_report import StartReport
from jaxlm.parallel.processes import say
from jaxlm.run.result import Result


def describe_run(folder: Path, config: Config, tokenizer: Tokenizer, start: StartReport, step: int) -> None:
    """Writes it, when the run starts or goes on from `step`; later checkpoints are moved aside first.

    Raises:
      OSError: the folder can't be written to.
    """
    for path in move_later_aside(folder, step):
        say(f"moved aside: {path.name}, later than step {step}")
    tokenizer.save(folder / "tokenizer")
    atomic_write(folder / "config.json", json.dumps(to_dict(config), indent=2) + "\n")
    start.append_to(folder)


def describe_finished(folder: Path, early: bool) -> str:
    """Why a run that is started once more makes no update."""
    longer = "a larger training.early_stopping_patience goes on, " * early
    return f"this run is finished: {folder / 'final_model'} ({longer}--fresh starts it over)"


def describe_end(result: Result) -> str:
    """Where a run that has ended as it should has left what."""
    at, best = f"at step {result.step} of {result.total_steps}", result.best_model
    if not result.finished:
        return f"stopped {at} as asked; saved in {result.folder}"
    early = f" early, {at}" * (result.step < result.total_steps)
    return f"finished{early}: {result.final_model}" + f", best validation loss in {best}" * (best is not None)

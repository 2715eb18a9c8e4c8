"""What training returns."""

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from jaxlm.report import frame
from jaxlm.report.runs import Run, read_run


@dataclass(frozen=True)
class Result:
    """What is there after `Trainer.train`, read from the run's folder when it is asked for.

    Attributes:
      folder: the run's.
      step: updates made.
      total_steps: updates of the whole run.
      finished: whether nothing is left to do, also where it stopped early.
    """

    folder: Path
    step: int
    total_steps: int
    finished: bool

    @cached_property
    def _run(self) -> Run:
        return read_run(self.folder)

    def rows(self) -> list[dict[str, float]]:
        """The rows of metrics.jsonl, one a step, in order: {"step": step, metric: value}; NaN where not finite."""
        rows: dict[int, dict[str, float]] = {}
        for metric, points in self._run.series.items():
            for step, value in points:
                rows.setdefault(step, {"step": step})[metric] = value
        return [rows[step] for step in sorted(rows)]

    @property
    def last(self) -> dict[str, float]:
        """The last value of each metric."""
        return {metric: points[-1][1] for metric, points in self._run.series.items()}

    @property
    def best(self) -> dict[str, float]:
        """The row with the lowest eval/loss; {} if nothing was evaluated."""
        evaluated = self._run.finite("eval/loss")
        step = min(evaluated, key=lambda point: point[1])[0] if evaluated else None
        return next((row for row in self.rows() if row["step"] == step), {})

    @property
    def best_model(self) -> Path | None:
        """The folder with the lowest eval/loss, if there is one."""
        return _existing(self.folder / "best_model")

    @property
    def final_model(self) -> Path | None:
        """The folder of the model at the end of a finished run; None where it is not finished."""
        return _existing(self.folder / "final_model") if self.finished else None

    def _repr_html_(self) -> str:
        return frame(self.folder)


def _existing(path: Path) -> Path | None:
    return path if path.is_dir() else None

"""What a run does with its model beside training it: evaluates it, saves it, and makes text with it."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from flax import nnx

from jaxlm.checkpoints.items import Progress as SavedProgress
from jaxlm.checkpoints.manifest import PREFIX
from jaxlm.checkpoints.save import SAVE_ERRORS, Checkpoints, reason_of, save_model
from jaxlm.config import Config
from jaxlm.data.tokenizer import Tokenizer
from jaxlm.errors import RunFailed, UserError
from jaxlm.generation.api import Prompt, generate_one_or_many
from jaxlm.model import Transformer
from jaxlm.monitor.metrics import MetricsTracker, Throughput
from jaxlm.monitor.progress import Progress
from jaxlm.monitor.watchdog import Watchdog
from jaxlm.parallel.processes import text_from_any_process
from jaxlm.run.feed import evaluate_state
from jaxlm.run.hooks import Hooks
from jaxlm.run.text import Text, describe_sample
from jaxlm.train.assemble import Assembly, Resolved
from jaxlm.train.step import TrainState

AGAIN = "mend that, and start the same command again"


class RunModel:
    """The model of a run, at its current step; `jaxlm.trainer.Trainer` trains it."""

    model_class: type[Transformer] = Transformer

    folder: Path
    resolved: Resolved
    assembly: Assembly
    text: Text
    tokenizer: Tokenizer
    state: TrainState
    current_step: int
    total_steps: int
    best_loss: float | None
    evaluations_since_best: int
    metrics_tracker: MetricsTracker
    checkpoints: Checkpoints
    _in_update = False  # between the update and what is saved of it
    _save_asked = False
    _saved: dict[str, Any]  # fields of its progress that stay the same all through the run
    _hooks: Hooks
    _progress: Progress
    _throughput: Throughput
    _watchdog: Watchdog

    @property
    def config(self) -> Config:
        """Resolved: complete and valid."""
        return self.resolved.config

    # ---------------------------------------------------------------- what a run saves by itself

    def _save_best_model(self, loss: float) -> None:
        before, self.best_loss = self.best_loss, loss
        if not self._replace_model("best_model"):
            self.best_loss = before  # the next one that is better is saved

    def _replace_model(self, name: str, average: bool = False) -> bool:
        """Whether the model could be saved as `name` in the run's folder, where there may be one already."""
        try:
            self.save_model(self.folder / name, average=average)
            return True
        except SAVE_ERRORS as error:
            self.checkpoints.any_failed = True
            self._progress.line(f"{name} was NOT saved: {reason_of(error)}; the one before it stays")
            return False

    def _save_final_model(self) -> None:
        try:
            self.save_model(self.folder / "final_model")
        except SAVE_ERRORS as error:
            self.checkpoints.any_failed = True
            raise RunFailed(f"final_model was not saved: {reason_of(error)}; {AGAIN}") from error
        if self.assembly.averages and not self.text.eval_rows:  # else each evaluation saves it
            self._replace_model("average_model", average=True)

    def _saved_progress(self) -> SavedProgress:
        return SavedProgress(
            step=self.current_step,
            total_steps=self.total_steps,
            best_loss=self.best_loss,
            evaluations_since_best=self.evaluations_since_best,
            global_batch=self.resolved.global_batch,
            rows_taken=self.resolved.batches.position(self.current_step),
            anneal_row=self.resolved.anneal_row,
            shards=self.assembly.layout.shards,
            **self._saved,
        )

    # ---------------------------------------------------------------- what users call

    def save_checkpoint(self) -> None:
        """Saves everything needed to go on from the current step, in the background unless a hook waits for it.

        Asked for while an update is logged and evaluated, by a hook or a subclass, it is done behind that.
        """
        if self._in_update:
            self._save_asked = True
            return
        path, self._save_asked = self.folder / f"{PREFIX}_{self.current_step}", False
        new = not path.exists()
        with self._watchdog.during("saving a checkpoint"):
            self.checkpoints.save(self.state, self.config, self.tokenizer, self._saved_progress())
            if new and self._hooks.listen("on_save"):
                self.checkpoints.wait()
                if text_from_any_process(self.checkpoints.failed) is None:
                    self._hooks.call("on_save", path)
        self._throughput.restart()

    def evaluate(self) -> dict[str, float]:
        """`loss` in nats a token, `perplexity`, `bits_per_byte` and `tokens` over all of the validation text.

        With ema_decay also `average_loss`, `average_perplexity` and `average_bits_per_byte`, of the average.
        """
        with self._watchdog.during("evaluating"):
            return evaluate_state(self.assembly, self.state, self.resolved, self.text, self._watchdog)

    def save_model(self, path: str | os.PathLike[str], *, average: bool = False) -> None:
        """Writes a self-contained model folder that `load`, evaluate.py and generate.py open.

        `average`: the average of the parameters (ema_decay), not themselves; UserError if there is none.
        """
        if average and not self.assembly.averages:
            raise UserError("training.ema_decay (none): the run keeps no average of its parameters; set it")
        params = self.assembly.average(self.state) if average else self.state.params
        with self._watchdog.during("saving a model"):
            save_model(Path(path), params, self.config, self.tokenizer, self._saved_progress())

    def generate_text(self, prompt: Prompt | Sequence[Prompt], **options: Any) -> Any:
        """`jaxlm.generation.api.generate_text` by the current parameters; a str where one prompt gets one text."""
        with self._watchdog.during("generating text"):
            model = nnx.merge(self.assembly.graphdef, self.assembly.to_whole(self.state.params))
            return generate_one_or_many(model, self.tokenizer, prompt, **options)

    def _sample(self) -> None:
        training, options = self.config.training, {"temperature": 0.7, "top_k": 40, "seed": self.config.training.seed}
        text = self.generate_text(self.text.sample_prompt, max_new_tokens=training.sample_tokens, **options)
        text = describe_sample(self.text.sample_prompt, text)
        self._progress.line("\n".join(["sample:", *("    " + line for line in text.splitlines())]))
        self.metrics_tracker.write_text("sample", text, self.current_step)

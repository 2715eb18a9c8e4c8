"""A run, from configuration to final model, in the order in which things happen.

`Trainer(config)` does everything up to the first update; `train()` is the loop. Subclass it to add to a run:
`_log_metrics` and `_log_eval_metrics` may call `self.metrics_tracker.update(values, self.current_step)`.
"""

import math
import os
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import jax
from flax import nnx

from jaxlm.checkpoints import folder
from jaxlm.checkpoints.items import Progress as SavedProgress
from jaxlm.checkpoints.items import read_progress
from jaxlm.checkpoints.load import restore_state
from jaxlm.checkpoints.save import SAVE_ERRORS, Checkpoints, reason_of, save_model
from jaxlm.config import Config, check_steps
from jaxlm.data.handed_over import Dataset, handed_over
from jaxlm.data.loader import total_steps
from jaxlm.errors import RunFailed
from jaxlm.generation.api import Prompt, generate_one_or_many
from jaxlm.model import Transformer
from jaxlm.monitor.metrics import MetricsTracker, Throughput, memory_gib, model_flops_utilization
from jaxlm.monitor.profiling import Profiler
from jaxlm.monitor.progress import Progress
from jaxlm.monitor.signals import StopRequest, stopped
from jaxlm.monitor.sinks import Sink, make_sinks
from jaxlm.monitor.start_report import StartReport
from jaxlm.monitor.watchdog import Watchdog
from jaxlm.ops.compiler import compiler_options
from jaxlm.parallel.devices import start_backend
from jaxlm.parallel.processes import StopVote, barrier, is_leader, say, text_from_any_process
from jaxlm.report import write_report_of_run
from jaxlm.run.begin import begin, with_handed_over
from jaxlm.run.describe import describe_end, describe_run
from jaxlm.run.feed import BatchFeeder, evaluate_state
from jaxlm.run.judge import NumbersJudge
from jaxlm.run.probes import Probes
from jaxlm.run.resume import find_resume, is_finished, say_going_on
from jaxlm.run.setup import compile_step, keep_compiled_programs, resolve
from jaxlm.run.text import describe_sample
from jaxlm.train.assemble import Resolved, assemble
from jaxlm.train.evaluate import describe_evaluation
from jaxlm.train.numbers import at_rate
from jaxlm.train.own_loss import OwnLoss
from jaxlm.train.schedules import build_schedule
from jaxlm.train.step import TrainState


class Trainer:
    """One run. `fresh` moves what is in the run's folder aside first; `sinks` get its rows beside those of report_to.
    `train_dataset` and `eval_dataset` are its text (`data.handed_over`), `compute_loss` its loss (`train.own_loss`).

    A subclass may set `model_class` to a `Transformer` of its own, and override `_log_metrics` and `_log_eval_metrics`.

    Raises:
      UserError: anything that the user can mend, before the first update.
    """

    model_class: type[Transformer] = Transformer

    def __init__(
        self,
        config: Config | Resolved,
        *,
        fresh: bool = False,
        sinks: Sequence[Sink] = (),
        train_dataset: Dataset | None = None,
        eval_dataset: Dataset | None = None,
        compute_loss: OwnLoss | None = None,
    ) -> None:
        if isinstance(config, Config):
            config = resolve(config, lambda config: start_backend(config.training), fresh)
        self._handed_over, self._own_loss = handed_over(config.config.data, train_dataset, eval_dataset), compute_loss
        self.resolved, self._own_sinks = with_handed_over(config, self._handed_over), sinks
        self.folder = Path(self.config.training.checkpoint_dir).expanduser()
        self._lock = folder.RunFolder(self.folder, fresh)
        with self._lock:  # a start that is refused leaves nothing behind
            keep_compiled_programs(self.resolved)
            checkpoint = find_resume(self.config, self.folder)
            self._prepare_text(checkpoint)
            self._count_steps()
            self.finished = is_finished(self.config, self.folder, checkpoint, self.total_steps)
            self._watchdog, self._throughput = Watchdog(self.config.training.watchdog_seconds), Throughput()
            self._assemble()
            self._make_state(checkpoint)
            self._report_start(checkpoint)

    # ---------------------------------------------------------------- what a run is made of

    @property
    def config(self) -> Config:
        """Resolved: complete and valid."""
        return self.resolved.config

    def _prepare_text(self, checkpoint: Path | None) -> None:
        """Text, tokenizer and rows; fixes the vocabulary size and the micro-batches in the configuration."""
        begun = begin(self.resolved, checkpoint, self.model_class, self._own_loss, self._handed_over)
        self.resolved, self.text, self._pretrained, self._changed, self._saved = begun
        self.tokenizer = self.text.tokenizer

    def _count_steps(self) -> None:
        training, size = self.config.training, (len(self.text.rows), self.resolved.global_batch)
        self.total_steps = total_steps(training.num_epochs, *size, training.max_steps, self.resolved.offset)
        stop = self.total_steps if training.stop_at_step is None else training.stop_at_step
        self.last_step = min(stop, self.total_steps)
        check_steps(self.config, self.total_steps, self.last_step)
        self.schedule = build_schedule(training, self.total_steps)
        self._profiler = Profiler(training.profile_steps, self.folder / "logs", self.last_step)

    def _assemble(self) -> None:
        """The functions that will be compiled, and the numbers that they take."""
        options = compiler_options(self.config.training, self.resolved.devices[0].platform, say)
        self.assembly = assemble(self.resolved, self.model_class, options=options, own_loss=self._own_loss)
        self._numbers = self.assembly.numbers(self.config.training)

    def _make_state(self, checkpoint: Path | None) -> None:
        """A fresh state, one that starts from another model, or the one saved in `checkpoint`."""
        assembly, layout = self.assembly, self.assembly.layout
        self.best_loss: float | None = None
        if checkpoint is not None:
            self.state: TrainState = restore_state(checkpoint, assembly.abstract_state, layout.shards)
            self.best_loss = read_progress(checkpoint).best_loss
        elif self._pretrained is not None:
            params = self._pretrained.params(*assembly.base, layout.shards)
            self.state = assembly.state_with(params, self._numbers)
        else:
            self.state = assembly.init(self._numbers)
        self.current_step = int(self.state.step)

    def _report_start(self, checkpoint: Path | None) -> None:
        """What will run, in a few lines."""
        training = self.config.training
        about = self.resolved, self.assembly, self.state, self.text.rows, self.text.eval_rows, self.text.fingerprint
        self._start = StartReport(*about, self.total_steps, self.schedule, self._changed)
        for line in (*self.resolved.notes, *self._start.lines()):
            say(line)
        if self._pretrained is not None:
            say(f"parameters: those of {training.init_from} ({self._pretrained.kind})")
        if training.stop_at_step is not None:
            say(f"stopping at step {self.last_step}")
        if self.finished:
            say(f"this run is finished: {self.folder / 'final_model'} (--fresh starts it over)")
        elif checkpoint is not None:
            say_going_on(checkpoint, self.schedule, self.total_steps)

    # ---------------------------------------------------------------- the loop

    def train(self) -> None:
        """Trains to the last step, evaluating, saving and logging on the way; a finished run returns at once.

        Raises:
          Stopped: a signal asked for it; the state is saved.
        """
        if self.finished:
            self._lock.release()
            return
        training = self.config.training
        with ExitStack() as opened:
            opened.callback(self._lock.release)
            opened.enter_context(self._watchdog)
            self._begin(opened)
            with StopRequest() as stop:
                stopping = False
                if training.eval_on_start and self.text.eval_rows and self.current_step == 0:
                    self._log_eval_metrics(self.evaluate())
                    self.metrics_tracker.flush(0)
                for batch in self.train_batches:
                    numbers = at_rate(self._numbers, self.schedule(self.current_step))
                    self._probes.before_update(self.current_step + 1, self.state, batch, numbers)
                    with self._profiler.update(self.current_step + 1, self.state):
                        self.state, self.step_metrics = self.train_step(self.state, batch, numbers)
                    self.current_step += 1
                    self._profiler.stop_after(
                        self.current_step, self.step_metrics
                    )  # this and the next wait for nothing
                    self._judge.note(self.current_step, self.step_metrics)
                    if self._due(training.logging_steps) or self.current_step == 1:
                        self._log_metrics(float(self.step_metrics["loss"]))
                    if self.text.eval_rows and self._due(training.eval_steps):
                        self._log_eval_metrics(self.evaluate())
                    stopping = self._stop_vote.agreed(stop.signal is not None)  # later signals: at the next update
                    if self._due(training.save_steps) or self.current_step == self.last_step or stopping:
                        self.save_checkpoint()
                    self.metrics_tracker.flush(self.current_step)
                    self._progress.advance(self.current_step)
                    if stopping:
                        break
                    self.train_batches.dispatched(self.current_step, self.step_metrics["loss"])
                if not stopping and self.current_step >= self.total_steps:
                    self._save_final_model()
        self._end(stop, stopping)

    def _due(self, every: int) -> bool:
        return self.current_step % every == 0 or self.current_step == self.total_steps

    def _begin(self, opened: ExitStack) -> None:
        """Writes what describes the run, opens the sinks and compiles the step; `opened` closes everything."""
        if is_leader():
            opened.callback(self._write_report)  # called last
        self._progress = Progress(self.current_step, self.last_step, shown=is_leader())
        sinks = self._open_sinks() if is_leader() else []
        self.metrics_tracker = MetricsTracker([*sinks, self._progress])
        opened.callback(self.metrics_tracker.close)
        opened.callback(self._profiler.close)
        barrier("prepared the folder")
        self.checkpoints = Checkpoints(self.folder, self.config.training.save_total_limit, say)
        opened.callback(self.checkpoints.close)  # which waits for the saves
        with self._watchdog.during("compiling the step"):
            self.train_step = compile_step(self.assembly, self.config.training.compiled_program)
        about = self.config, self.assembly, self.total_steps, self.metrics_tracker, self._throughput, self._watchdog
        self._probes = Probes(*about, self._progress.line)
        self._watchdog.updated(self.current_step)
        judged = self.resolved, self.text.rows, self.state
        self._judge = NumbersJudge(*judged, self._progress.line, self.checkpoints.newest)
        self._stop_vote = StopVote(self.resolved.mesh, self._watchdog.alive)
        steps = range(self.current_step, self.last_step)
        self.train_batches = BatchFeeder(self.resolved, self.text.rows, steps, self._throughput, self._watchdog)
        self._throughput.restart()

    def _write_report(self) -> None:
        write_report_of_run(self.folder, say)

    def _open_sinks(self) -> Sequence[Sink]:
        """Puts the run's folder into the state of the current step, and opens what is written on the way."""
        with folder.writing_to(self.folder):
            describe_run(self.folder, self.config, self.tokenizer, self._start, self.current_step)
            return [*make_sinks(self.config, self.folder, self.current_step), *self._own_sinks]

    def _end(self, stop: StopRequest, stopping: bool) -> None:
        """Says how it ended, when all processes have saved."""
        failed = text_from_any_process(self.checkpoints.failed)
        if stopping:
            raise stopped(stop.signal, self.current_step, failed)
        if failed is not None:
            raise RunFailed(
                f"checkpoint_{self.current_step} was not saved: {failed}; mend that, and start the same command again"
            )
        say(describe_end(self.folder, self.current_step, self.total_steps))

    # ---------------------------------------------------------------- logging

    def _log_metrics(self, loss: float) -> None:
        """Adds the training metrics to the current step's row; reading them waits for the device."""
        values = {name: float(value) for name, value in self.step_metrics.items()}
        rate = self._throughput.tokens_per_second()
        row = {
            "train/loss": loss,
            "train/learning_rate": self.schedule(self.current_step - 1),
            "train/grad_norm": values["grad_norm"],
            "train/tokens_per_second": rate,
            "train/mfu": model_flops_utilization(rate, self._start.flops_per_token, self.resolved.devices),
            "train/epoch": self.resolved.position(self.current_step) / len(self.text.rows),
            "train/skipped_steps": values["skipped"],
            "train/loss_scale": values["loss_scale"],
        }
        row |= {name: value for name, value in values.items() if name.startswith("train/")}  # of an own loss
        row |= memory_gib(jax.local_devices()) | self.train_batches.of_sources(self.current_step)
        self.metrics_tracker.update(row, self.current_step)
        self._judge.check(self.current_step, values)
        self._throughput.restart()

    def _log_eval_metrics(self, metrics: dict[str, float]) -> None:
        """Adds the evaluation to the current step's row, keeps the best model and the average, prints a sample."""
        self.metrics_tracker.update({f"eval/{n}": x for n, x in metrics.items() if n != "tokens"}, self.current_step)
        self._progress.line(f"step {self.current_step}: {describe_evaluation(metrics)}")
        if math.isfinite(metrics["loss"]) and (self.best_loss is None or metrics["loss"] < self.best_loss):
            self._save_best_model(metrics["loss"])
        if self.assembly.averages:
            self._replace_model("average_model", average=True)
        if self.config.training.sample_tokens:
            self._sample()
        self._throughput.restart()

    def _sample(self) -> None:
        training, options = self.config.training, {"temperature": 0.7, "top_k": 40, "seed": self.config.training.seed}
        text = self.generate_text(self.text.sample_prompt, max_new_tokens=training.sample_tokens, **options)
        text = describe_sample(self.text.sample_prompt, text)
        self._progress.line("\n".join(["sample:", *("    " + line for line in text.splitlines())]))
        self.metrics_tracker.write_text("sample", text, self.current_step)

    # ---------------------------------------------------------------- saving

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
            self._progress.line(f"{name} was NOT saved: {reason_of(error)}; the one before it stays")
            return False

    def _save_final_model(self) -> None:
        try:
            self.save_model(self.folder / "final_model")
        except SAVE_ERRORS as error:
            raise RunFailed(
                f"final_model was not saved: {reason_of(error)}; mend that, and start the same command again"
            ) from error

    def _saved_progress(self) -> SavedProgress:
        return SavedProgress(
            step=self.current_step,
            total_steps=self.total_steps,
            best_loss=self.best_loss,
            global_batch=self.resolved.global_batch,
            rows_taken=self.resolved.position(self.current_step),
            shards=self.assembly.layout.shards,
            anneal_row=self.resolved.anneal_row,
            **self._saved,
        )

    def save_checkpoint(self) -> None:
        """Saves everything needed to go on from the current step, in the background."""
        with self._watchdog.during("saving a checkpoint"):
            self.checkpoints.save(self.state, self.config, self.tokenizer, self._saved_progress())
        self._throughput.restart()

    # ---------------------------------------------------------------- what users call

    def evaluate(self) -> dict[str, float]:
        """`loss` in nats a token, `perplexity`, `bits_per_byte` and `tokens` over all of the validation text.

        With ema_decay also `average_loss`, `average_perplexity` and `average_bits_per_byte`, of the average.
        """
        with self._watchdog.during("evaluating"):
            return evaluate_state(self.assembly, self.state, self.resolved, self.text, self._watchdog)

    def save_model(self, path: str | os.PathLike[str], *, average: bool = False) -> None:
        """Writes a self-contained model folder that `load`, evaluate.py and generate.py open.

        `average`: the average of the parameters (ema_decay), not themselves.
        """
        params = self.assembly.average(self.state) if average else self.state.params
        with self._watchdog.during("saving a model"):
            save_model(Path(path), params, self.config, self.tokenizer, self._saved_progress())

    def generate_text(self, prompt: Prompt | Sequence[Prompt], **options: Any) -> Any:
        """`jaxlm.generation.api.generate_text` by the current parameters; a str where one prompt gets one text."""
        with self._watchdog.during("generating text"):
            model = nnx.merge(self.assembly.graphdef, self.assembly.to_whole(self.state.params))
            return generate_one_or_many(model, self.tokenizer, prompt, **options)

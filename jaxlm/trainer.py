"""A run, from configuration to final model, in the order in which things happen.

`Trainer(config)` does everything up to the first update; `train()` is the loop. Subclass it to add to a run:
`_log_metrics` and `_log_eval_metrics` may call `self.metrics_tracker.update(values, self.current_step)`. Or give it
hooks (`run.hooks`).
"""

import math
import os
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

import jax

from jaxlm.checkpoints import folder
from jaxlm.checkpoints.items import read_progress
from jaxlm.checkpoints.load import restore_state
from jaxlm.checkpoints.save import Checkpoints
from jaxlm.config import Config, check_steps, load_config
from jaxlm.data.handed_over import Dataset, handed_over
from jaxlm.data.loader import total_steps
from jaxlm.data.streaming import StreamedRows
from jaxlm.errors import RunFailed, UserError
from jaxlm.monitor.metrics import MetricsTracker, Throughput, memory_gib, model_flops_utilization
from jaxlm.monitor.profiling import Profiler
from jaxlm.monitor.progress import Progress
from jaxlm.monitor.sinks import Sink, make_sinks
from jaxlm.monitor.start_report import StartReport
from jaxlm.monitor.watchdog import OTHER_LIMIT, Watchdog
from jaxlm.ops.compiler import compiler_options
from jaxlm.parallel.processes import StopVote, barrier, is_leader, say, text_from_any_process
from jaxlm.report import write_report_of_run
from jaxlm.run.autotuning import kept_options
from jaxlm.run.begin import begin, resolve_here
from jaxlm.run.describe import describe_end, describe_finished, describe_run
from jaxlm.run.ending import Ending, stops_early
from jaxlm.run.feed import BatchFeeder, StopsWaiting
from jaxlm.run.hooks import Hook, Hooks
from jaxlm.run.judge import NumbersJudge
from jaxlm.run.models import AGAIN, RunModel
from jaxlm.run.probes import Probes
from jaxlm.run.result import Result
from jaxlm.run.resume import find_resume, is_finished, say_going_on
from jaxlm.run.setup import compile_steps, keep_compiled_programs
from jaxlm.train.assemble import Resolved, assemble
from jaxlm.train.evaluate import describe_evaluation
from jaxlm.train.numbers import at_rate
from jaxlm.train.own_loss import OwnLoss
from jaxlm.train.schedules import build_schedule


class Trainer(RunModel):
    """One run.

    A subclass may set `model_class` to a `Transformer` of its own, and override `_log_metrics` and `_log_eval_metrics`.

    Args:
      config: a configuration; or a file of one or the name of a shipped one, as `--config` takes it.
      fresh: moves what is in the run's folder aside first.
      sinks: get its rows beside those of report_to.
      hooks: are called as things happen.
      train_dataset, eval_dataset: the text, in place of what the configuration names (`data.handed_over`).
      compute_loss: the loss, in place of the cross entropy (`train.own_loss`).

    Raises:
      UserError: anything that the user can mend, before the first update.
    """

    def __init__(
        self,
        config: Config | Resolved | str | os.PathLike[str],
        *,
        fresh: bool = False,
        sinks: Sequence[Sink] = (),
        hooks: Sequence[Hook] = (),
        train_dataset: Dataset | None = None,
        eval_dataset: Dataset | None = None,
        compute_loss: OwnLoss | None = None,
    ) -> None:
        config = load_config(os.fspath(config)) if isinstance(config, str | os.PathLike) else config
        data = config.data if isinstance(config, Config) else config.config.data
        self._handed_over, self._own_loss = handed_over(data, train_dataset, eval_dataset), compute_loss
        self.resolved = resolve_here(config, self._handed_over, fresh)
        self._own_sinks, self._ending, self._begun = sinks, Ending(self.config.training), False
        self._watchdog, self._throughput = Watchdog(self.config.training.watchdog_seconds), Throughput()
        self._hooks = Hooks(hooks, self, self._watchdog)
        self.folder = Path(self.config.training.checkpoint_dir).expanduser()
        self._lock = folder.RunFolder(self.folder, fresh)
        with self._lock:  # a start that is refused leaves nothing behind
            keep_compiled_programs(self.resolved)
            checkpoint, self._found = find_resume(self.config, self.folder), folder.checkpoint_steps(self.folder)
            self._prepare_text(checkpoint)
            self._count_steps()
            self.finished = is_finished(self.config, self.folder, checkpoint, self.total_steps)
            self._assemble()
            self._make_state(checkpoint)
            self._report_start(checkpoint)

    # ---------------------------------------------------------------- what a run is made of

    def _prepare_text(self, checkpoint: Path | None) -> None:
        """Text, tokenizer and rows; fixes the vocabulary size and the micro-batches in the configuration."""
        begun = begin(self.resolved, checkpoint, self.model_class, self._own_loss, self._handed_over)
        self.resolved, self.text, self._pretrained, self._changed, self._saved = begun
        self.tokenizer = self.text.tokenizer

    def _count_steps(self) -> None:
        training, rows = self.config.training, sum(map(len, self.text.rows.parts.values()))
        self.total_steps = total_steps(training.num_epochs, rows, self.resolved.batches, training.max_steps)
        self.last_step = min(training.stop_at_step or self.total_steps, self.total_steps)
        check_steps(self.config, self.total_steps, self.last_step)
        self.schedule = build_schedule(training, self.total_steps)
        self._profiler = Profiler(training.profile_steps, self.folder / "logs", self.last_step)

    def _assemble(self) -> None:
        """The functions that will be compiled, and the numbers that they take."""
        platform = self.resolved.devices[0].platform
        options = compiler_options(self.config.training, platform, say)
        if self.config.training.keep_autotuning:
            options |= kept_options(self.folder, self.config.data, platform)
        self.assembly = assemble(self.resolved, self.model_class, options=options, own_loss=self._own_loss)
        self._numbers = self.assembly.numbers(self.config.training)

    def _make_state(self, checkpoint: Path | None) -> None:
        """A fresh state, one that starts from another model, or the one saved in `checkpoint`."""
        assembly, layout = self.assembly, self.assembly.layout
        self.best_loss, self.evaluations_since_best = None, 0
        if checkpoint is not None:
            self.state = restore_state(checkpoint, assembly.abstract_state, layout.shards)
            progress = read_progress(checkpoint)
            self.best_loss, self.evaluations_since_best = progress.best_loss, progress.evaluations_since_best
        elif self._pretrained is not None:
            params = self._pretrained.params(*assembly.base, layout.shards)
            self.state = assembly.state_with(params, self._numbers)
        else:
            self.state = assembly.init(self._numbers)
        self.current_step = int(self.state.step)
        if self._is_over():  # it stopped early: only its final model may be missing
            self.last_step = self.current_step

    def _report_start(self, checkpoint: Path | None) -> None:
        """What will run, in a few lines."""
        training = self.config.training
        about = self.resolved, self.assembly, self.state, self.text.rows, self.text.eval_rows, self.text.fingerprint
        self._start = StartReport(*about, self.total_steps, self.schedule, self._changed)
        for line in (*self.resolved.notes, *self._start.lines()):
            say(line)
        if self._pretrained is not None:
            say(f"parameters: those of {training.init_from} ({self._pretrained.kind})")
        if training.stop_at_step is not None and not self.finished:
            say(f"stopping at step {self.last_step}")
        if self.finished:
            say(describe_finished(self.folder, early=self.current_step < self.total_steps))
        elif checkpoint is not None:
            say_going_on(checkpoint, self.schedule, self.total_steps)

    # ---------------------------------------------------------------- the loop

    def train(self) -> Result:
        """Trains to the last step, evaluating, saving and logging on the way; a finished run returns at once.

        Raises:
          UserError: this or another Trainer of this process has trained in the folder since this one was made.
          Stopped: a signal, `stop` or training.max_time asked for it; the state is saved.
          Exception: whatever a hook has raised; the state is saved.
        """
        if self.finished:
            self._lock.release()
            return self._result()
        self._begin_once()
        training = self.config.training
        with ExitStack() as opened:
            opened.callback(self._lock.release)
            opened.callback(vars(self).update, _in_update=False)  # an error may end the run within one
            opened.enter_context(self._watchdog)
            with self._lock, self._watchdog.during("compiling the step"):  # so does one that is stopped here
                counts = self.resolved.batches.counts(range(self.current_step, self.last_step))
                self.train_step = compile_steps(self.assembly, counts, training.compiled_program)
            self._begin(opened)
            with self._ending.signals:
                stopping = False
                if training.eval_on_start and self.text.eval_rows and self.current_step == 0:
                    self._evaluate_and_log()
                    self.metrics_tracker.flush(0)
                for batch in self.train_batches:
                    numbers = at_rate(self._numbers, self.schedule(self.current_step))
                    self._probes.before_update(self.current_step + 1, self.state, batch, numbers)
                    with self._profiler.update(self.current_step + 1, self.state):
                        self.state, self.step_metrics = self.train_step(self.state, batch, numbers)
                    self.current_step += 1
                    self._in_update = True
                    # This and the next line wait for nothing.
                    self._profiler.stop_after(self.current_step, self.step_metrics)
                    self._judge.note(self.current_step, self.step_metrics)
                    self._hooks.call("on_update")
                    if self._due(training.logging_steps) or self.current_step == 1:
                        self._log_metrics(float(self.step_metrics["loss"]))
                        self._hooks.call("on_log", self.metrics_tracker.row(self.current_step))
                    if self.text.eval_rows and self._due(training.eval_steps):
                        self._evaluate_and_log()
                    stopping = self._stop_vote.agreed(self._ending.asked())  # what comes later: at the next update
                    last = stopping or self.current_step == self.last_step or self._is_over()
                    self._in_update = False
                    if last or self._due(training.save_steps) or self._save_asked:
                        self.save_checkpoint()
                    self.metrics_tracker.flush(self.current_step)
                    self._progress.advance(self.current_step)
                    if last:
                        break
                    self.train_batches.dispatched(self.current_step, self.step_metrics["loss"])
                if self.train_batches.given_up:
                    stopping = True
                    self.save_checkpoint()
                if not stopping and self._is_over():
                    self._save_final_model()
        return self._end(stopping)

    def _begin_once(self) -> None:
        elsewhere = jax.process_count() == 1 and folder.checkpoint_steps(self.folder) != self._found
        if self._begun or elsewhere:
            who = "this Trainer has trained" if self._begun else f"another Trainer has trained in {self.folder}"
            raise UserError(f"{who} already; make a new one with the same arguments, which goes on from there")
        self._begun = True
        self._lock.hold()  # another Trainer of this process may have let it go

    def stop(self, reason: str) -> None:
        """Ends the run as a signal would, after this update or, before the first one, after that; see `train`."""
        self._ending.stop(reason)

    def _evaluate_and_log(self) -> None:
        metrics = self.evaluate()
        self._log_eval_metrics(metrics)
        self._hooks.call("on_evaluate", metrics)
        self._throughput.restart()

    def _is_over(self) -> bool:
        """Whether no update is left to be made."""
        early = stops_early(self.config.training, self.evaluations_since_best)
        return early or self.current_step >= self.total_steps

    def _due(self, every: int) -> bool:
        return self.current_step % every == 0 or self.current_step == self.total_steps

    def _begin(self, opened: ExitStack) -> None:
        """Writes what describes the run and opens the sinks; `opened` closes everything."""
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
        about = self.config, self.assembly, self.total_steps, self.metrics_tracker, self._throughput, self._watchdog
        self._probes = Probes(*about, self._progress.line)
        self._watchdog.updated(self.current_step)
        judged = self.resolved, self.text.rows, self.state
        self._judge = NumbersJudge(*judged, self._progress.line, self.checkpoints.newest)
        self._stop_vote = StopVote(self.resolved.mesh, self._watchdog.alive)
        steps = range(self.current_step, self.last_step)
        self.train_batches = BatchFeeder(self.resolved, self.text.rows, steps, self._throughput, self._watchdog)
        if isinstance(self.text.rows, StreamedRows):
            self.text.rows.begin(self._progress.line, self._while_waiting)
            opened.callback(self.text.rows.end)
            self._watchdog.least = OTHER_LIMIT  # another process may wait for its shard, and this one for that process
        self._hooks.call("on_start")
        self._hooks.raise_error("nothing was trained since the start")
        if self.current_step:
            self.metrics_tracker.postpone(self.current_step)  # an earlier start has written this row
        self._throughput.restart()

    def _while_waiting(self) -> None:
        """Called while a row of a streamed text is waited for; several processes stop when it has come."""
        self._watchdog.alive()
        if jax.process_count() == 1 and not self._in_update and self._ending.asked():
            raise StopsWaiting

    def _write_report(self) -> None:
        write_report_of_run(self.folder, say)

    def _open_sinks(self) -> Sequence[Sink]:
        """Puts the run's folder into the state of the current step, and opens what is written on the way."""
        with folder.writing_to(self.folder):
            describe_run(self.folder, self.config, self.tokenizer, self._start, self.current_step)
            return [*make_sinks(self.config, self.folder, self.current_step), *self._own_sinks]

    def _end(self, stopping: bool) -> Result:
        """Says how it ended, when all processes have saved."""
        failed = text_from_any_process(self.checkpoints.failed)
        saved = "it is saved" if failed is None else f"that step was not saved ({failed})"
        going_on, result = f"{saved}, the same command goes on", self._result()
        stopped = self._ending.stopped(self.current_step, going_on) if stopping else None
        self._hooks.raise_error(going_on)
        if stopped is None:
            if failed is not None:
                raise RunFailed(f"checkpoint_{self.current_step} was not saved: {failed}; {AGAIN}")
            say(describe_end(result))
        self.finished = result.finished and stopped is None  # a signal may have come before the final model
        self._hooks.call("on_end", result)
        self._hooks.raise_error(going_on if stopped else "all is saved, and on_end is not called again")
        if stopped is not None:
            stopped.say()
            raise stopped
        return result

    def _result(self) -> Result:
        return Result(self.folder, self.current_step, self.total_steps, self._is_over())

    def _repr_html_(self) -> str:
        return self._result()._repr_html_()

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
            "train/skipped_steps": values["skipped"],
            "train/loss_scale": values["loss_scale"],
        }
        row |= {name: value for name, value in values.items() if name.startswith("train/")}  # of an own loss
        row |= memory_gib(jax.local_devices()) | self.train_batches.taken(self.current_step)
        self.metrics_tracker.update(row, self.current_step)
        self._judge.check(self.current_step, values)
        self._throughput.restart()

    def _log_eval_metrics(self, metrics: dict[str, float]) -> None:
        """Adds the evaluation to the current step's row, keeps the best model and the average, prints a sample."""
        self.metrics_tracker.update({f"eval/{n}": x for n, x in metrics.items() if n != "tokens"}, self.current_step)
        self._progress.line(f"step {self.current_step}: {describe_evaluation(metrics)}")
        self.evaluations_since_best += 1
        if math.isfinite(metrics["loss"]) and (self.best_loss is None or metrics["loss"] < self.best_loss):
            self.evaluations_since_best = 0
            self._save_best_model(metrics["loss"])
        if self.assembly.averages:
            self._replace_model("average_model", average=True)
        if self.config.training.sample_tokens:
            self._sample()

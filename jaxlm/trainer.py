"""A run, from configuration to final model, in the order in which things happen.

`Trainer(config)` does everything up to the first update; `train()` is the loop. Subclass it to add to a run:
`_log_metrics` and `_log_eval_metrics` may call `self.metrics_tracker.update(values, self.current_step)`.
"""

import dataclasses
import json
import math
import os
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx

from jaxlm.checkpoints import checkpoint, folder
from jaxlm.config import Config, changed_fields, resolved, to_dict, validate
from jaxlm.data.loader import Rows, documents_of_step, eval_batches, total_steps, train_batches
from jaxlm.data.packing import plan_cached
from jaxlm.data.tokenizer import Tokenizer
from jaxlm.data.tokens import cache_root, prepare, prepared_once
from jaxlm.errors import RunFailed, Stopped, UserError
from jaxlm.generation.api import answer, encode_prompts
from jaxlm.interop import deepspeed, pretrained
from jaxlm.model import Transformer
from jaxlm.monitor.anomalies import LossSpikes, SkippedUpdates
from jaxlm.monitor.histograms import make_histograms, named_histograms
from jaxlm.monitor.metrics import MetricsTracker, flops_per_token, memory_gib, model_flops_utilization
from jaxlm.monitor.profiling import Profiler
from jaxlm.monitor.progress import Progress
from jaxlm.monitor.signals import StopRequest
from jaxlm.monitor.sinks import Sink, check_report_to, make_sinks
from jaxlm.monitor.start import Start
from jaxlm.monitor.watchdog import Watchdog
from jaxlm.ops import compiler
from jaxlm.ops.attention_kernels import choose_attention, compute_capability, why_not_fused
from jaxlm.parallel import sharding
from jaxlm.parallel.processes import (
    StatusBoard,
    StopVote,
    barrier,
    check_same_everywhere,
    is_leader,
    say,
    told_by_any,
    training_devices,
)
from jaxlm.report import write_report_of_run
from jaxlm.run.evaluate import evaluate_rows
from jaxlm.train.optim import build_optimizer, build_schedule, check_optimizer
from jaxlm.train.precision import compute_dtype, scales_loss, scales_loss_dynamically
from jaxlm.train.step import (
    TrainState,
    TrainStep,
    compile_train_step,
    init_state,
    make_eval_step,
    make_train_step,
    state_from,
)

SHOWN_DOCUMENTS = 12  # of a skipped update
STEPS_AHEAD = 2  # updates dispatched before the oldest is waited for: the host stays ahead, a stop signal is not late


class Trainer:
    """One run. `fresh` moves what is in the run's folder aside first; `sinks` get its rows beside those of report_to.

    A subclass may set `model_class` to a `Transformer` of its own, and override `_log_metrics` and `_log_eval_metrics`.

    Raises:
      UserError: anything that the user can mend, before the first update.
    """

    model_class: type[Transformer] = Transformer

    def __init__(self, config: Config, *, fresh: bool = False, sinks: Sequence[Sink] = ()) -> None:
        self._own_sinks = sinks
        config = validate(pretrained.with_architecture(config, fresh))
        self.devices = training_devices(config.training)
        self.mesh = sharding.make_mesh(self.devices, sharding.mesh_shape(config, len(self.devices)))
        config, self._deepspeed_lines = deepspeed.apply(config, world=sharding.row_shards(self.mesh))
        config = validate(resolved(config))
        check_report_to(config.training.report_to)
        check_optimizer(config.training)
        self.folder = Path(config.training.checkpoint_dir).expanduser()
        self._lock = folder.open_folder(self.folder, fresh)
        resume_from = self._find_resume(config)
        self._pretrained = pretrained.open_pretrained(config) if resume_from is None else None
        jax.config.update("jax_compilation_cache_dir", str(cache_root(config.data) / "compiled"))
        if self.devices[0].platform == "gpu" and config.training.deterministic:  # each program, as it was autotuned
            jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)

        self._prepare_data(config, resume_from)
        self._divide_batch(resume_from)
        self._profiler = Profiler(config.training.profile_steps, self.folder / "logs", self.last_step)
        self._check_same_processes()
        if resume_from is not None:
            self._check_same_run(config, resume_from)
        self.finished = self._is_finished(resume_from)
        self._watchdog = Watchdog(self.config.training.watchdog_seconds, StatusBoard())
        self._build_model()
        self._build_state(resume_from)
        self._start_report(resume_from)

    # ---------------------------------------------------------------- what a run is made of

    def _find_resume(self, config: Config) -> Path | None:
        """The checkpoint to go on from: the one named, else the newest of the run in this folder."""
        if is_leader():
            folder.clean(self.folder)
        barrier("put the folder in order")
        named = config.training.resume_from_checkpoint
        if named is not None:
            return folder.find_checkpoint(named, self.folder, say)
        return folder.newest_intact(self.folder, say)

    def _prepare_data(self, config: Config, resume_from: Path | None) -> None:
        """Text -> tokenizer -> token arrays -> rows; fixes the vocabulary size in the configuration."""
        data = config.data
        if resume_from is not None:
            tokenizer: Tokenizer | None = checkpoint.read_tokenizer(resume_from)
        else:
            tokenizer = None if self._pretrained is None else self._pretrained.tokenizer
        with prepared_once(data):
            prepared = prepare(data, config.model.vocab_size, tokenizer, say)
        self.tokenizer, self.data_fingerprint = prepared.tokenizer, prepared.source_fingerprint
        self.requested_vocab_size = config.model.vocab_size
        # A model that was trained elsewhere may have more rows than there are tokens; it keeps them.
        vocab_size = self.tokenizer.vocab_size if config.training.init_from is None else config.model.vocab_size
        self.config = dataclasses.replace(config, model=dataclasses.replace(config.model, vocab_size=vocab_size))
        if config.training.sample_tokens:
            window = config.model.max_seq_len
            encode_prompts(self.tokenizer, [config.training.sample_prompt], window, "training.sample_prompt")
        plan = partial(
            plan_cached,
            max_length=data.max_length,
            min_length=data.min_length,
            strategy=data.packing_strategy,
            pack=data.pack_sequences,
            report=say,
        )
        with prepared_once(data):
            self.rows = Rows(prepared.train, plan(prepared.train), data.max_length)
            self.eval_rows = Rows(prepared.validation, plan(prepared.validation), data.max_length)
        self.eval_bytes = prepared.validation.kept_bytes(data.min_length)

    def _divide_batch(self, resume_from: Path | None) -> None:
        """Rows an update, micro-batches and updates; a checkpoint's rows an update are kept on any devices."""
        training = self.config.training
        micro_batch = training.batch_size * sharding.row_shards(self.mesh)
        self.global_batch = micro_batch * training.gradient_accumulation_steps
        if resume_from is not None:
            kept = checkpoint.read_progress(resume_from).global_batch
            if kept % micro_batch:
                raise UserError(
                    f"training.batch_size ({training.batch_size}) x {self._shown_shards()} must "
                    f"divide the {kept} rows an update of {resume_from}; change it, or the number of devices"
                )
            if kept != self.global_batch:
                k = kept // micro_batch
                say(
                    f"training.gradient_accumulation_steps: {k} instead of {training.gradient_accumulation_steps}, "
                    f"for the {kept} rows an update of {resume_from}"
                )
                training = dataclasses.replace(training, gradient_accumulation_steps=k)
                self.config, self.global_batch = dataclasses.replace(self.config, training=training), kept
        self.total_steps = total_steps(training.num_epochs, len(self.rows), self.global_batch, training.max_steps)
        stop = self.total_steps if training.stop_at_step is None else training.stop_at_step
        self.last_step = min(stop, self.total_steps)

    def _shown_shards(self) -> str:
        """What a micro-batch's rows are split over."""
        tensor = self.config.training.tensor_parallel
        groups = sharding.row_shards(self.mesh)
        return f"{groups} groups of {tensor} devices" if tensor > 1 else f"{groups} device(s)"

    def _check_same_processes(self) -> None:
        """Refuses processes that were started with other options or other text; caches may be elsewhere."""
        data = dataclasses.replace(self.config.data, cache_dir=None)
        config = to_dict(dataclasses.replace(self.config, data=data))
        check_same_everywhere("the configuration or the text", json.dumps([config, self.data_fingerprint]))

    def _check_same_run(self, config: Config, resume_from: Path) -> None:
        """Refuses to go on with another configuration or other text than the checkpoint's."""
        progress, saved = checkpoint.read_progress(resume_from), checkpoint.read_config(resume_from)
        changes = changed_fields(saved, self.config)
        if config.model.vocab_size not in (progress.requested_vocab_size, saved.model.vocab_size):
            changes["model.vocab_size"] = (progress.requested_vocab_size, config.model.vocab_size)
        if progress.model_class != self.model_class.__name__:
            changes["the model's class"] = (progress.model_class, self.model_class.__name__)
        if changes:
            shown = "; ".join(f"{name} was {_shown(old)}, is {_shown(new)}" for name, (old, new) in changes.items())
            raise UserError(
                f"{resume_from} was trained with another configuration: {shown}. Set it back, name another "
                "--training.checkpoint_dir, or start over with --fresh (the old folder is kept)"
            )
        if progress.data_fingerprint != self.data_fingerprint:
            raise UserError(
                f"data: the text is not the one that {resume_from} was trained on; "
                "restore it, or start over with --fresh (the old folder is kept)"
            )

    def _is_finished(self, resume_from: Path | None) -> bool:
        """Whether this run has nothing left to do."""
        final = self.folder / "final_model"
        return (
            resume_from is not None
            and self.config.training.resume_from_checkpoint in (None, "latest")
            and checkpoint.read_progress(resume_from).step >= self.total_steps
            and folder.is_intact(final)
            and checkpoint.read_progress(final).step >= self.total_steps
        )

    def _build_model(self) -> None:
        """Abstract model and state, where they live, and the functions that will be compiled."""
        config, training = self.config, self.config.training
        self.attention = choose_attention(config, compute_capability(self.devices[0]))
        dtype = compute_dtype(training)

        def make() -> Transformer:
            rngs = nnx.Rngs(training.seed)
            return self.model_class(config.model, implementation=self.attention, dtype=dtype, rngs=rngs)

        self.graphdef, abstract_model = nnx.split(nnx.eval_shape(make))
        params = nnx.to_pure_dict(abstract_model)
        self.parameters = sum(math.prod(x.shape) for x in jax.tree.leaves(params))
        self.layout = sharding.Layout(self.mesh, training.zero_stage or 0, params, training.offload_optimizer)
        init = lambda: init_state(make(), build_optimizer(training, self.layout.shapes), config, self.layout)  # noqa: E731
        self.abstract_state = self.layout.place(jax.eval_shape(init))
        self._init = jax.jit(init, out_shardings=jax.tree.map(lambda x: x.sharding, self.abstract_state))
        self.schedule = build_schedule(training, self.total_steps)
        self._compiler_options = compiler.compiler_options(training, self.layout.platform, say)
        eval_step = make_eval_step(self.graphdef, config, self.layout)
        self._eval_step = jax.jit(eval_step, compiler_options=self._compiler_options)
        self._whole = jax.jit(self.layout.to_whole, out_shardings=sharding.replicated(self.mesh))

    def _build_state(self, resume_from: Path | None) -> None:
        """A fresh state, one that starts from another model, or the one saved in `resume_from`."""
        self.best_loss: float | None = None
        if self._pretrained is not None:
            self.state: TrainState = self._state_from(self._pretrained)
        elif resume_from is None:
            self.state = self._init()
        else:
            self.state = checkpoint.restore_state(resume_from, self.abstract_state, self.layout.shards)
            self.best_loss = checkpoint.read_progress(resume_from).best_loss
        self.start_step = self.current_step = int(self.state.step)

    def _state_from(self, source: pretrained.Pretrained) -> TrainState:
        """The state before the first update, with parameters from elsewhere."""
        abstract, training = self.abstract_state, self.config.training
        params = source.params(self.layout.shapes, abstract.params, self.layout.shards)
        optimizer = build_optimizer(training, self.layout.shapes)
        make = lambda params: state_from(params, optimizer, self.config, self.layout)  # noqa: E731
        placement = jax.tree.map(lambda x: x.sharding, abstract)
        return jax.jit(make, out_shardings=placement, donate_argnums=0)(params)

    def _start_report(self, resume_from: Path | None) -> None:
        """What will run, in a few lines."""
        training = self.config.training
        self._start = Start(
            config=self.config,
            devices=self.devices,
            layout=self.layout.describe(),
            attention=self.attention,
            not_fused=why_not_fused(self.config, compute_capability(self.devices[0])),
            compiler=compiler.describe(training, self._compiler_options) if self.layout.platform == "gpu" else None,
            parameters=self.parameters,
            bytes_of_state=self.layout.bytes_of_state(self.abstract_state),
            loss_scale=float(self.state.loss_scale.scale) if scales_loss(training) else None,
            rows=self.rows,
            eval_rows=self.eval_rows,
            data_fingerprint=self.data_fingerprint,
            row_shards=self._shown_shards(),
            global_batch=self.global_batch,
            step=self.current_step,
            total_steps=self.total_steps,
            schedule=self.schedule,
        )
        for line in (*self._deepspeed_lines, *self._start.lines()):
            say(line)
        if self._pretrained is not None:
            say(f"parameters: those of {training.init_from} ({self._pretrained.kind})")
        if training.stop_at_step is not None:
            say(f"stopping at step {self.last_step}")
        if self.finished:
            say(f"this run is finished: {self.folder / 'final_model'} (--fresh starts it over)")
        elif resume_from is not None:
            say(f"resuming from {resume_from} at step {self.current_step}")

    # ---------------------------------------------------------------- the loop

    def train(self) -> None:
        """Trains to the last step, evaluating, saving and logging on the way; a finished run returns at once.

        Raises:
          Stopped: a signal asked for it; the state is saved.
        """
        if self.finished:
            self._lock.release(force=True)
            return
        training = self.config.training
        with ExitStack() as opened:
            opened.callback(self._lock.release, force=True)
            opened.enter_context(self._watchdog)
            self._begin(opened)
            with StopRequest() as stop:
                stopping = False
                for batch in self._train_batches():
                    with self._profiler.update(self.current_step + 1, self.state):
                        self.state, self.step_metrics = self.train_step(self.state, batch)
                    self.current_step += 1
                    self._profiler.stop_after(self.current_step, self.step_metrics)
                    self._skipped.note(self.current_step, self.step_metrics["skipped"])
                    if self._due(training.logging_steps) or self.current_step == 1:
                        self._log_metrics(float(self.step_metrics["loss"]))
                    if self._due(training.eval_steps):
                        self._log_eval_metrics(self.evaluate())
                    stopping = self._stop_agreed(stop)  # asked once: a later signal waits for the next update's save
                    if self._due(training.save_steps) or self.current_step == self.last_step or stopping:
                        self.save_checkpoint()
                    self.metrics_tracker.flush(self.current_step)
                    self._progress.advance(self.current_step)
                    if stopping:
                        break
                if not stopping and self.current_step >= self.total_steps:
                    self._save_final_model()
        self._end(stop, stopping)

    def _stop_agreed(self, stop: StopRequest) -> bool:
        """Whether to stop here: as soon as a signal came, or when all processes know that one of them got one."""
        if jax.process_count() == 1:
            return stop.signal is not None
        self._watchdog.alive()  # before this waits for a process that never comes here
        self._votes.append(self._vote.cast(stop.signal is not None))
        return len(self._votes) > STEPS_AHEAD and bool(self._votes.pop(0))

    def _due(self, every: int) -> bool:
        return self.current_step % every == 0 or self.current_step == self.total_steps

    def _begin(self, opened: ExitStack) -> None:
        """Writes what describes the run, opens the sinks and compiles the step; `opened` closes everything."""
        opened.callback(self._write_report)  # called last
        self._progress = Progress(self.current_step, self.last_step, shown=is_leader())
        self.metrics_tracker = MetricsTracker([*(self._open_log() if is_leader() else []), self._progress])
        opened.callback(self.metrics_tracker.close)
        opened.callback(self._profiler.close)
        barrier("prepared the folder")
        self.checkpoints = checkpoint.Checkpoints(self.folder, self.config.training.save_total_limit, say)
        opened.callback(self.checkpoints.close)  # which waits for the saves
        with self._watchdog.during("compiling the step"):
            started = time.perf_counter()
            step = make_train_step(self.graphdef, self.config, self.schedule, self.layout)
            abstract = self.abstract_state, self._abstract_batch()
            self.train_step = compile_train_step(step, *abstract, self._compiler_options)
            say(f"compiled the step in {time.perf_counter() - started:.1f} s")
        every = self.config.training.histogram_steps
        if every is not None:
            self.train_step = self._showing_histograms(self.train_step, every)
        self._watchdog.updated(self.current_step)
        self._skipped = SkippedUpdates(int(self.state.skipped))
        self._exhausted = int(self.state.loss_scale.exhausted)
        self._spikes = LossSpikes()
        self._vote = StopVote(self.mesh)
        self._votes: list[jax.Array] = []
        self._restart_clock()

    def _open_log(self) -> list[Sink]:
        """Puts the run's folder into the state of the current step, and opens what is written on the way."""
        try:
            for path in folder.move_later_aside(self.folder, self.current_step):
                say(f"moved aside: {path.name}, later than step {self.current_step}")
            self.tokenizer.save(self.folder / "tokenizer")
            config_text = json.dumps(to_dict(self.config), indent=2) + "\n"
            (self.folder / "config.json").write_text(config_text, encoding="utf-8")
            self._start.append_to(self.folder)
            return [*make_sinks(self.config, self.folder, self.current_step), *self._own_sinks]
        except OSError as error:
            raise folder.not_writable(self.folder, error) from error

    def _write_report(self) -> None:
        if is_leader():
            with self._watchdog.during("writing the report"):
                write_report_of_run(self.folder, say)

    def _end(self, stop: StopRequest, stopping: bool) -> None:
        """Says how it ended, when all processes have saved."""
        failed = told_by_any(self.checkpoints.failed)
        if stopping:
            name = stop.signal.name if stop.signal is not None else "a signal to another process"
            saved = "it is saved" if failed is None else f"that step was not saved ({failed})"
            raise Stopped(f"{name} at step {self.current_step}; {saved}, the same command goes on")
        if failed is not None:
            raise RunFailed(
                f"checkpoint_{self.current_step} was not saved: {failed}; mend that, and start the same command again"
            )
        if self.current_step < self.total_steps:
            say(f"stopped at step {self.current_step} of {self.total_steps} as asked; saved in {self.folder}")
        else:
            say(f"finished: {self.folder / 'final_model'}, best validation loss in {self.folder / 'best_model'}")

    def _abstract_batch(self) -> dict[str, jax.ShapeDtypeStruct]:
        k = self.config.training.gradient_accumulation_steps
        row = (k, self.global_batch // k)
        placement = sharding.train_batch_sharding(self.mesh)
        of = lambda *shape: jax.ShapeDtypeStruct(shape, np.int32, sharding=placement)  # noqa: E731
        names = ("tokens", "targets", "segments", "positions")
        return dict.fromkeys(names, of(*row, self.config.data.max_length)) | {"rows": of(*row)}

    def _train_batches(self) -> Iterator[dict[str, jax.Array]]:
        """The batches from the current step to the last one, on the devices."""
        k = self.config.training.gradient_accumulation_steps
        own = sharding.own_rows(self.mesh, self.global_batch // k)
        host_batches = train_batches(self.rows, self.config.training.seed, self.global_batch, k, self.current_step, own)
        placement = sharding.train_batch_sharding(self.mesh)
        in_flight: list[jax.Array] = []
        try:
            for _ in range(self.current_step, self.last_step):
                batch = next(host_batches)
                # Of this process; the others' rows are as full.
                self._tokens_since_log += int(
                    np.count_nonzero(batch["segments"]) * self.global_batch / batch["rows"].size
                )
                yield sharding.put(batch, placement)
                in_flight.append(self.step_metrics["loss"])
                if len(in_flight) > STEPS_AHEAD:
                    in_flight.pop(0).block_until_ready()
                    self._watchdog.updated(self.current_step - STEPS_AHEAD)
        finally:
            host_batches.close()

    # ---------------------------------------------------------------- logging

    def _restart_clock(self) -> None:
        self._clock, self._tokens_since_log = time.perf_counter(), 0

    def _log_metrics(self, loss: float) -> None:
        """Adds the training metrics to the current step's row; reading them waits for the device."""
        values = {name: float(value) for name, value in self.step_metrics.items()}
        rate = self._tokens_since_log / (time.perf_counter() - self._clock)
        model = self.config.model
        flops = flops_per_token(self.parameters, model.n_layers, self.config.data.max_length, model.d_model)
        self.metrics_tracker.update(
            {
                "train/loss": loss,
                "train/learning_rate": values["learning_rate"],
                "train/grad_norm": values["grad_norm"],
                "train/tokens_per_second": rate,
                "train/mfu": model_flops_utilization(rate, flops, self.devices[0].device_kind, len(self.devices)),
                "train/epoch": self.current_step * self.global_batch / len(self.rows),
                "train/skipped_steps": values["skipped"],
                "train/loss_scale": values["loss_scale"],
            }
            | memory_gib(jax.local_devices()),
            self.current_step,
        )
        self._check_numbers(values)
        self._restart_clock()

    def _showing_histograms(self, step: TrainStep, every: int) -> TrainStep:
        """The update, with histograms of what it changes and by what, `every` so many and at the last one."""
        histograms = jax.jit(
            make_histograms(self.graphdef, self.config, self.layout), out_shardings=sharding.replicated(self.mesh)
        )

        def train_step(state: TrainState, batch: dict[str, jax.Array]) -> Any:
            number = self.current_step + 1
            if number % every == 0 or number == self.total_steps:
                jax.block_until_ready(state.step)
                started = time.perf_counter()
                with self._watchdog.during("computing histograms"):
                    for name, histogram in named_histograms(histograms(state, batch)):
                        self.metrics_tracker.write_histogram(name, histogram, number)
                self._clock += time.perf_counter() - started
            return step(state, batch)

        return train_step

    def _check_numbers(self, values: dict[str, float]) -> None:
        """Says what is wrong with the updates since the last log, and ends a run that only skips.

        Raises:
          RunFailed: float16 has no smaller scale to try, or too many updates in a row were skipped.
        """
        training = self.config.training
        spike = self._spikes.look(values["loss"])
        if spike is not None:
            self._progress.line(f"step {self.current_step}: {spike}")
        for step in self._skipped.read():
            documents = documents_of_step(self.rows, training.seed, self.global_batch, step - 1)
            shown = ", ".join(map(str, documents[:SHOWN_DOCUMENTS])) + ", ..." * (len(documents) > SHOWN_DOCUMENTS)
            self._progress.line(
                f"step {step}: skipped, its loss or gradient is not finite; it was to learn from documents {shown} "
                f"({len(documents)}, numbered from 0) of the training text"
            )
        self._check_skips(values)

    def _check_skips(self, values: dict[str, float]) -> None:
        training = self.config.training
        if scales_loss_dynamically(training):
            if values["scale_exhausted"] <= self._exhausted:
                return
            what = f"float16 overflows at the lowest loss scale ({values['loss_scale']:g})"
            cure = "training.amp_dtype bfloat16, or a lower training.learning_rate"
        else:
            if self._skipped.in_a_row <= training.max_skipped_steps:
                return
            limit = f"training.max_skipped_steps {training.max_skipped_steps}"
            what = f"{self._skipped.in_a_row} updates in a row were not finite ({limit})"
            cure = "a lower training.loss_scale, or 0" if scales_loss(training) else "a lower training.learning_rate"
        self.checkpoints.wait()
        saved = list(folder.checkpoint_steps(self.folder).values())
        last = f"the last checkpoint is {saved[-1]}" if saved else "nothing was saved yet"
        raise RunFailed(f"step {self.current_step}: {what}; {last}. Start over with {cure}, and --fresh")

    def _log_eval_metrics(self, metrics: dict[str, float]) -> None:
        """Adds the evaluation to the current step's row, keeps the best model, prints a sample."""
        names = ("loss", "perplexity", "bits_per_byte")
        self.metrics_tracker.update({f"eval/{name}": metrics[name] for name in names}, self.current_step)
        self._progress.line(
            f"step {self.current_step}: validation loss {metrics['loss']:.4f}, perplexity {metrics['perplexity']:.2f}, "
            f"{metrics['bits_per_byte']:.4f} bits per byte"
        )
        if math.isfinite(metrics["loss"]) and (self.best_loss is None or metrics["loss"] < self.best_loss):
            self._save_best_model(metrics["loss"])
        if self.config.training.sample_tokens:
            self._sample()
        self._restart_clock()

    def _save_best_model(self, loss: float) -> None:
        before, self.best_loss = self.best_loss, loss
        try:
            self.save_model(self.folder / "best_model")
        except checkpoint.SAVE_ERRORS as error:
            self.best_loss = before  # the next one that is better is saved
            self._progress.line(f"best_model was NOT saved: {checkpoint.reason_of(error)}; the one before it stays")

    def _save_final_model(self) -> None:
        try:
            self.save_model(self.folder / "final_model")
        except checkpoint.SAVE_ERRORS as error:
            reason = checkpoint.reason_of(error)
            raise RunFailed(
                f"final_model was not saved: {reason}; mend that, and start the same command again"
            ) from error

    def _sample(self) -> None:
        training = self.config.training
        options = {"temperature": 0.7, "top_k": 40, "seed": training.seed}
        text = self.generate_text(training.sample_prompt, max_new_tokens=training.sample_tokens, **options)
        self._progress.line("\n".join(["sample:", *("    " + line for line in text.splitlines())]))
        self.metrics_tracker.write_text("sample", text, self.current_step)

    # ---------------------------------------------------------------- what users call

    def evaluate(self) -> dict[str, float]:
        """`loss` in nats a token, `perplexity`, `bits_per_byte` and `tokens` over all of the validation text."""
        batch_size = self.config.training.batch_size * sharding.row_shards(self.mesh)
        placement = sharding.eval_batch_sharding(self.mesh)
        host_batches = eval_batches(self.eval_rows, batch_size, sharding.own_rows(self.mesh, batch_size))

        def batches() -> Iterator[dict[str, jax.Array]]:
            for batch in host_batches:
                yield sharding.put(batch, placement)
                self._watchdog.alive()

        with self._watchdog.during("evaluating"):
            return evaluate_rows(self._eval_step, self.state.params, batches(), self.eval_bytes)

    def _saved_progress(self) -> checkpoint.Progress:
        return checkpoint.Progress(
            step=self.current_step,
            total_steps=self.total_steps,
            best_loss=self.best_loss,
            requested_vocab_size=self.requested_vocab_size,
            data_fingerprint=self.data_fingerprint,
            global_batch=self.global_batch,
            model_class=self.model_class.__name__,
            shards=self.layout.shards,
        )

    def save_checkpoint(self) -> None:
        """Saves everything needed to go on from the current step, in the background."""
        with self._watchdog.during("saving a checkpoint"):
            self.checkpoints.save(self.state, self.config, self.tokenizer, self._saved_progress())
        self._restart_clock()

    def save_model(self, path: str | os.PathLike[str]) -> None:
        """Writes a self-contained model folder that `load`, evaluate.py and generate.py open."""
        with self._watchdog.during("saving a model"):
            checkpoint.save_model(Path(path), self.state.params, self.config, self.tokenizer, self._saved_progress())

    def generate_text(self, prompt: str | Sequence[str], **options: Any) -> Any:
        """`prompt` and a continuation by the current parameters; options as in `jaxlm.generation.api.generate_text`.

        Returns:
          A str; a list of str for a list of prompts, or for several samples of one.
        """
        with self._watchdog.during("generating text"):
            model = nnx.merge(self.graphdef, self._whole(self.state.params))
            return answer(model, self.tokenizer, prompt, **options)


def _shown(value: Any) -> str:
    return json.dumps(value)

"""A run, from configuration to final model, in the order in which things happen.

`Trainer(config)` does everything up to the first update; `train()` is the loop. Subclass it to add to a run:
`_log_metrics` and `_log_eval_metrics` may call `self.metrics_tracker.update(values, self.current_step)`.
"""

import dataclasses
import json
import math
import os
import sys
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx

from jaxlm import checkpoint, sharding
from jaxlm.config import Config, changed_fields, to_dict, validate
from jaxlm.data.loader import Rows, eval_batches, total_steps, train_batches
from jaxlm.data.packing import plan_cached
from jaxlm.data.tokens import cache_root, prepare
from jaxlm.distributed import training_devices
from jaxlm.errors import Stopped, UserError
from jaxlm.evaluate import evaluate_rows
from jaxlm.generate import generate_text
from jaxlm.metrics import (
    MetricsTracker,
    Progress,
    TensorBoard,
    check_report_to,
    flops_per_token,
    make_sinks,
    model_flops_utilization,
)
from jaxlm.model import Transformer
from jaxlm.model.attention import choose_attention
from jaxlm.optim import build_optimizer, build_schedule, effective_warmup
from jaxlm.precision import compute_dtype
from jaxlm.signals import StopRequest
from jaxlm.step import TrainState, init_state, make_eval_step, make_train_step

STEPS_AHEAD = 2  # updates dispatched before the oldest is waited for: the host stays ahead, a stop signal is not late


def say(text: str) -> None:
    """A line of the start-up report, on stderr."""
    print(text, file=sys.stderr, flush=True)


class Trainer:
    """One run. `fresh` moves what is in the run's folder aside first.

    Raises:
      UserError: anything that the user can mend, before the first update.
    """

    def __init__(self, config: Config, *, fresh: bool = False) -> None:
        config = validate(config)
        check_report_to(config.training.report_to)
        self.devices = training_devices(config.training)
        self.folder = _open_folder(Path(config.training.checkpoint_dir).expanduser(), fresh)
        resume_from = self._find_resume(config)
        jax.config.update("jax_compilation_cache_dir", str(cache_root(config.data) / "compiled"))

        self._prepare_data(config, resume_from)
        if resume_from is not None:
            self._check_same_run(config, resume_from)
        self.finished = self._is_finished(resume_from)
        self._build_model()
        self._build_state(resume_from)
        self._start_report(resume_from)

    # ---------------------------------------------------------------- what a run is made of

    def _find_resume(self, config: Config) -> Path | None:
        """The checkpoint to go on from: the one named, else the newest of the run in this folder."""
        for name in ("best_model", "final_model"):
            checkpoint.recover_model(self.folder / name)
        if config.training.resume_from_checkpoint is not None:
            return checkpoint.find_checkpoint(config.training.resume_from_checkpoint, self.folder)
        steps = checkpoint.checkpoint_steps(self.folder)
        return steps[max(steps)] if steps else None

    def _prepare_data(self, config: Config, resume_from: Path | None) -> None:
        """Text -> tokenizer -> token arrays -> rows; fixes the vocabulary size in the configuration."""
        data, training = config.data, config.training
        tokenizer = None if resume_from is None else checkpoint.read_tokenizer(resume_from)
        prepared = prepare(data, config.model.vocab_size, tokenizer, say)
        self.tokenizer, self.data_fingerprint = prepared.tokenizer, prepared.source_fingerprint
        self.requested_vocab_size = config.model.vocab_size
        self.config = dataclasses.replace(
            config, model=dataclasses.replace(config.model, vocab_size=self.tokenizer.vocab_size)
        )
        plan = partial(
            plan_cached,
            max_length=data.max_length,
            min_length=data.min_length,
            strategy=data.packing_strategy,
            pack=data.pack_sequences,
            report=say,
        )
        self.rows = Rows(prepared.train, plan(prepared.train), data.max_length)
        self.eval_rows = Rows(prepared.validation, plan(prepared.validation), data.max_length)
        self.eval_bytes = prepared.validation.kept_bytes(data.min_length)
        self.global_batch = training.batch_size * len(self.devices) * training.gradient_accumulation_steps
        self.total_steps = total_steps(training.num_epochs, len(self.rows), self.global_batch, training.max_steps)
        stop = self.total_steps if training.stop_at_step is None else training.stop_at_step
        self.last_step = min(stop, self.total_steps)

    def _check_same_run(self, config: Config, resume_from: Path) -> None:
        """Refuses to go on with another configuration or other text than the checkpoint's."""
        progress, saved = checkpoint.read_progress(resume_from), checkpoint.read_config(resume_from)
        changes = changed_fields(saved, self.config)
        if config.model.vocab_size not in (progress.requested_vocab_size, saved.model.vocab_size):
            changes["model.vocab_size"] = (progress.requested_vocab_size, config.model.vocab_size)
        if changes:
            shown = "; ".join(f"{name} was {_shown(old)}, is {_shown(new)}" for name, (old, new) in changes.items())
            raise UserError(
                f"{resume_from} was trained with another configuration: {shown}. Set it back, name another "
                "--training.checkpoint_dir, or start over with --fresh (the old folder is kept)"
            )
        if progress.global_batch != self.global_batch:
            raise UserError(
                f"training.batch_size x devices x training.gradient_accumulation_steps ({self.global_batch}) "
                f"must stay at the {progress.global_batch} rows an update of {resume_from}; change one of the two"
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
            and final.is_dir()
            and checkpoint.read_progress(final).step >= self.total_steps
        )

    def _build_model(self) -> None:
        """Abstract model and state, their shardings, and the functions that will be compiled."""
        config = self.config
        self.attention = choose_attention(config.model, config.training, config.data, self.devices[0].platform)
        self.mesh = sharding.make_mesh(self.devices)
        self.replicated = sharding.replicated(self.mesh)
        dtype = compute_dtype(config.training)

        def make() -> Transformer:
            rngs = nnx.Rngs(config.training.seed)
            return Transformer(config.model, implementation=self.attention, dtype=dtype, rngs=rngs)

        self.graphdef = nnx.graphdef(nnx.eval_shape(make))
        self._init = jax.jit(
            lambda: init_state(make(), build_optimizer(config.training)), out_shardings=self.replicated
        )
        self.abstract_state = sharding.with_sharding(jax.eval_shape(self._init), self.replicated)
        self.parameters = sum(math.prod(x.shape) for x in jax.tree.leaves(self.abstract_state.params))
        self.schedule = build_schedule(config.training, self.total_steps)
        self._eval_step = jax.jit(make_eval_step(self.graphdef, config))

    def _build_state(self, resume_from: Path | None) -> None:
        """A fresh state, or the one saved in `resume_from`."""
        self.best_loss: float | None = None
        if resume_from is None:
            self.state: TrainState = self._init()
        else:
            self.state = checkpoint.restore_state(resume_from, self.abstract_state)
            self.best_loss = checkpoint.read_progress(resume_from).best_loss
        self.start_step = self.current_step = int(self.state.step)

    def _start_report(self, resume_from: Path | None) -> None:
        """What will run, in a few lines."""
        model, training = self.config.model, self.config.training
        device = f"{len(self.devices)} x {self.devices[0].device_kind} ({self.devices[0].platform})"
        state_bytes = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(self.abstract_state))
        gradient_bytes = 4 * self.parameters
        layers = "scanned" if model.scan_layers else "unrolled"
        remat = f"recomputed ({model.remat_policy})" if model.gradient_checkpointing else "kept"
        warmup = effective_warmup(training, self.total_steps)
        say(f"model: {self.parameters:,} parameters, vocabulary {model.vocab_size:,}")
        say(f"layers: {layers}, activations {remat}")
        say(f"devices: {device}, data parallel, mesh {dict(self.mesh.shape)}, ZeRO stage 0 (replicated)")
        say(f"precision: float32 parameters, {compute_dtype(training)} compute")
        say(f"kernels: {self.attention} attention, chunked cross entropy")
        say(
            f"memory: {(state_bytes + gradient_bytes) / 2**20:,.0f} MiB a device of parameters, optimizer and gradients"
        )
        say(
            f"batch: {training.batch_size} rows x {len(self.devices)} devices x {training.gradient_accumulation_steps} "
            f"micro-batches = {self.global_batch} rows, {self.global_batch * self.config.data.max_length:,} tokens"
        )
        say(
            f"steps: {self.total_steps:,} ({self.total_steps * self.global_batch / len(self.rows):.2f} epochs), "
            f"{training.lr_scheduler} schedule, {warmup} of warm-up"
        )
        if warmup < training.warmup_steps:
            say(f"training.warmup_steps ({training.warmup_steps}) exceeds a tenth of the run: shortened to {warmup}")
        if self.config.training.stop_at_step is not None:
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
            return
        training = self.config.training
        self._begin()
        with StopRequest() as stop:
            for batch in self._train_batches():
                self.state, self.step_metrics = self.train_step(self.state, batch)
                self.current_step += 1
                if self._due(training.logging_steps) or self.current_step == 1:
                    self._log_metrics(float(self.step_metrics["loss"]))
                if self._due(training.eval_steps):
                    self._log_eval_metrics(self.evaluate())
                stopping = stop.signal is not None  # looked at once: a later signal waits for the next update's save
                if self._due(training.save_steps) or self.current_step == self.last_step or stopping:
                    self.save_checkpoint()
                self.metrics_tracker.flush(self.current_step)
                self._progress.advance(self.current_step)
                if stopping:
                    break
            self._end(stop)

    def _due(self, every: int) -> bool:
        return self.current_step % every == 0 or self.current_step == self.total_steps

    def _begin(self) -> None:
        """Writes what describes the run, opens the sinks and compiles the step."""
        for path in checkpoint.move_later_aside(self.folder, self.current_step):
            say(f"moved aside: {path.name}, later than step {self.current_step}")
        self.tokenizer.save(self.folder / "tokenizer")
        (self.folder / "config.json").write_text(json.dumps(to_dict(self.config), indent=2) + "\n", encoding="utf-8")
        self.checkpoints = checkpoint.Checkpoints(self.folder, self.config.training.save_total_limit)
        started = time.perf_counter()
        step = jax.jit(make_train_step(self.graphdef, self.config, self.schedule), donate_argnums=0)
        self.train_step = step.lower(self.abstract_state, self._abstract_batch()).compile()
        say(f"compiled the step in {time.perf_counter() - started:.1f} s")
        sinks = make_sinks(self.config, self.folder, self.current_step)
        self._text_sinks = [sink for sink in sinks if isinstance(sink, TensorBoard)]
        self._progress = Progress(self.current_step, self.last_step)
        self.metrics_tracker = MetricsTracker([*sinks, self._progress])
        self._restart_clock()

    def _end(self, stop: StopRequest) -> None:
        """Waits for the saves, writes final_model if the run is complete, closes everything."""
        if stop.signal is None and self.current_step >= self.total_steps:
            self.save_model(self.folder / "final_model")
        self.checkpoints.wait()
        self.checkpoints.close()
        self.metrics_tracker.close()
        if stop.signal is not None:
            raise Stopped(f"{stop.signal.name} at step {self.current_step}; it is saved, the same command goes on")
        if self.current_step < self.total_steps:
            say(f"stopped at step {self.current_step} of {self.total_steps} as asked; saved in {self.folder}")
        else:
            say(f"finished: {self.folder / 'final_model'}, best validation loss in {self.folder / 'best_model'}")

    def _abstract_batch(self) -> dict[str, jax.ShapeDtypeStruct]:
        k = self.config.training.gradient_accumulation_steps
        row = (k, self.global_batch // k)
        tokens = jax.ShapeDtypeStruct((*row, self.config.data.max_length), np.int32)
        abstract = dict.fromkeys(("tokens", "targets", "segments", "positions"), tokens)
        abstract["rows"] = jax.ShapeDtypeStruct(row, np.int32)
        return sharding.with_sharding(abstract, sharding.train_batch_sharding(self.mesh))

    def _train_batches(self) -> Iterator[dict[str, jax.Array]]:
        """The batches from the current step to the last one, on the devices."""
        training = self.config.training
        host_batches = train_batches(
            self.rows, training.seed, self.global_batch, training.gradient_accumulation_steps, self.current_step
        )
        placement = sharding.train_batch_sharding(self.mesh)
        in_flight: list[jax.Array] = []
        try:
            for _ in range(self.current_step, self.last_step):
                batch = next(host_batches)
                self._tokens_since_log += int(np.count_nonzero(batch["segments"]))
                yield jax.device_put(batch, placement)
                in_flight.append(self.step_metrics["loss"])
                if len(in_flight) > STEPS_AHEAD:
                    in_flight.pop(0).block_until_ready()
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
            },
            self.current_step,
        )
        self._restart_clock()

    def _log_eval_metrics(self, metrics: dict[str, float]) -> None:
        """Adds the evaluation to the current step's row, keeps the best model, prints a sample."""
        names = ("loss", "perplexity", "bits_per_byte")
        self.metrics_tracker.update({f"eval/{name}": metrics[name] for name in names}, self.current_step)
        self._progress.line(
            f"step {self.current_step}: validation loss {metrics['loss']:.4f}, perplexity {metrics['perplexity']:.2f}, "
            f"{metrics['bits_per_byte']:.4f} bits per byte"
        )
        if self.best_loss is None or metrics["loss"] < self.best_loss:
            self.best_loss = metrics["loss"]
            self.save_model(self.folder / "best_model")
        if self.config.training.sample_tokens:
            self._sample()
        self._restart_clock()

    def _sample(self) -> None:
        training = self.config.training
        options = {"temperature": 0.7, "top_k": 40, "seed": training.seed}
        text = self.generate_text(training.sample_prompt, max_new_tokens=training.sample_tokens, **options)
        self._progress.line("\n".join(["sample:", *("    " + line for line in text.splitlines())]))
        for sink in self._text_sinks:
            sink.write_text("sample", text, self.current_step)

    # ---------------------------------------------------------------- what users call

    def evaluate(self) -> dict[str, float]:
        """`loss` in nats a token, `perplexity`, `bits_per_byte` and `tokens` over all of the validation text."""
        batch_size = self.config.training.batch_size * len(self.devices)
        placement = sharding.eval_batch_sharding(self.mesh)
        batches = (jax.device_put(batch, placement) for batch in eval_batches(self.eval_rows, batch_size))
        return evaluate_rows(self._eval_step, self.state.params, batches, self.eval_bytes)

    def _saved_progress(self) -> checkpoint.Progress:
        return checkpoint.Progress(
            step=self.current_step,
            total_steps=self.total_steps,
            best_loss=self.best_loss,
            requested_vocab_size=self.requested_vocab_size,
            data_fingerprint=self.data_fingerprint,
            global_batch=self.global_batch,
        )

    def save_checkpoint(self) -> None:
        """Saves everything needed to go on from the current step, in the background."""
        self.checkpoints.save(self.state, self.config, self.tokenizer, self._saved_progress())
        self._restart_clock()

    def save_model(self, path: str | os.PathLike[str]) -> None:
        """Writes a self-contained model folder that `load`, evaluate.py and generate.py open."""
        checkpoint.save_model(Path(path), self.state.params, self.config, self.tokenizer, self._saved_progress())

    def generate_text(self, prompt: str, **options: Any) -> str:
        """`prompt` and a continuation by the current parameters; options as in `jaxlm.generate.generate_text`."""
        model = nnx.merge(self.graphdef, self.state.params)
        return generate_text(model, self.tokenizer, prompt, **options)[0]


def _shown(value: Any) -> str:
    return json.dumps(value)


def _open_folder(folder: Path, fresh: bool) -> Path:
    """Makes sure the run's folder can be written to, after moving an old one aside if `fresh`."""
    where = f"training.checkpoint_dir ({folder})"
    try:
        if fresh and folder.exists():
            aside = folder.with_name(f"{folder.name}.{time.strftime('%Y%m%d_%H%M%S')}")
            folder.rename(aside)
            say(f"moved aside: {folder} is now {aside}")
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / f".write_test_{os.getpid()}"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise UserError(f"{where}: cannot be written to ({error.strerror}); name another folder") from error
    return folder

"""Trains a run for each point of a grid, or for some at random, and says which is best. The same command goes on."""

import argparse
import gc
import json
import math
import re
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from jaxlm.commands.exits import OUT_OF_MEMORY, is_out_of_memory
from jaxlm.commands.parser import Parser, add_config_file, add_config_options, config_from, convert, overrides
from jaxlm.config import Config, check_fields, replace_fields, shown, to_dict
from jaxlm.config.fields import kinds_of, meant, without_use
from jaxlm.config.schema import FIELDS
from jaxlm.config.validate import seconds_of
from jaxlm.data.atomic import atomic_write
from jaxlm.data.files import check_names
from jaxlm.errors import Diverged, RunFailed, UserError, printable
from jaxlm.run import sweep
from jaxlm.run.sweep import DONE, FAILED, Axis, Trial

if TYPE_CHECKING:
    from jaxlm.train.assemble import Resolved

OWN = (
    "checkpoint_dir",
    "resume_from_checkpoint",
    "stop_at_step",
    "max_time",
    "allow_change",
)  # of training: how a run goes on
BEST, REPORT = "best_config.json", "report.html"


def add_options(parser: Parser) -> None:
    add_config_file(parser)
    text = "a field and what it is to be, such as model.n_layers=2,4 or training.learning_rate=1e-4:1e-2:log:8, which "
    text += "are 8 values evenly by their logarithm (lin: by their size); once for each field"
    parser.add_argument("--vary", action="append", required=True, metavar="FIELD=VALUES", help=text)
    text = "so many points at random, not all; a range may then do without its number of values"
    parser.add_argument("--trials", metavar="N", help=text)
    text = "time after which no further run begins, such as 30m or 2h; a later call with a longer one goes on"
    parser.add_argument("--budget", metavar="TIME", help=text)
    parser.add_argument("--fresh", action="store_true", help="start over; the old folder is moved aside, not deleted")
    add_config_options(parser)


def axis_of(text: str, drawn: bool) -> Axis:
    """What --vary says.

    Args:
      drawn: whether points are drawn from it, so that a range may be a continuous one.

    Raises:
      UserError: it is not understood.
    """
    (field, _, values), where = text.partition("="), f"--vary ({text})"
    if not values:
        raise UserError(f"{where} must be FIELD=VALUES, such as model.n_layers=2,4")
    if field not in FIELDS:
        raise UserError(f"{where}: unknown field{meant(field, FIELDS)}")
    if field.removeprefix("training.") in OWN:
        raise UserError(f"{where}: is the sweep's own choice for each run; leave it out")
    kinds = set(kinds_of(FIELDS[field].type))
    if ":" in values and {int, float} & kinds:
        axis = _range(field, values, where, whole=float not in kinds)
        if not (axis.values or drawn):
            raise UserError(f"{where}: has no number of values; write {values}:8, or draw points with --trials N")
    else:
        axis = Axis(field, [convert(field, part.strip(), FIELDS[field].type) for part in values.split(",")])
    if twice := [value for i, value in enumerate(axis.values) if value in axis.values[:i]]:
        raise UserError(f"{where}: gives {shown(twice[0])} twice; each value has to be another")
    return axis


def _range(field: str, text: str, where: str, whole: bool) -> Axis:
    found = re.fullmatch(r"([^:]+):([^:]+):(log|lin)(?::(\d{1,5}))?", text)
    if found is None:
        raise UserError(f"{where}: a range is LOW:HIGH:log or LOW:HIGH:lin, with :N for N values of it")
    low, high = (convert(field, end, int if whole else float) for end in found.group(1, 2))
    if not (-math.inf < low < high < math.inf) or (found[3] == "log" and low <= 0):
        raise UserError(f"{where}: LOW has to be less than HIGH, both finite, and for log greater than 0")
    axis = Axis(field, [], low, high, found[3] == "log", whole)
    if found[4] is None:
        return axis
    if not 2 <= (count := int(found[4])) <= sweep.MOST_POINTS:
        raise UserError(f"{where}: a range has 2 values or more, {sweep.MOST_POINTS:,} at most")
    return axis._replace(values=[axis.at(i / (count - 1)) for i in range(count)])


def run(arguments: argparse.Namespace) -> None:
    trials = None if arguments.trials is None else convert("--trials", arguments.trials, int)
    if trials is not None and not 1 <= trials <= sweep.MOST_POINTS:
        raise UserError(f"--trials ({trials}) must be from 1 to {sweep.MOST_POINTS:,}")
    budget = math.inf if arguments.budget is None else seconds_of("--budget", arguments.budget)
    config, axes = config_from(arguments), [axis_of(text, trials is not None) for text in arguments.vary]
    vary = {text.partition("=")[0]: text.partition("=")[2] for text in arguments.vary}
    _check(config, [axis.field for axis in axes], overrides(arguments).keys())
    folder = Path(config.training.checkpoint_dir).expanduser()
    asked = sweep.arguments_of(config, vary, trials)
    known = None if arguments.fresh else sweep.read(folder, asked)
    tried = known or sweep.named(sweep.points(axes, trials, config.training.seed))
    configs = resolved(config, tried, arguments.fresh)
    if known is None:
        tried = by_program(tried, configs)

    from jaxlm.checkpoints.folder import RunFolder

    lock = RunFolder(folder, arguments.fresh)
    with lock:
        _train_all(tried, configs, folder, asked, budget)
        for line in _conclusion(config, folder, tried, [axis.field for axis in axes]):
            print(line)
    lock.release()
    if all(trial.status == FAILED for trial in tried):
        raise RunFailed(f"no run of the sweep in {folder} came to its end")


def _check(config: Config, fields: Sequence[str], given: Collection[str]) -> None:
    """Raises UserError if a value can't be, or what a sweep does by itself is asked for, or twice for one thing."""
    check_fields(config)
    if not config.training.checkpoint_dir:
        raise UserError("training.checkpoint_dir is empty; name a folder")
    if twice := next((field for i, field in enumerate(fields) if field in [*fields[:i], *given]), None):
        raise UserError(f"--vary ({twice}): is set by another option, too; leave one out")
    for name in OWN[1:]:
        if value := vars(config.training)[name]:
            instead = ", and see --budget" * (name == "max_time")
            raise UserError(f"training.{name} ({shown(value)}) has no use in a sweep; leave it out{instead}")


def resolved(config: Config, trials: Sequence[Trial], fresh: bool = False) -> dict[str, "Resolved"]:
    """{name: the configuration of its run}; UserError if one of them is not valid, before anything has been done."""
    folder = Path(config.training.checkpoint_dir)
    configs = {
        trial.name: replace_fields(config, trial.values | {"training.checkpoint_dir": str(folder / trial.name)})
        for trial in trials
    }
    for each in configs.values():
        check_names(each.data)
        if not each.data.validation_fraction and "data.validation_fraction" not in without_use(each.data):
            raise UserError("data.validation_fraction (0): a sweep is judged by validation loss; hold out some text")

    import jax

    from jaxlm.parallel.devices import start_backend
    from jaxlm.run.setup import resolve

    found = {name: resolve(each, lambda each: start_backend(each.training), fresh) for name, each in configs.items()}
    if jax.process_count() > 1:
        raise UserError("a sweep runs in one process; start it on one host, without srun or mpirun")
    return found


def by_program(trials: list[Trial], configs: dict[str, "Resolved"]) -> list[Trial]:
    """Those that share a compiled program one after another."""
    from jaxlm.train.numbers import program_config

    programs = {trial.name: program_config(configs[trial.name].config) for trial in trials}
    first = list(dict.fromkeys(programs.values()))
    return sorted(trials, key=lambda trial: first.index(programs[trial.name]))


def _train_all(
    trials: Sequence[Trial], configs: dict[str, "Resolved"], folder: Path, asked: dict[str, object], budget: float
) -> None:
    """Trains those that have not ended, as long as the budget lasts; what is known of them is always in sweep.json."""
    from jaxlm.parallel.processes import say

    for number, trial in enumerate(trials, 1):
        if trial.status in (DONE, FAILED) or sum(each.seconds for each in trials) >= budget:
            continue
        say(f"\nrun {number} of {len(trials)}: {_point(trial)}")
        started, before = time.perf_counter(), trial.seconds
        note = partial(_note, trial, before - started, lambda: sweep.write(folder, asked, trials))
        gc.collect()  # the run before leaves the device to this one
        try:
            _train(trial, configs[trial.name], folder, note)
        except Diverged as error:
            trial.status, trial.reason = FAILED, printable(error)
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            trial.status, trial.reason = FAILED, OUT_OF_MEMORY
        finally:
            if trial.status != sweep.NEW:  # else it was refused: nothing stays
                note()
        say(f"run {number} of {len(trials)}: {trial.reason or f'validation loss {trial.loss:.4f}'}")


def _note(trial: Trial, since: float, write: Callable[[], None]) -> None:
    """Writes how long `trial` has taken: the time of now and `since`."""
    trial.seconds = since + time.perf_counter()
    write()


def _train(trial: Trial, resolved: "Resolved", folder: Path, note: Callable[[], None]) -> None:
    from jaxlm.trainer import Trainer

    class Clock:
        """A sink that keeps the time that a run has taken, should it be killed."""

        def write(self, row: object, step: int) -> None:
            note()

        def close(self) -> None:
            pass

    trainer = Trainer(resolved, sinks=[Clock()])
    trial.status, trial.held_out_bytes = sweep.BEGUN, trainer.text.eval_bytes
    note()
    trainer.train()
    trial.judge(folder / trial.name)


def _point(trial: Trial) -> str:
    return ", ".join(f"{field} {shown(value)}" for field, value in trial.values.items())


def _conclusion(config: Config, folder: Path, trials: Sequence[Trial], fields: Sequence[str]) -> Iterator[str]:
    """The table and what it says; writes the report and the best configuration."""
    from jaxlm.report import write_report
    from jaxlm.report.runs import has_rows

    # A token is not the same where the text or the tokenizer differs.
    by_bits = any(field == "model.vocab_size" or field.startswith("data.") for field in fields)
    measure = (lambda trial: trial.bits_per_byte) if by_bits else (lambda trial: trial.loss)
    ranked = sorted((trial for trial in trials if trial.status == DONE), key=measure)
    yield from _table(ranked, [trial for trial in trials if trial.status != DONE], fields)
    if not ranked:
        return
    if len({trial.held_out_bytes for trial in ranked}) > 1:
        yield "not all were judged on the same text: their figures do not compare"
    for field in fields:
        values = [trial.values[field] for trial in trials if trial.status in (DONE, FAILED)]
        best = ranked[0].values[field]
        if all(type(value) in (int, float) for value in values) and len({*values}) > 2:
            for extreme, word in ((min(values), "smallest"), (max(values), "largest")):
                if best == extreme:
                    yield f"the best {field} ({shown(best)}) is the {word} that was tried"
    again = {"training.checkpoint_dir": f"{config.training.checkpoint_dir.rstrip('/')}_best"}
    best_config = replace_fields(config, ranked[0].values | again)
    atomic_write(folder / BEST, json.dumps(to_dict(best_config), indent=2) + "\n")
    runs = [folder / trial.name for trial in trials if has_rows(folder / trial.name)]
    write_report(runs, folder / REPORT)
    yield f"best: {folder / ranked[0].name}, its configuration: {folder / BEST}, all compared: {folder / REPORT}"


def _table(ranked: Sequence[Trial], others: Sequence[Trial], fields: Sequence[str]) -> Iterator[str]:
    figure = lambda value, digits: "-" if value is None else f"{value:,.{digits}f}"  # noqa: E731
    rows = [["", *(field.rpartition(".")[2] for field in fields), "loss", "bits per byte", "seconds", "tokens/s"]]
    for place, trial in enumerate([*ranked, *others], 1):
        done = trial.status == DONE
        figures = [figure(trial.loss, 4), figure(trial.bits_per_byte, 4)] if done else [trial.status, ""]
        figures += [figure(trial.seconds, 1), figure(trial.tokens_per_second, 0)]
        rows.append([str(place) if done else "", *(shown(trial.values[field]) for field in fields), *figures])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        yield "  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
    yield from (f"{trial.status}: {_point(trial)}: {trial.reason}" for trial in others if trial.reason)

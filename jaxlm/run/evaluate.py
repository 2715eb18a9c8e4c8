"""The loss of a saved model on a text."""

import dataclasses
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from operator import attrgetter
from typing import Any

import jax
from flax import nnx

from jaxlm.checkpoints.load import LoadedModel
from jaxlm.config import Config, DataConfig, replace_fields, shown, validate
from jaxlm.config.schema import STDLIB
from jaxlm.data.loader import eval_batches
from jaxlm.data.mixture import held_out, texts
from jaxlm.data.tokens import Prepared, prepare_all
from jaxlm.errors import UserError
from jaxlm.parallel.layout import Layout
from jaxlm.parallel.mesh import make_mesh
from jaxlm.parallel.processes import say
from jaxlm.run.load import load
from jaxlm.run.text import longest_piece, pack_all, untrained_positions
from jaxlm.train.evaluate import evaluate_batches
from jaxlm.train.step import make_eval_step

NAMES = "dataset_name dataset_config dataset_split validation_split train_files validation_files validation_fraction"
TEXT = [f"data.{name}" for name in [*NAMES.split(), "sources"]]


def evaluate(
    model: str | os.PathLike[str] | LoadedModel,
    files: str | os.PathLike[str] | Sequence[str | os.PathLike[str]] = (),
    *,
    batch_size: int | None = None,
    **data: Any,
) -> dict[str, Any]:
    """The loss of a saved model on its run's held-out text, or on another that is named, as `jaxlm evaluate` has it.

    Args:
      model: what `load` opens, or what it returned.
      files: to evaluate all of; a str as `--data.validation_files` takes it.
      batch_size: rows evaluated at once; None: as in training.
      data: fields of DataConfig, such as dataset_name="python-stdlib".

    Returns:
      As `evaluate_model`.

    Raises:
      UserError: no such model, a text that is not usable or does not fit the model, or none is named and it has none.
    """
    given = {f"data.{name}": value for name, value in data.items()}
    if files:
        several = [files] if isinstance(files, os.PathLike) else files
        given["data.validation_files"] = several if isinstance(several, str) else tuple(map(os.fspath, several))
    if batch_size is not None and batch_size < 1:
        raise UserError(f"batch_size ({batch_size}) must be at least 1")
    loaded = model if isinstance(model, LoadedModel) else load(model)
    if loaded.progress is None and not given.keys() & set(TEXT):
        raise UserError(f"model ({loaded.folder}): no run of jaxlm's, so it has no held-out text; name files")
    chosen = text_to_evaluate(loaded.config, given)
    return evaluate_model(loaded, chosen, batch_size or loaded.config.training.batch_size, say)


def text_to_evaluate(config: Config, given: Mapping[str, Any]) -> DataConfig:
    """What is evaluated: the run's held-out text, or the one named in `given` ({"data.field": value}).

    All of the files named; of a data set its validation split, or else all of the split to train on (`open_source`).
    Only where `given` has data.validation_fraction, a part of them is held out.

    Raises:
      UserError: two texts are named, or the run held out none.
    """
    if given.keys() & {"data.sources", "data.anneal_weights", "data.anneal_from"}:
        raise UserError(f"data.sources ({shown(given.get('data.sources', ()))}): name what is evaluated with --files")
    for field in ("tokenizer_path", "bos_token", "eos_token", "pad_token"):
        if (value := given.get(f"data.{field}")) not in (None, vars(config.data)[field]):
            raise UserError(f"data.{field} ({value}): a model is evaluated with its own tokenizer; leave it out")
    # Streaming is for training; the template that the model has learned is in its folder.
    config = replace_fields(config, {"data.streaming": False, "data.chat_template": None})
    own, other, name = config.data, dict[str, Any](), given.get("data.dataset_name")
    if not given.keys() & set(TEXT) and given.get("data.max_documents", own.max_documents) != own.max_documents:
        most = f"data.max_documents ({given['data.max_documents']})"
        raise UserError(f"{most}: another part of the text would be held out than the run's; name a text with --files")
    first = {"data.max_documents": None} if given.keys() & set(TEXT) else {}
    files, held_out = given.get("data.train_files"), given.get("data.validation_files")
    if files and held_out:
        raise UserError(f"data.train_files ({shown(files)}) and data.validation_files ({shown(held_out)}): name one")
    if held_out:
        other = {"data.train_files": held_out}  # of which nothing is read
    elif files or name == STDLIB:
        other = {"data.validation_files": (), "data.validation_fraction": 0}
    elif name is not None or "data.dataset_split" in given:
        same = name in (None, own.dataset_name) and not own.train_files and not own.sources
        other = {"data.validation_split": (same and own.validation_split) or DataConfig.validation_split}
        if not same:
            other["data.dataset_split"] = DataConfig.dataset_split
        if given.keys() & {"data.dataset_split", "data.validation_fraction"}:
            other |= {"data.validation_split": None, "data.validation_fraction": 0}
    elif own.validation_fraction == 0 and not given.keys() & set(TEXT):
        raise UserError("data.validation_fraction (0): this run held out no text; name one with --files")
    return replace_fields(config, first | other | dict(given)).data


def evaluate_model(
    loaded: LoadedModel, data: DataConfig, batch_size: int, report: Callable[[str], None]
) -> dict[str, Any]:
    """The loss of a saved model on the held-out text of `data`, or on all of it if data.validation_fraction is 0.

    Returns:
      As `evaluate_batches`, and `documents` (those of data.min_length or more), `bytes` (of their text, in UTF-8), and
      `text`, its name.

    Raises:
      UserError: the text is not usable, or `data` does not fit the model.
    """
    config = validate(dataclasses.replace(loaded.config, data=data))
    prepared = prepare_all(texts(data), config.model.vocab_size, loaded.tokenizer, report, evaluating=True)
    documents = held_out(data, prepared)
    parts = pack_all(documents, data, report)
    for each in prepared.values():
        for line in _doubts(loaded, config, each, longest_piece(parts)):
            report(f"warning: {line}")
    graphdef, state = nnx.split(loaded.model)
    params = nnx.to_pure_dict(state)
    eval_step = jax.jit(make_eval_step(graphdef, config, Layout(make_mesh(jax.devices()[:1]), 0, params)))
    utf8_bytes = sum(each.kept_bytes(data.min_length) for each in documents.values())
    batches = {name: eval_batches(rows, batch_size) for name, rows in parts.items()}
    result = evaluate_batches(eval_step, params, batches, utf8_bytes)
    kept = sum(rows.plan.documents - rows.plan.dropped_documents for rows in parts.values())
    text = "; ".join(dict.fromkeys(each.source_name for each in prepared.values()))
    return result | {"documents": kept, "bytes": utf8_bytes, "text": text}


def _doubts(loaded: LoadedModel, config: Config, prepared: Prepared, longest: int) -> Iterator[str]:
    """Why the loss may be another than it seems."""
    own, run = loaded.config, loaded.progress
    if run is None:  # of a model that was trained elsewhere nothing is known
        return
    text = prepared.source_fingerprint.partition("+")[0]
    trained = [re.split("[-+]", fingerprint)[0] for fingerprint in run.data_fingerprint.split(";")]
    share = 1 if prepared.train is None else config.data.validation_fraction
    if text in trained and share > ("-" not in run.data_fingerprint and own.data.validation_fraction):
        yield f"the model was trained on {'this text' if share == 1 else 'a part of this text'}"
    known = {digest.hex(): path for digest, path in prepared.files.items()}
    if text not in trained and (both := sorted(known.keys() & {*run.files})):
        yield f"the model was trained on {len(both)} of these {len(known)} files, such as {known[both[0]]}"
    named = attrgetter(*TEXT)
    if named(config) == named(own) and text not in run.data_fingerprint:
        yield "the text has changed since the run"
    if trained_on := run.longest_piece:
        yield from untrained_positions(own, trained_on, longest)

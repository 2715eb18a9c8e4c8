"""What a run begins with: its text, its tokenizer, and the model or the checkpoint that it starts from."""

import dataclasses
from pathlib import Path
from typing import Any, NamedTuple

from jaxlm.checkpoints.items import read_progress, read_tokenizer
from jaxlm.config import Config, DataConfig, replace_fields, with_derived
from jaxlm.config.schema import PYTHON
from jaxlm.data.handed_over import HandedOver
from jaxlm.errors import UserError
from jaxlm.interop.pretrained import Pretrained, open_pretrained
from jaxlm.model import Transformer
from jaxlm.parallel.devices import start_backend
from jaxlm.run.resume import Changes, go_on
from jaxlm.run.setup import check_same_in_processes, resolve, with_text
from jaxlm.run.text import Text, prepare_text
from jaxlm.train.assemble import Resolved, assemble
from jaxlm.train.own_loss import OwnLoss, name_of


class Beginning(NamedTuple):
    """The vocabulary size, the micro-batches and the place in the stream of rows are fixed in `resolved`."""

    resolved: Resolved
    text: Text
    pretrained: Pretrained | None  # what init_from names, where a run starts from it
    changed: Changes  # by the user, since the checkpoint
    saved: dict[str, Any]  # fields of `Progress` that stay the same all through the run


def resolve_here(config: Config | Resolved, given: HandedOver | None, fresh: bool) -> Resolved:
    """`resolve` on this machine's devices, where that has not been done; without the text that `config` names where a
    program hands one over.
    """
    named = config.data.dataset_name if isinstance(config, Config) else config.config.data.dataset_name
    if isinstance(config, Config):
        judged = config if given is None else replace_fields(config, {"data.dataset_name": PYTHON})
        resolved = resolve(judged, lambda config: start_backend(config.training), fresh)
    else:
        resolved = config
    if given is None:
        return resolved
    instead = named not in (PYTHON, DataConfig.dataset_name)
    notes = [f"data.dataset_name ({named}) is not read: the text is train_dataset"] * instead
    config = with_derived(replace_fields(resolved.config, {"data.dataset_name": PYTHON}))
    return dataclasses.replace(resolved, config=config, notes=(*resolved.notes, *notes))


def begin(
    resolved: Resolved,
    checkpoint: Path | None,
    model_class: type[Transformer],
    own_loss: OwnLoss | None,
    given: HandedOver | None,
) -> Beginning:
    """Text, tokenizer and rows of a run that starts, or goes on from `checkpoint`.

    Raises:
      UserError: they can't be had, or are not those of the checkpoint.
    """
    pretrained = open_pretrained(resolved.config) if checkpoint is None else None
    if pretrained is not None:
        pretrained.check(assemble(resolved, model_class).base[0])
    asked_vocab_size = resolved.config.model.vocab_size
    own = None if pretrained is None else pretrained.tokenizer
    text = prepare_text(resolved.config, own if checkpoint is None else read_tokenizer(checkpoint), given)
    resolved = with_text(resolved, text)
    if given is not None and resolved.config.training.early_stopping_patience and not text.eval_rows:
        raise UserError("training.early_stopping_patience needs held-out text; hand over an eval_dataset")
    of_run = asked_vocab_size, text.fingerprint, model_class.__name__, name_of(own_loss)
    resolved, changed = go_on(resolved, checkpoint, *of_run)
    check_same_in_processes(resolved.config, text.fingerprint)
    if checkpoint is not None:  # `jaxlm resume` asks for the size that was reached
        of_run = read_progress(checkpoint).requested_vocab_size, *of_run[1:]
    saved = dict(zip(("requested_vocab_size", "data_fingerprint", "model_class", "loss"), of_run, strict=True))
    of_text = {"longest_piece": text.longest_piece, "files": text.files}
    return Beginning(resolved, text, pretrained, changed, saved | of_text)

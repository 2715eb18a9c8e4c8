"""The model that `training.init_from` names: a folder of jaxlm's or of Hugging Face's, here or on the Hub.

The architecture and the tokenizer come from there. A run that goes on from a checkpoint doesn't look there again.

JAX, and the modules that import it, are imported where they are used: a mistake in options should show at once.
"""

import dataclasses
import os
import re
from pathlib import Path
from typing import Any

from jaxlm.checkpoints.manifest import model_in
from jaxlm.config import Config, DataConfig, ModelConfig, from_dict, shown
from jaxlm.config.option import Unset
from jaxlm.data.hub import SECONDS, why_unreachable
from jaxlm.data.special_tokens import FILES, read_object
from jaxlm.data.tokenizer import Tokenizer
from jaxlm.errors import UserError, one_line
from jaxlm.interop.architectures import ARCHITECTURE, DROPOUTS
from jaxlm.interop.folders import INDEX, HuggingFaceFolder, OwnFolder
from jaxlm.interop.peft import CONFIG as ADAPTER_CONFIG
from jaxlm.interop.peft import PeftFolder

FETCHED = (*FILES, INDEX, "*.safetensors", ADAPTER_CONFIG, "README.md")  # from the Hub
STRETCH = (
    "max_seq_len", "rope_theta", "rope_scaling", "rope_scaling_factor", "rope_original_length", "rope_low_freq_factor",
    "rope_high_freq_factor",
)  # fmt: skip
HUB_NAME = re.compile(r"([\w.-]+/)?[\w.-]+")

Pretrained = OwnFolder | HuggingFaceFolder


def with_architecture(config: Config, fresh: bool = False) -> Config:
    """`config` with the architecture of the model that training.init_from names; unchanged if it names none.

    A run that goes on (not `fresh`) keeps the architecture it began with.

    Args:
      config: each field valid by itself.

    Raises:
      UserError: there is no such model, or an option contradicts it.
    """
    if config.training.init_from is None:
        return config
    begun = None if fresh else _model_of_the_run(config)
    return _adopt(config, begun or open_model(config.training.init_from, _where(config), config.data).model)


def open_pretrained(config: Config) -> Pretrained | None:
    """The model to start from, with a tokenizer; None if training.init_from is none. Call its `check` next.

    Args:
      config: from `with_architecture`.

    Raises:
      UserError: it doesn't fit `config` or data.tokenizer_path.
    """
    if config.training.init_from is None:
        return None
    found = open_model(config.training.init_from, _where(config), config.data)
    _adopt(config, found.model)  # raises if the folder has changed since `with_architecture`
    found.tokenizer = _agreed_tokenizer(config, found.tokenizer)
    tokens, rows = found.tokenizer.vocab_size, found.model.vocab_size
    if tokens > rows:
        raise UserError(
            f"{_where(config)}: its tokenizer has {tokens} tokens, but its model has only {rows}; mend that folder"
        )
    return found


def _where(config: Config) -> str:
    return f"training.init_from ({config.training.init_from})"


def _model_of_the_run(config: Config) -> ModelConfig | None:
    """The model of the run that goes on, if there is one that began with the same training.init_from."""
    training = config.training
    resume = training.resume_from_checkpoint
    folder = training.checkpoint_dir if resume in (None, "latest") else f"{resume}/config"
    try:
        saved = from_dict(read_object(Path(folder).expanduser() / "config.json", folder), folder)
    except UserError:
        return None  # resuming reads it again, and says what is wrong
    return saved.model if saved.training.init_from == training.init_from else None


def _adopt(config: Config, model: ModelConfig) -> Config:
    """`config` with the architecture of `model`; UserError if an option was set to something else.

    But a model with rotary positions may be stretched to a longer context: model.rope_scaling, and what goes with it.
    """
    asked, defaults, found = (dataclasses.asdict(each) for each in (config.model, ModelConfig(), model))
    found |= _stretched(asked, defaults, found)
    other = [name for name in ARCHITECTURE if asked[name] not in (defaults[name], found[name])]
    if other:
        listed = "; ".join(f"model.{name} is {shown(asked[name])}, there {shown(found[name])}" for name in other)
        raise UserError(
            f"{_where(config)} has another architecture: {listed}. Leave these options out, of the command and of the "
            "file that --config names: a JSON file without a model section has none; or leave --config out"
        )
    unset = [name for name in DROPOUTS if isinstance(asked[name], Unset)]
    if unclear := [name for name in unset if isinstance(found[name], Unset)]:
        raise UserError(f"{_where(config)} has several rates of what is one dropout here; set model.{unclear[0]}")
    adopted = {name: found[name] for name in (*ARCHITECTURE, *unset)}
    data, longest = config.data, found["max_seq_len"]
    if data.max_length == DataConfig().max_length > longest:  # nobody has asked for rows that long
        data = dataclasses.replace(data, max_length=longest)
    return dataclasses.replace(config, model=dataclasses.replace(config.model, **adopted), data=data)


def _stretched(asked: dict[str, Any], defaults: dict[str, Any], found: dict[str, Any]) -> dict[str, Any]:
    """The positions that the options ask for, where model.rope_scaling is another than the model's; else none.

    Without model.max_seq_len it is the model's, times the factor.
    """
    if found["positions"] != "rotary" or asked["rope_scaling"] in (None, found["rope_scaling"]):
        return {}
    before = found["rope_original_length"] or found["max_seq_len"]
    found = found | {"rope_original_length": before, "max_seq_len": round(before * asked["rope_scaling_factor"])}
    return {name: found[name] if asked[name] == defaults[name] else asked[name] for name in STRETCH}


def _agreed_tokenizer(config: Config, found: Tokenizer | None) -> Tokenizer:
    """The tokenizer `found` in the folder, or else that of data.tokenizer_path; UserError if there is none, or two."""
    path = config.data.tokenizer_path
    own = None if path is None else Tokenizer.load(path, data=config.data)
    if found and own and not found.agrees_with(own):
        raise UserError(f"data.tokenizer_path ({path}) is not the tokenizer of {_where(config)}; leave it out")
    agreed = found or own
    if agreed is None:
        raise UserError(f"{_where(config)}: holds no tokenizer.json; write one there, or set data.tokenizer_path")
    return agreed


def open_model(name: str, where: str, data: DataConfig) -> Pretrained:
    """The model of a folder of jaxlm's or transformers', or of that name on the Hub; configuration and tokenizer read.

    Raises:
      UserError: there is none; begins with `where`.
    """
    folder = Path(name).expanduser()
    if not os.path.isdir(folder):  # unlike Path.is_dir, it never raises
        folder = _fetched(name, where)
    if os.path.isdir(model_in(folder) / "params"):
        return OwnFolder(folder, where, data)
    if os.path.isfile(folder / ADAPTER_CONFIG):
        return _with_adapter(folder, where, data)
    saved = read_object(folder / "config.json", where)
    if not saved or "training" in saved:  # nothing, or a run's folder
        raise UserError(
            f"{where}: holds no model; name a best_model, final_model, checkpoint_<step> or run's folder, or one "
            "that transformers has saved"
        )
    return HuggingFaceFolder(folder, saved, where, data)


def _with_adapter(folder: Path, where: str, data: DataConfig) -> Pretrained:
    """The model that an adapter of PEFT belongs to, with the adapter added; UserError if that can't be had."""
    name = read_object(folder / ADAPTER_CONFIG, where).get("base_model_name_or_path")
    if not isinstance(name, str):
        raise UserError(f"{where}: {ADAPTER_CONFIG} has no base_model_name_or_path")
    adapter_too = os.path.isfile(Path(name).expanduser() / ADAPTER_CONFIG)
    base = None if adapter_too else open_model(name, f"{where}: its base ({name})", data)
    if not isinstance(base, HuggingFaceFolder) or isinstance(base, PeftFolder):
        kind = "of jaxlm" if isinstance(base, OwnFolder) else "an adapter, too"
        raise UserError(f"{where}: its base ({name}) is {kind}; an adapter of PEFT belongs to a model of transformers")
    return PeftFolder(folder, base, where, data)


def _fetched(name: str, where: str) -> Path:
    """The folder of a model on the Hub, downloaded, or from an earlier download where the Hub is out of reach.

    Raises:
      UserError: there is none.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HTTPError, RepositoryNotFoundError

    if os.path.isfile(name) or not HUB_NAME.fullmatch(name):
        raise UserError(f"{where}: {'is a file; name its folder' if os.path.isfile(name) else 'no such folder'}")
    reason = why_unreachable(lambda hub: hub.model_info(name, timeout=SECONDS))
    try:
        fetched = snapshot_download(
            name, allow_patterns=list(FETCHED), ignore_patterns=["*/*"], local_files_only=reason is not None
        )
    except RepositoryNotFoundError as error:
        raise UserError(f"{where}: no such folder, and no model on the Hub, or not a public one") from error
    except (OSError, HTTPError, ValueError) as error:
        raise UserError(
            f"{where}: no such folder, and the Hugging Face Hub is out of reach ({reason or one_line(error)}); "
            "name a folder that is here"
        ) from error
    return Path(fetched)

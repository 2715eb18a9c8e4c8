"""The model that `training.init_from` names: a folder of jaxlm's or of Hugging Face's, here or on the Hub.

The architecture and the tokenizer come from there. A run that goes on from a checkpoint doesn't look there again.

JAX, and the modules that import it, are imported where they are used: a mistake in options should show at once.
"""

import dataclasses
import os
import re
from collections.abc import Iterable
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from jaxlm.checkpoints.items import JSON_ITEMS, read_config, read_tokenizer
from jaxlm.checkpoints.manifest import damage, model_in
from jaxlm.config import Config, DataConfig, ModelConfig, from_dict, shown
from jaxlm.config.option import Unset
from jaxlm.data.hub import SECONDS, why_unreachable
from jaxlm.data.special_tokens import FILES, read_object
from jaxlm.data.tokenizer import Tokenizer
from jaxlm.errors import UserError, one_line
from jaxlm.interop.families import ARCHITECTURE, DROPOUTS, from_config, from_tensors, tensor_names, to_tensors

INDEX, SINGLE_FILE = "model.safetensors.index.json", "model.safetensors"
FETCHED = (*FILES, INDEX, "*.safetensors", "adapter_config.json", "README.md")  # from the Hub
HUB_NAME = re.compile(r"([\w.-]+/)?[\w.-]+")
FLOATS = ("F32", "F16", "BF16", "F64")
OUTPUT = "lm_head.weight"
BUFFERS = (".attn.bias", ".attn.masked_bias", "rotary_emb.inv_freq")  # old versions saved these beside the parameters

ADAPTER = "adapter"  # as in jaxlm.model.adapters

Params = Any  # nested dict of arrays, or of their shapes


def _has(tree: Params, name: str) -> bool:
    return isinstance(tree, dict) and (name in tree or any(_has(inside, name) for inside in tree.values()))


class OwnFolder:
    """A best_model, final_model or checkpoint folder; its parameters are read later."""

    kind = "of jaxlm"  # for people

    def __init__(self, folder: Path, where: str, data: DataConfig) -> None:
        self.folder, self.where = model_in(folder), where
        if self.folder != folder:
            self.kind = f"of jaxlm, {self.folder.name}"
        self._refuse_damage(JSON_ITEMS)
        try:
            self.config = read_config(self.folder)
            self.model = self.config.model
            self.tokenizer: Tokenizer | None = read_tokenizer(self.folder, data)
        except UserError as error:
            raise UserError(f"{where}: {error}") from error

    def check(self, whole: Params) -> None:
        """Raises UserError if the files of the parameters are damaged, or hold adapters that `whole` has not.

        Arguments as in `HuggingFaceFolder`.
        """
        self._refuse_damage(["params"])
        if self.config.training.lora_rank is not None and not _has(whole, ADAPTER):
            how = f"jaxlm export --model {self.folder} --to DIR adds them to the model's matrices; start from DIR"
            raise UserError(f"{self.where}: holds adapters beside its model (training.lora_rank); {how}")

    def _refuse_damage(self, items: Iterable[str]) -> None:
        if wrong := damage(self.folder, items):
            raise UserError(f"{self.where} is damaged: {wrong}; name another")

    def params(self, whole: Params, held: Params, shards: int) -> Params:
        """The parameters; UserError if they have other names or shapes. Arguments as in `HuggingFaceFolder`."""
        from jaxlm.checkpoints.load import restore_item

        return restore_item(self.folder, "params", held, shards)


class HuggingFaceFolder:
    """A folder that transformers has saved, with parameters in safetensors; they are read later."""

    def __init__(self, folder: Path, config: Any, where: str, data: DataConfig) -> None:
        self.folder, self.where = folder, where
        self.family, self.model = from_config(config, where)
        self.kind = self.family.architecture
        self.tokenizer = Tokenizer.find(folder, where, data)

    def check(self, whole: Params) -> None:
        """Looks through the parameters, without reading them.

        Args:
          whole: the parameters to train, not padded; only their shapes count.

        Raises:
          UserError: files are damaged, or hold other names or shapes.
        """
        from flax.traverse_util import flatten_dict

        empty = {path: np.empty(x.shape, np.float32) for path, x in flatten_dict(whole, sep="/").items()}
        try:
            expected = {name: tensor.shape for name, tensor in to_tensors(empty, self.family)}  # views: takes no memory
        except KeyError as error:
            raise UserError(
                f"{self.where}: no {self.kind} has {error.args[0]}, which the model of this run has; "
                "start that from random parameters"
            ) from error
        self._check_names(expected)
        for name, shape in expected.items():
            opened, stored_name = self._tensors[name]
            stored = opened.get_slice(stored_name)
            if tuple(stored.get_shape()) != shape or stored.get_dtype() not in FLOATS:
                raise UserError(
                    f"{self.where}: {name} is {stored.get_dtype()} {stored.get_shape()}, "
                    f"but by config.json a float of {list(shape)}"
                )

    def _check_names(self, expected: dict[str, tuple[int, ...]]) -> None:
        missing = [name for name in expected if name not in self._tensors]
        if missing:
            raise UserError(f"{self.where}: lacks {len(missing)} tensor(s) that config.json asks for, as {missing[0]}")
        more = [name for name in self._tensors if name not in expected and not name.endswith(BUFFERS)]
        if OUTPUT in more and self.model.tie_embeddings:
            more.remove(OUTPUT)  # transformers ignores it, too, unless it differs
            (embedding,) = tensor_names("token_embedding", self.family, None)
            if not np.array_equal(self._read(OUTPUT), self._read(embedding)):
                more = [f"an {OUTPUT} of its own, though tie_word_embeddings is true"]
        if more:
            raise UserError(f"{self.where}: has what no {self.kind} has: {more[0]}")

    @cached_property
    def _tensors(self) -> dict[str, tuple[Any, str]]:
        """{name: (the open file, the name in it)}; a model saved without its head has names without the prefix."""
        from safetensors import SafetensorError, safe_open

        tensors = {}
        for file in self._files():
            try:
                opened = safe_open(self.folder / file, "numpy")
            except (OSError, SafetensorError) as error:
                raise UserError(f"{self.where}: {file} is not readable: {one_line(error)}") from error
            for name in opened.keys():  # noqa: SIM118  (it is no dict)
                has_prefix = name.startswith((self.family.prefix, OUTPUT))
                tensors[name if has_prefix else self.family.prefix + name] = opened, name
        if self.model.tie_embeddings and OUTPUT in tensors:  # of two names of one tensor, some programs keep this one
            tensors.setdefault(tensor_names("token_embedding", self.family, None)[0], tensors[OUTPUT])
        return tensors

    def _files(self) -> list[str]:
        """The names of the safetensors files."""
        if os.path.isfile(self.folder / INDEX):
            index = read_object(self.folder / INDEX, self.where)
            files = index.get("weight_map")
            if not isinstance(files, dict) or not all(isinstance(file, str) for file in files.values()):
                raise UserError(f"{self.where}: {INDEX} is not readable: it has no weight_map from tensors to files")
            return sorted({Path(file).name for file in files.values()})
        if os.path.isfile(self.folder / SINGLE_FILE):
            return [SINGLE_FILE]
        pickled = [name for name in os.listdir(self.folder) if name.endswith((".bin", ".pt", ".pth"))]
        reason = f"{pickled[0]} is a pickle, which could run any program; " if pickled else ""
        raise UserError(
            f"{self.where}: holds no {SINGLE_FILE}; {reason}open it with transformers and save it with save_pretrained"
        )

    def _read(self, name: str) -> np.ndarray:
        opened, stored_name = self._tensors[name]
        return opened.get_tensor(stored_name)

    def params(self, whole: Params, held: Params, shards: int) -> Params:
        """The parameters, float32; call `check` before.

        Args:
          whole: as in `check`.
          held: their shapes, padded for the devices, and shardings, which the result has.
          shards: devices that they are sharded over.
        """
        import jax

        from jaxlm.parallel.layout import put_whole
        from jaxlm.parallel.split import path_name

        def read(path: Any, x: Any, target: Any) -> jax.Array:
            return put_whole(from_tensors(path_name(path), x.shape, self.family, self._read), target)

        return jax.tree_util.tree_map_with_path(read, whole, held)


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
    """`config` with the architecture of `model`; UserError if an option was set to something else."""
    asked, defaults, found = (dataclasses.asdict(each) for each in (config.model, ModelConfig(), model))
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
    if os.path.isfile(folder / "adapter_config.json"):
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
    from jaxlm.interop.peft import PeftFolder

    name = read_object(folder / "adapter_config.json", where).get("base_model_name_or_path")
    if not isinstance(name, str):
        raise UserError(f"{where}: adapter_config.json has no base_model_name_or_path")
    base = open_model(name, f"{where}: its base ({name})", data)
    if not isinstance(base, HuggingFaceFolder):
        raise UserError(
            f"{where}: its base ({name}) is of jaxlm; an adapter of PEFT belongs to a model of transformers"
        )
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

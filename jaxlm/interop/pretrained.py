"""The model that `training.init_from` names: a folder of jaxlm's or of Hugging Face's, here or on the Hub.

The architecture and the tokenizer come from there. A run that goes on from a checkpoint doesn't look there again.
"""

import dataclasses
import json
import os
import re
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from jaxlm.config import Config, check_fields, from_dict
from jaxlm.data.hub import SECONDS, why_unreachable
from jaxlm.data.tokenizer import Tokenizer
from jaxlm.errors import UserError, one_line
from jaxlm.interop.families import (
    ARCHITECTURE,
    DEFAULTS,
    NO_PARAMETERS,
    from_config,
    from_tensors,
    tensor_names,
    to_tensors,
)

INDEX, ALONE = "model.safetensors.index.json", "model.safetensors"
FETCHED = ("config.json", "tokenizer.json", INDEX, "*.safetensors")  # from the Hub
HUB_NAME = re.compile(r"([\w.-]+/)?[\w.-]+")
FLOATS = ("F32", "F16", "BF16", "F64")
OUTPUT = "lm_head.weight"

Params = Any  # nested dict of arrays, or of their shapes


class Pretrained(Protocol):
    """A model to start from."""

    kind: str  # what it is, for people
    fields: dict[str, Any]  # of ModelConfig, those in ARCHITECTURE
    tokenizer: Tokenizer | None  # none: there is none in the folder

    def check(self, whole: Params) -> None:
        """Raises UserError unless all parameters, of the shapes of `whole`, are there and undamaged."""

    def params(self, whole: Params, held: Params, shards: int) -> Params:
        """The parameters, float32: `whole` shapes, laid out as in the abstract arrays `held`, over `shards` devices."""


def with_architecture(config: Config, fresh: bool = False) -> Config:
    """`config` with the architecture of the model that training.init_from names, or as it is if that is none.

    A run that goes on (not `fresh`) has its own already, from when it began.

    Raises:
      UserError: there is no such model, or an option says something else than it.
    """
    check_fields(config)
    if config.training.init_from is None:
        return config
    fields = None if fresh else _of_the_run(config)
    return _adopt(config, _open(config).fields if fields is None else fields)


def open_pretrained(config: Config) -> Pretrained | None:
    """The model to start from, looked through; None if training.init_from is none.

    Args:
      config: from `with_architecture`.

    Raises:
      UserError: it is damaged, or doesn't fit `config` or data.tokenizer_path.
    """
    if config.training.init_from is None:
        return None
    found = _open(config)
    _adopt(config, found.fields)  # which says so where the folder has changed since the run began
    found.tokenizer = _agreed_tokenizer(config, found.tokenizer)
    rows = found.fields["vocab_size"]
    if found.tokenizer.vocab_size > rows:
        raise UserError(
            f"{_where(config)}: its tokenizer has {found.tokenizer.vocab_size} tokens, but its model has only {rows}; "
            "mend that folder"
        )
    found.check(_shapes(config))
    return found


def _where(config: Config) -> str:
    return f"training.init_from ({config.training.init_from})"


def _of_the_run(config: Config) -> dict[str, Any] | None:
    """The architecture of the run that goes on, if there is one that began with the same training.init_from."""
    training = config.training
    resume = training.resume_from_checkpoint
    folder = training.checkpoint_dir if resume in (None, "latest") else f"{resume}/config"
    try:
        text = (Path(folder).expanduser() / "config.json").read_text(encoding="utf-8")
        saved = from_dict(json.loads(text), folder)
    except (OSError, ValueError, UserError):
        return None  # whoever has to read it says what is wrong
    if saved.training.init_from != training.init_from:
        return None
    values = dataclasses.asdict(saved.model)
    return {field: values[field] for field in ARCHITECTURE}


def _adopt(config: Config, fields: dict[str, Any]) -> Config:
    asked = dataclasses.asdict(config.model)
    other = [field for field, value in fields.items() if asked[field] not in (DEFAULTS[field], value)]
    if other:
        said = "; ".join(f"model.{field} is {asked[field]}, there {fields[field]}" for field in other)
        raise UserError(
            f"{_where(config)} has another architecture: {said}. Leave these options out, of the command and of the "
            "file that --config names: a JSON file without a model section has none"
        )
    return dataclasses.replace(config, model=dataclasses.replace(config.model, **fields))


def _agreed_tokenizer(config: Config, theirs: Tokenizer | None) -> Tokenizer:
    path = config.data.tokenizer_path
    own = None if path is None else Tokenizer.load(path)
    if theirs is None and own is None:
        raise UserError(f"{_where(config)}: holds no tokenizer.json; write one there, or set data.tokenizer_path")
    if theirs is not None and own is not None and not theirs.agrees_with(own):
        raise UserError(f"data.tokenizer_path ({path}) is not the tokenizer of {_where(config)}; leave it out")
    return theirs or own  # type: ignore[return-value]


def _shapes(config: Config) -> Params:
    """The abstract parameters of a model of this configuration."""
    from flax import nnx

    from jaxlm.model import Transformer

    return nnx.to_pure_dict(nnx.state(nnx.eval_shape(lambda: Transformer(config.model, rngs=nnx.Rngs(0)))))


def _named(tree: Params) -> dict[str, Any]:
    """{path: leaf}."""
    from flax.traverse_util import flatten_dict

    return flatten_dict(tree, sep="/")


def _open(config: Config) -> Pretrained:
    """What training.init_from names, its configuration and tokenizer read, its parameters not yet."""
    where, name = _where(config), config.training.init_from or ""
    folder = Path(name).expanduser()
    if not os.path.isdir(folder):  # Path's own would raise where a name is too long, or a folder is closed to us
        folder = _fetched(name, where)
    if os.path.isdir(folder / "params"):
        return _OwnFolder(folder, where)
    try:
        saved = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except FileNotFoundError:
        saved = {"training": None}
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{where}: config.json is not readable: {one_line(error)}") from error
    if isinstance(saved, dict) and "training" in saved:  # that of a run, whose models are in folders below
        inside = [f", such as {folder / m}" for m in ("best_model", "final_model") if os.path.isdir(folder / m)]
        raise UserError(
            f"{where}: holds no model; name a best_model, final_model or checkpoint_<step> folder"
            f"{''.join(inside[:1])}, or one that transformers has saved"
        )
    return _HuggingFaceFolder(folder, saved, where)


def _fetched(name: str, where: str) -> Path:
    """The folder of a model on the Hub, downloaded, or from an earlier download where the Hub is out of reach.

    Raises:
      UserError: there is none.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HTTPError, RepositoryNotFoundError

    if not HUB_NAME.fullmatch(name):
        raise UserError(f"{where}: no such folder")
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


class _OwnFolder:
    """A best_model, final_model or checkpoint folder."""

    kind = "of jaxlm"

    def __init__(self, folder: Path, where: str) -> None:
        from jaxlm.checkpoints.items import read_config, read_tokenizer

        self.folder, self.where = folder, where
        try:
            values = dataclasses.asdict(read_config(folder).model)
            self.tokenizer: Tokenizer | None = read_tokenizer(folder)
        except UserError as error:
            raise UserError(f"{where}: {error}") from error
        self.fields = {field: values[field] for field in ARCHITECTURE}

    def check(self, whole: Params) -> None:
        from jaxlm.checkpoints.items import JSON_ITEMS
        from jaxlm.checkpoints.manifest import damage

        wrong = damage(self.folder, ("params", *JSON_ITEMS))
        if wrong is not None:
            raise UserError(f"{self.where}: is damaged: {wrong}; name another")

    def params(self, whole: Params, held: Params, shards: int) -> Params:
        from jaxlm.checkpoints.load import restore_params

        return restore_params(self.folder, held, shards)


class _HuggingFaceFolder:
    """A folder that transformers has saved, with parameters in safetensors."""

    def __init__(self, folder: Path, config: Any, where: str) -> None:
        self.folder, self.where = folder, where
        self.family, self.fields = from_config(config, where)
        self.kind = self.family.architecture
        has_one = os.path.isfile(folder / "tokenizer.json")
        self.tokenizer = Tokenizer.load(folder, where) if has_one else None
        self._tensors: dict[str, Any] = {}  # name without prefix -> a function that reads (a part of) the tensor

    def check(self, whole: Params) -> None:
        from safetensors import SafetensorError, safe_open

        for file in self._files():
            try:
                opened = safe_open(self.folder / file, "numpy")
                for name in opened.keys():  # noqa: SIM118  (it is no dict)
                    self._tensors[name] = opened
            except (OSError, SafetensorError) as error:
                raise UserError(f"{self.where}: {file} is not readable: {one_line(error)}") from error
        stored = {self._here(name): self._tensors[name].get_slice(name) for name in self._tensors}
        expected = dict(self._expected(whole))
        self._check_names(stored, expected)
        for name, shape in expected.items():
            found = stored[name]
            if tuple(found.get_shape()) != shape or found.get_dtype() not in FLOATS:
                raise UserError(
                    f"{self.where}: {name} is {found.get_dtype()} {found.get_shape()}, "
                    f"but by config.json a float of {list(shape)}"
                )

    def _files(self) -> list[str]:
        """The names of its safetensors files."""
        index = self.folder / INDEX
        try:
            if os.path.isfile(index):
                files = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
                return sorted(Path(file).name for file in files)
        except (OSError, ValueError, TypeError, LookupError, AttributeError) as error:
            raise UserError(f"{self.where}: {INDEX} is not readable: {one_line(error)}") from error
        if os.path.isfile(self.folder / ALONE):
            return [ALONE]
        pickled = [name for name in os.listdir(self.folder) if name.endswith((".bin", ".pt", ".pth"))]
        said = f"{pickled[0]} is a pickle, which could run any program; " if pickled else ""
        raise UserError(
            f"{self.where}: holds no {ALONE}; {said}open it with transformers and save it with save_pretrained"
        )

    def _here(self, name: str) -> str:
        """The name with the prefix that a model saved without its head lacks."""
        return name if name.startswith((self.family.prefix, OUTPUT)) else self.family.prefix + name

    def _expected(self, whole: Params) -> Any:
        empty = {path: np.empty(x.shape, np.float32) for path, x in _named(whole).items()}  # takes no memory
        return ((name, tensor.shape) for name, tensor in to_tensors(empty, self.family))

    def _check_names(self, stored: dict[str, Any], expected: dict[str, Any]) -> None:
        missing = [name for name in expected if name not in stored]
        if missing:
            raise UserError(f"{self.where}: lacks {len(missing)} tensor(s) that config.json asks for, as {missing[0]}")
        more = [name for name in stored if name not in expected and not name.endswith(NO_PARAMETERS)]
        if OUTPUT in more and self.fields["tie_embeddings"]:
            more.remove(OUTPUT)  # transformers leaves it out of account, too, unless it differs
            (embedding,) = tensor_names("token_embedding", self.family, None)
            if not np.array_equal(stored[OUTPUT][:], stored[embedding][:]):
                more = [f"an {OUTPUT} of its own, though tie_word_embeddings is true"]
        if more:
            raise UserError(f"{self.where}: has what no {self.kind} has: {more[0]}")

    def params(self, whole: Params, held: Params, shards: int) -> Params:
        import jax

        from jaxlm.parallel.layout import put_whole
        from jaxlm.parallel.split import path_name

        stored = {self._here(name): (opened, name) for name, opened in self._tensors.items()}

        def read(name: str) -> np.ndarray:
            opened, name = stored[name]
            return opened.get_tensor(name)

        def one(path: Any, x: Any, target: Any) -> jax.Array:
            return put_whole(from_tensors(path_name(path), x.shape, self.family, read), target)

        return jax.tree_util.tree_map_with_path(one, whole, held)

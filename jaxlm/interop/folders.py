"""The folders that hold a model: of jaxlm's, or of those that transformers has saved. Parameters are read later.

JAX, and the modules that import it, are imported where they are used: a mistake in options should show at once.
"""

import os
from collections.abc import Iterable
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from jaxlm.checkpoints.items import JSON_ITEMS, read_config, read_tokenizer
from jaxlm.checkpoints.manifest import damage, model_in
from jaxlm.config import DataConfig
from jaxlm.data.special_tokens import read_object
from jaxlm.data.tokenizer import Tokenizer
from jaxlm.errors import UserError, one_line
from jaxlm.interop.families import from_config, from_tensors, tensor_names, to_tensors

INDEX, SINGLE_FILE = "model.safetensors.index.json", "model.safetensors"
FLOATS = ("F32", "F16", "BF16", "F64")
# What old versions saved beside the parameters.
BUFFERS = ("rotary_emb.inv_freq", ".attn.bias", ".attn.masked_bias", ".attention.bias", ".attention.masked_bias")
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

    def __init__(self, folder: Path, config: object, where: str, data: DataConfig) -> None:
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

        zeros = {path: np.broadcast_to(np.float32(0), x.shape) for path, x in flatten_dict(whole, sep="/").items()}
        try:
            shapes = to_tensors(zeros, self.family, self.model.n_heads)
            expected = {name: tensor.shape for name, tensor in shapes}
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
        if self._output in more and self.model.tie_embeddings:
            more.remove(self._output)  # transformers ignores it, too, unless it differs
            (embedding,) = tensor_names("token_embedding", self.family, None)
            if not np.array_equal(self._read(self._output), self._read(embedding)):
                more = [f"an {self._output} of its own, though tie_word_embeddings is true"]
        if more:
            raise UserError(f"{self.where}: has what no {self.kind} has: {more[0]}")

    @property
    def _output(self) -> str:
        return tensor_names("output_embedding", self.family, None)[0]

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
                has_prefix = name.startswith((self.family.prefix, self._output))
                tensors[name if has_prefix else self.family.prefix + name] = opened, name
        if self.model.tie_embeddings and self._output in tensors:  # of two names of one tensor, some keep this one
            tensors.setdefault(tensor_names("token_embedding", self.family, None)[0], tensors[self._output])
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

        heads = self.model.n_heads

        def read(path: Any, x: Any, target: Any) -> jax.Array:
            return put_whole(from_tensors(path_name(path), x.shape, self.family, heads, self._read), target)

        return jax.tree_util.tree_map_with_path(read, whole, held)

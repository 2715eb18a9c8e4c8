"""Adapters as PEFT has them: adapter_config.json and adapter_model.safetensors, written, and read as a part of a model.

Shapes: I inputs and O outputs of a linear layer, N matrices that jaxlm holds as one, R the rank, L layers.
"""

import json
import re
from collections.abc import Iterator, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from jaxlm.config import DataConfig
from jaxlm.data.atomic import atomic_path
from jaxlm.data.special_tokens import read_object
from jaxlm.data.tokenizer import Tokenizer
from jaxlm.errors import UserError, one_line
from jaxlm.interop.architectures import Family
from jaxlm.interop.families import tensor_names
from jaxlm.interop.folders import ADAPTER, HuggingFaceFolder

CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."
WRITTEN = {"peft_type": "LORA", "bias": "none", "use_dora": False, "modules_to_save": None}
# What adapter_config.json may say of an adapter that is alpha / r * B A and nothing else; None: anything.
KNOWN: dict[str, tuple[Any, ...] | None] = {"peft_type": ("LORA",), "bias": ("none",)}
KNOWN |= {"init_lora_weights": (True, "gaussian", "orthogonal", "eva")}  # others change the base as well
KNOWN |= dict.fromkeys(
    (
        "task_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision", "inference_mode", "r",
        "target_modules", "exclude_modules", "lora_alpha", "lora_dropout", "fan_in_fan_out", "use_rslora",
        "layers_to_transform", "layers_pattern", "rank_pattern", "alpha_pattern", "megatron_config", "megatron_core",
        "qalora_group_size", "eva_config", "ensure_weight_tying", "runtime_config",
    )
)  # fmt: skip


def to_peft(params: Mapping[str, np.ndarray], family: Family, heads: int) -> Iterator[tuple[str, np.ndarray]]:
    """(name, tensor) of all adapters among flattened parameters, float32.

    Where jaxlm has N matrices with an adapter each and transformers one tensor (GPT-2's c_attn), it is one adapter of
    rank N * R, whose B is made of blocks, in the order of that tensor's outputs.
    """
    for path in (path.removesuffix("/a") for path in params if path.endswith(f"/{ADAPTER}/a")):
        kernel = path.removesuffix(ADAPTER) + "kernel"
        for layer, (a, b) in enumerate(zip(params[f"{path}/a"], params[f"{path}/b"], strict=True)):
            names = [name.removesuffix(".weight") for name in tensor_names(kernel, family, layer)]
            for name, (down, up) in zip(names, _pairs(a, b, len(names), heads if family.by_head else 1), strict=True):
                yield f"{PREFIX}{name}.lora_A.weight", np.ascontiguousarray(down, np.float32)
                yield f"{PREFIX}{name}.lora_B.weight", np.ascontiguousarray(up, np.float32)


def _pairs(a: np.ndarray, b: np.ndarray, tensors: int, heads: int) -> list[tuple[np.ndarray, np.ndarray]]:
    """[R, I] and [O, R] of each of so many tensors; a joint one has the N matrices' outputs head by head."""
    if a.ndim == 2:
        return [(a.T, b.T)]
    if tensors > 1:
        return [(a[:, i].T, b[i].T) for i in range(tensors)]
    n, rank, outputs = b.shape
    up = np.zeros((n * outputs, n * rank), np.float32)
    for i in range(n):
        up[i * outputs : (i + 1) * outputs, i * rank : (i + 1) * rank] = b[i].T
    order = np.arange(n * outputs).reshape(n, heads, -1).swapaxes(0, 1).ravel()
    return [(a.reshape(len(a), -1).T, up[order])]


def write_adapter(
    params: Mapping[str, np.ndarray],
    family: Family,
    to: Path,
    base: str,
    texts: Mapping[str, str],
    *,
    heads: int,
    rank: int,
    alpha: float,
    dropout: float,
) -> None:
    """Writes the folder `to`, whole or not at all.

    Args:
      params: flattened.
      base: the folder or Hub name of the model that the adapters belong to.
      texts: {name: content} of the tokenizer's files.
      heads: the model's heads of queries.

    Raises:
      OSError, SafetensorError: it can't be written.
    """
    from safetensors.numpy import save_file

    tensors = dict(to_peft(params, family, heads))
    ranks = {_short(name): len(x) for name, x in tensors.items() if ".lora_A." in name}
    others = {name: size for name, size in ranks.items() if size != rank}
    config = WRITTEN | {
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": rank,
        "lora_alpha": alpha,
        "lora_dropout": dropout,
        "target_modules": sorted(ranks),
        "rank_pattern": others,
        "alpha_pattern": {name: alpha * size / rank for name, size in others.items()},
        "fan_in_fan_out": not family.transposed,
        "inference_mode": True,
    }
    to.parent.mkdir(parents=True, exist_ok=True)
    with atomic_path(to) as folder:
        folder.mkdir()
        for name, text in {**texts, CONFIG: json.dumps(config, indent=2) + "\n"}.items():
            (folder / name).write_text(text, encoding="utf-8")
        save_file(tensors, folder / TENSORS, metadata={"format": "pt"})
        (folder / TENSORS).chmod((folder / CONFIG).stat().st_mode)


def _short(name: str) -> str:
    """The last two parts of a module's name, such as attn.c_proj, by which PEFT finds it in all layers."""
    return ".".join(re.sub(r"\.lora_[AB]\.weight$", "", name).split(".")[-2:])


def _is_plain(key: str, value: object) -> bool:
    """Whether an entry of adapter_config.json leaves the adapter what it is here."""
    if key not in KNOWN:
        return False
    values = KNOWN[key]
    return values is None or value in values


class PeftFolder(HuggingFaceFolder):
    """A folder of PEFT's beside the model that it belongs to: a model with the adapters added to its matrices."""

    def __init__(self, folder: Path, base: HuggingFaceFolder, where: str, data: DataConfig) -> None:
        vars(self).update(vars(base))
        self.where, self._adapter = where, read_object(folder / CONFIG, where)
        self._path = folder / TENSORS
        self.kind = f"{base.kind}, with adapters of PEFT"
        self.tokenizer = Tokenizer.find(folder, where, data) or base.tokenizer
        wrong = [key for key, value in self._adapter.items() if value and not _is_plain(key, value)]
        if wrong:
            named = ", ".join(f"{key} {json.dumps(self._adapter[key])}" for key in wrong)
            raise UserError(f"{where}: jaxlm adds no adapters with {named}")

    @cached_property
    def _added(self) -> dict[str, tuple[np.ndarray, np.ndarray]]:
        """{name of a tensor of the base: A [R, I] and B [O, R]}."""
        from safetensors import SafetensorError
        from safetensors.numpy import load_file

        try:
            found = load_file(self._path)
        except (OSError, SafetensorError) as error:
            raise UserError(f"{self.where}: {TENSORS} is not readable: {one_line(error)}") from error
        pairs: dict[str, dict[str, np.ndarray]] = {}
        for name, tensor in found.items():
            match = re.fullmatch(rf"{re.escape(PREFIX)}(.+)\.lora_([AB])\.weight", name)
            if match is None or f"{match[1]}.weight" not in self._tensors:
                raise UserError(f"{self.where}: has what no {self.family.architecture} has: {name}")
            pairs.setdefault(f"{match[1]}.weight", {})[match[2]] = tensor.astype(np.float32)
        for name, pair in pairs.items():
            if len(pair) < 2:
                raise UserError(f"{self.where}: {name} has one of lora_A and lora_B only")
            a, b = pair["A"], pair["B"]
            if not (a.ndim == b.ndim == 2 and len(a) == b.shape[1]):
                raise UserError(f"{self.where}: lora_A {a.shape} and lora_B {b.shape} of {name} have no product")
        return {name: (pair["A"], pair["B"]) for name, pair in pairs.items()}

    def check(self, whole: Any) -> None:
        """As that of the base, and whether the adapters are of it."""
        super().check(whole)
        for name, (a, b) in self._added.items():
            self._scale(name, len(a))
            opened, stored = self._tensors[name]
            shape, delta = tuple(opened.get_slice(stored).get_shape()), (len(b), a.shape[1])
            if (delta if self.family.transposed else delta[::-1]) != shape:
                raise UserError(f"{self.where}: the adapter of {name} adds {delta}, and the base has {shape}")

    def _scale(self, name: str, rank: int) -> float:
        module = name.removesuffix(".weight")
        patterns = self._adapter.get("alpha_pattern") or {}
        try:
            of_module = (x for key, x in patterns.items() if re.match(rf"(.*\.)?({key})$", module))
            alpha: Any = next(of_module, self._adapter.get("lora_alpha"))
            return float(alpha) / (rank**0.5 if self._adapter.get("use_rslora") else rank)
        except (AttributeError, TypeError, ValueError, re.error) as error:
            raise UserError(f"{self.where}: {CONFIG} has no usable lora_alpha for {module}: {error}") from error

    def _read(self, name: str) -> np.ndarray:
        tensor = super()._read(name)
        if name not in self._added:
            return tensor
        a, b = self._added[name]
        delta = self._scale(name, len(a)) * (b @ a)
        return tensor.astype(np.float32) + (delta if self.family.transposed else delta.T)

"""The tables of `architectures`, read both ways.

`to_config` and `from_config` translate config.json, `to_tensors` and `from_tensors` the parameters, which are named by
their paths, such as "blocks/mlp/up/kernel"; those of blocks have a leading layer axis. Needs no JAX or transformers.

Shapes: I inputs and O outputs of a linear layer, N tensors that jaxlm holds as one parameter.
"""

import dataclasses
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import numpy as np

from jaxlm.config import Config, ModelConfig, check_fields, shown
from jaxlm.errors import UserError
from jaxlm.interop.architectures import DROPOUTS, FAMILIES, ROPE_FIXED, ROPE_TYPES, Family


def family_for(model: ModelConfig, where: str) -> Family:
    """The class that computes what a model of this configuration does.

    Raises:
      UserError: there is none; `where` begins the message, which names the options that stand in the way.
    """
    values = dataclasses.asdict(model)
    values |= vars(_plainest(model))
    unlike = {}  # architecture -> the options whose values the class doesn't have
    for architecture, family in FAMILIES.items():
        expressible = {field: (value,) for field, value in family.implied.items()} | {"activation": family.activations}
        others = [field for field, choices in expressible.items() if values[field] not in choices]
        unlike[architecture] = [f"model.{field} {shown(values[field])}" for field in others]
    closest = min(unlike, key=lambda architecture: len(unlike[architecture]))
    if unlike[closest]:
        raise UserError(
            f"{where} fits none of transformers' {', '.join(FAMILIES)}; "
            f"the closest, {closest}, has no {', '.join(unlike[closest])}"
        )
    return FAMILIES[closest]


def to_config(model: ModelConfig, family: Family) -> dict[str, Any]:
    """config.json of the model, without its tokens and dtype."""
    activation = family.activations[model.activation].split()[0]
    values = dataclasses.asdict(model) | {"n_kv_heads": model.kv_heads, "activation": activation}
    config = {
        "architectures": [family.architecture],
        "model_type": family.model_type,
        **{key: values[field] for field, keys in family.keys.items() for key in keys.split()},
        **{key: values[field] for key, field in family.dropouts.items()},
        **family.required,
    }
    if not family.rotary:
        return config
    kind = model.rope_scaling or "default"
    scaling = {"rope_type": kind, **{key: values[field] for key, field in ROPE_TYPES[kind].items()}}
    return config | {
        "rope_parameters": {"rope_theta": model.rope_theta, **scaling},  # as transformers 5 has it
        "rope_theta": model.rope_theta,  # this and the next: as transformers 4 has it
        "rope_scaling": scaling if model.rope_scaling else None,
        "head_dim": model.head_size,
    }


def from_config(config: Any, where: str) -> tuple[Family, ModelConfig]:
    """The class of the model in config.json, its architecture, and its dropouts where that has one value for each.

    Args:
      config: the value in config.json.
      where: begins the messages of errors.

    Raises:
      UserError: it is of another class, or has something that jaxlm has no option for.
    """
    if not isinstance(config, dict):
        raise UserError(f"{where}: config.json holds no object")
    family = _family_of(config, where)
    values = {**family.defaults, **config}
    missing = [key for keys in family.keys.values() for key in keys.split() if key not in values]
    if missing:
        raise UserError(f"{where}: config.json of a {family.architecture} lacks {', '.join(missing)}")
    fields = {field: values[keys.split()[0]] for field, keys in family.keys.items()}
    theirs = fields.pop("activation")
    activations = [ours for ours, names in family.activations.items() if theirs in names.split()]
    if fields["d_ff"] is None and isinstance(fields["d_model"], int):
        fields["d_ff"] = 4 * fields["d_model"]
    window = _window(family, values)
    if isinstance(window, int) and isinstance(fields["max_seq_len"], int):
        fields["max_seq_len"] = min(fields["max_seq_len"], window)  # within it, attention is to all before
    rope, refused = _from_rope(values) if family.rotary else ({}, [])
    rates = {of: [values[key] for key, field in family.dropouts.items() if field == of] or [0.0] for of in DROPOUTS}
    agreed = {field: found[0] for field, found in rates.items() if found == found[:1] * len(found)}
    model = ModelConfig(**fields, **family.implied, **rope, **agreed)
    try:
        check_fields(Config(model=model))
    except UserError as error:
        raise UserError(f"{where}: {error}") from error
    refused += _refused(family, values)
    if not activations:
        refused.append(_named(family.keys["activation"], values))
    if refused:
        raise UserError(f"{where}: jaxlm has no {family.architecture} with {', '.join(refused)}")
    return family, _plainest(dataclasses.replace(model, activation=activations[0]))


def _plainest(model: ModelConfig) -> ModelConfig:
    """The same model, with none where an option says what it is without it."""
    equal: dict[str, Any] = {
        "n_kv_heads": model.n_heads,
        "head_dim": model.d_model / model.n_heads,
        "qkv_bias": model.use_bias,
    }
    unsaid: dict[str, Any] = {name: None for name, x in equal.items() if vars(model)[name] == x}
    return dataclasses.replace(model, **unsaid)


def _family_of(config: dict[str, Any], where: str) -> Family:
    architectures = config.get("architectures")
    if isinstance(architectures, list) and architectures and isinstance(architectures[0], str):
        name = architectures[0]
    else:
        model_type = config.get("model_type")
        names = [family.architecture for family in FAMILIES.values() if family.model_type == model_type]
        name = names[0] if names else f"model of type {model_type!r}"
    if name not in FAMILIES:
        raise UserError(f"{where}: is a {name}; jaxlm reads {', '.join(FAMILIES)}")
    return FAMILIES[name]


def _refused(family: Family, values: dict[str, Any]) -> list[str]:
    """The settings of the model, beside activation and positions, that no option of jaxlm expresses."""
    refused = [_named(key, values) for key, value in family.required.items() if values.get(key, value) != value]
    for keys in map(str.split, family.keys.values()):
        if any(values[key] != values[keys[0]] for key in keys):
            refused.append(" and ".join(_named(key, values) for key in keys))
    if values.get("quantization_config") is not None:
        refused.append("quantized weights")
    if not family.rotary:
        return refused
    window, layer_types = _window(family, values), values.get("layer_types")
    if window is not None and not isinstance(window, int):
        refused.append(_named("sliding_window", values))
    if layer_types is not None and layer_types != ["full_attention"] * values["num_hidden_layers"]:
        refused.append(_named("layer_types", values))
    return refused


def _window(family: Family, values: dict[str, Any]) -> Any:
    """How far back attention looks; None: to the first token."""
    return values.get("sliding_window") if family.rotary and values.get("use_sliding_window") is not False else None


def _from_rope(values: dict[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """The fields of rotary positions, and the settings of them that no option of jaxlm expresses."""
    rope = values.get("rope_parameters") or values.get("rope_scaling") or {}
    if not isinstance(rope, dict):
        return {}, [f"rope_parameters {json.dumps(rope)}"]
    rope = {"rope_theta": values.get("rope_theta", 10000.0)} | {key: v for key, v in rope.items() if v is not None}
    old_name = rope.pop("type", "default")
    kind = str(rope.pop("rope_type", old_name))
    if kind not in ROPE_TYPES:
        return {}, [f"rope_type {kind}"]
    rope.setdefault("original_max_position_embeddings", values["max_position_embeddings"])
    fields = {"rope_theta": "rope_theta", **ROPE_TYPES[kind]}
    refused = [f"rope_type {kind} without {key}" for key in fields if key not in rope]
    unknown = [key for key in rope if key not in (*fields, "original_max_position_embeddings")]
    refused += [f"{_named(key, rope)} of rope_type {kind}" for key in unknown if rope[key] != ROPE_FIXED.get(key)]
    found = {field: rope[key] for key, field in fields.items() if key in rope}
    return {**found, "rope_scaling": None if kind == "default" else kind}, refused


def _named(key: str, values: dict[str, Any]) -> str:
    return f"{key} {json.dumps(values[key])}"


def tensor_names(path: str, family: Family, layer: int | None) -> list[str]:
    """The N tensors that make up the parameter at `path`, in one layer; KeyError: the class has no such parameter."""
    module, _, leaf = path.rpartition("/")
    if not module:  # an embedding is a parameter of its own here, and a module in transformers
        module, leaf = path, "weight"
    names = [name.format(layer) for name in family.modules[module].split()]
    kind = "bias" if leaf == "bias" else "weight"
    return [f"{'' if name == 'lm_head' else family.prefix}{name}.{kind}" for name in names]


def _split(x: np.ndarray, path: str, n: int, family: Family) -> list[np.ndarray]:
    """The `n` tensors of one layer's parameter, as views where that is possible."""
    is_kernel = path.endswith("/kernel")
    parts = [x[..., i, :] for i in range(n)] if n > 1 else [x]
    if is_kernel:  # one tensor may hold several matrices: [I, N, O] -> [I, N * O]
        parts = [part.reshape(part.shape[0], -1) for part in parts]
    elif path.startswith("blocks/"):
        parts = [part.reshape(-1) for part in parts]
    return [part.T for part in parts] if is_kernel and family.transposed else parts


def to_tensors(params: Mapping[str, np.ndarray], family: Family) -> Iterator[tuple[str, np.ndarray]]:
    """(name, tensor) for all parameters, in their dtype; KeyError: the class has no such parameter."""
    for path, x in params.items():
        layers: Iterable[tuple[int | None, np.ndarray]] = enumerate(x) if path.startswith("blocks/") else [(None, x)]
        for layer, part in layers:
            names = tensor_names(path, family, layer)
            yield from zip(names, _split(part, path, len(names), family), strict=True)


def from_tensors(path: str, shape: tuple[int, ...], family: Family, read: Callable[[str], np.ndarray]) -> np.ndarray:
    """The parameter at `path`, float32 of `shape`, from the tensors that `read` returns by name."""
    x = np.empty(shape, np.float32)
    for name, view in to_tensors({path: x}, family):
        view[...] = read(name)  # into `x`: no reshaping or transposing of a contiguous array copies
    return x

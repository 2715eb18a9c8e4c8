"""The tables of `architectures`, read both ways.

`to_config` and `from_config` translate config.json, `to_tensors` and `from_tensors` the parameters, which are named by
their paths, such as "blocks/mlp/up/kernel"; those of blocks have a leading layer axis. Needs no JAX or transformers.

Shapes: I inputs and O outputs of a linear layer, N matrices that jaxlm holds as one parameter.
"""

import dataclasses
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import numpy as np

from jaxlm.config import Config, ModelConfig, check_fields, shown
from jaxlm.errors import UserError
from jaxlm.interop.architectures import DROPOUTS, FAMILIES, PARTIAL, ROPE_FIXED, ROPE_TYPES, Family

_ROPE_FIELDS = {"rope_theta": "rope_theta", PARTIAL: "rotary_fraction"}  # of all types of rotary positions


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
    values["head_dim"] = model.head_size
    config = {
        "architectures": [family.architecture],
        "model_type": family.model_type,
        **{key: values[field] for field, keys in family.keys.items() for key in keys.split()},
        **{key: values[field] for key, field in family.dropouts.items()},
        **family.required,
    }
    if not family.rope:
        return config
    if "sliding_window" in family.defaults:
        config["sliding_window"] = model.max_seq_len
    kind = model.rope_scaling or "default"
    scaling = {"rope_type": kind, **{key: values[field] for key, field in ROPE_TYPES[kind].items()}}
    plain = {key: values[_ROPE_FIELDS[key]] for key in family.rope}
    return config | {
        "rope_parameters": {**plain, **scaling},  # as transformers 5 has it
        **{family.rope[key]: value for key, value in plain.items()},  # this and the next: as transformers 4 has it
        "rope_scaling": scaling if model.rope_scaling else None,
        "head_dim": model.head_size,
    }


def from_config(config: object, where: str) -> tuple[Family, ModelConfig]:
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
    rope, refused = _from_rope(values, family) if family.rope else ({}, [])
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
    refused = [_named(key, values) for key, value in family.required.items() if bool(values.get(key, value)) != value]
    for keys in map(str.split, family.keys.values()):
        if any(values[key] != values[keys[0]] for key in keys):
            refused.append(" and ".join(_named(key, values) for key in keys))
    if values.get("quantization_config") is not None:
        refused.append("quantized weights")
    if not family.rope:
        return refused
    window, layer_types = _window(family, values), values.get("layer_types")
    if window is not None and not isinstance(window, int):
        refused.append(_named("sliding_window", values))
    kinds = ["full_attention"] if window is None else ["full_attention", "sliding_attention"]
    if layer_types is not None and any(kind not in kinds for kind in layer_types):
        refused.append(_named("layer_types", values))
    return refused


def _window(family: Family, values: dict[str, Any]) -> Any:
    """How far back attention looks; None: to the first token."""
    return values.get("sliding_window") if family.rope and values.get("use_sliding_window") is not False else None


def _from_rope(values: dict[str, Any], family: Family) -> tuple[dict[str, Any], list[str]]:
    """The fields of rotary positions, and the settings of them that no option of jaxlm expresses."""
    rope = values.get("rope_parameters") or values.get("rope_scaling") or {}
    if not isinstance(rope, dict):
        return {}, [f"rope_parameters {json.dumps(rope)}"]
    old = {key: values[name] for key, name in family.rope.items()}
    rope = old | {key: value for key, value in rope.items() if value is not None}
    old_name = rope.pop("type", "default")
    kind = str(rope.pop("rope_type", old_name))
    if kind not in ROPE_TYPES:
        return {}, [f"rope_type {kind}"]
    rope.setdefault("original_max_position_embeddings", values["max_position_embeddings"])
    fields = {key: _ROPE_FIELDS[key] for key in family.rope} | ROPE_TYPES[kind]
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
    return [f"{'' if module == 'output_embedding' else family.prefix}{name}.{kind}" for name in names]


def _views(
    x: np.ndarray, path: str, n: int, family: Family, heads: int
) -> Iterator[tuple[np.ndarray, tuple[int, ...]]]:
    """(view, shape) for the `n` tensors of one layer's parameter: the view has the tensor's order, if not its shape."""
    by_head = family.by_head and path.startswith("blocks/attention/qkv/")
    if by_head:  # [..., 3, heads * K] -> [..., heads, 3, K]
        x = x.reshape(*x.shape[:-1], heads, -1).swapaxes(-3, -2)
    is_kernel = path.endswith("/kernel")
    for part in [x[..., i, :] for i in range(n)] if n > 1 else [x]:
        shape = part.shape
        if is_kernel:  # one tensor may hold several matrices: [I, N, O] -> [I, N * O]
            shape = (len(part), part[0].size)
        elif path.startswith("blocks/"):
            shape = (part.size,)
        if is_kernel and family.transposed:
            part, shape = np.moveaxis(part, 0, -1), shape[::-1]
        yield part, shape


def _all_views(
    params: Mapping[str, np.ndarray], family: Family, heads: int
) -> Iterator[tuple[str, str, np.ndarray, tuple[int, ...]]]:
    """(path, name, view, shape) for all parameters."""
    for path, x in params.items():
        layers: Iterable[tuple[int | None, np.ndarray]] = enumerate(x) if path.startswith("blocks/") else [(None, x)]
        for layer, part in layers:
            names = tensor_names(path, family, layer)
            for name, view in zip(names, _views(part, path, len(names), family, heads), strict=True):
                yield path, name, *view


def _offset(path: str, family: Family) -> float:
    return family.norm_offset if path.endswith("/scale") else 0.0


def to_tensors(params: Mapping[str, np.ndarray], family: Family, heads: int) -> Iterator[tuple[str, np.ndarray]]:
    """(name, tensor) for all parameters, in their dtype; KeyError: the class has no such parameter.

    Tensors are views where that is possible. `heads` are those of queries.
    """
    for path, name, view, shape in _all_views(params, family, heads):
        offset = _offset(path, family)
        yield name, (view - view.dtype.type(offset) if offset else view).reshape(shape)


def from_tensors(
    path: str, shape: tuple[int, ...], family: Family, heads: int, read: Callable[[str], np.ndarray]
) -> np.ndarray:
    """The parameter at `path`, float32 of `shape`, from the tensors that `read` returns by name."""
    x = np.empty(shape, np.float32)
    for _, name, view, _ in _all_views({path: x}, family, heads):
        view[...] = read(name).reshape(view.shape)  # into `x`: no reshaping of a contiguous array copies
    return x + np.float32(_offset(path, family)) if _offset(path, family) else x

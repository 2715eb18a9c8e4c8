"""The models of Hugging Face's `transformers` that jaxlm's options express: config.json and tensors, both ways.

Each class is one `Family`, a table that is read in both directions. Needs neither torch nor transformers, nor JAX.

Shapes: D model width, I and O what a linear layer takes and gives, N matrices that jaxlm holds as one.
A parameter is named by its path, such as "blocks/mlp/up/kernel"; those of the blocks have a leading layer axis.
"""

import dataclasses
import typing
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np

from jaxlm.config import ModelConfig
from jaxlm.config.validate import check_field
from jaxlm.errors import UserError

# What a run may choose for itself, whatever the model that it starts from.
_CHOSEN = ("dropout", "attention_dropout", "gradient_checkpointing", "remat_policy", "scan_layers", "attention")
ARCHITECTURE = tuple(f.name for f in dataclasses.fields(ModelConfig) if f.name not in _CHOSEN)
HINTS = typing.get_type_hints(ModelConfig)
DEFAULTS = {f.name: f.default for f in dataclasses.fields(ModelConfig)}

PLAIN = {"gelu": "gelu_new gelu_pytorch_tanh gelu_fast", "gelu_exact": "gelu", "relu": "relu", "swish": "silu swish"}
GATED = {"swiglu": "silu swish", "geglu": "gelu_pytorch_tanh gelu_new gelu_fast"}

# Of each rope_type, the keys in `rope_parameters` and the fields of ModelConfig; and the one value of other keys.
ROPE_TYPES: dict[str, dict[str, str]] = {
    "default": {},
    "linear": {"factor": "rope_scaling_factor"},
    "llama3": {
        "factor": "rope_scaling_factor",
        "original_max_position_embeddings": "rope_original_length",
        "low_freq_factor": "rope_low_freq_factor",
        "high_freq_factor": "rope_high_freq_factor",
    },
    "yarn": {"factor": "rope_scaling_factor", "original_max_position_embeddings": "rope_original_length"},
}
ROPE_FIXED = {"beta_fast": 32, "beta_slow": 1, "truncate": True, "partial_rotary_factor": 1}

# Buffers that old versions saved beside the parameters.
NO_PARAMETERS = (".attn.bias", ".attn.masked_bias", "rotary_emb.inv_freq")


@dataclasses.dataclass(frozen=True)
class Family:
    """One class of transformers, `architecture`, as jaxlm's options have it."""

    architecture: str
    model_type: str
    keys: Mapping[str, str]  # field of ModelConfig -> key of config.json, or several that must agree
    implied: Mapping[str, Any]  # fields that are the same in all models of the class
    activation: str  # key of the activation
    activations: Mapping[str, str]  # its values here -> there; the first one is written
    dropouts: Mapping[str, str]  # key -> the field that it is written from
    fixed: Mapping[str, Any]  # keys for whose other values jaxlm has no option
    left_out: Mapping[str, Any]  # what transformers takes for a key that is missing
    modules: Mapping[str, str]  # here -> there, or several there that are one here
    prefix: str  # of all modules there but the output projection
    transposed: bool  # matrices are [O, I] there, not [I, O]

    @property
    def rotary(self) -> bool:
        return self.implied["positions"] == "rotary"


GPT2 = Family(
    architecture="GPT2LMHeadModel",
    model_type="gpt2",
    keys={
        "vocab_size": "vocab_size",
        "d_model": "n_embd",
        "n_heads": "n_head",
        "n_layers": "n_layer",
        "d_ff": "n_inner",
        "max_seq_len": "n_positions",
        "norm_epsilon": "layer_norm_epsilon",
        "tie_embeddings": "tie_word_embeddings",
    },
    implied={
        "n_kv_heads": None,
        "norm": "layernorm",
        "use_bias": True,
        "pre_norm": True,
        "positions": "learned",
        "qk_norm": False,
        "logit_softcap": None,
    },
    activation="activation_function",
    activations=PLAIN,
    dropouts={"embd_pdrop": "dropout", "resid_pdrop": "dropout", "attn_pdrop": "attention_dropout"},
    fixed={"scale_attn_weights": True, "scale_attn_by_inverse_layer_idx": False, "add_cross_attention": False},
    left_out={
        "n_inner": None,  # four times the width
        "activation_function": "gelu_new",
        "layer_norm_epsilon": 1e-5,
        "tie_word_embeddings": True,
    },
    modules={
        "token_embedding": "wte",
        "position_embedding": "wpe",
        "blocks/norm1": "h.{}.ln_1",
        "blocks/attention/qkv": "h.{}.attn.c_attn",
        "blocks/attention/out": "h.{}.attn.c_proj",
        "blocks/norm2": "h.{}.ln_2",
        "blocks/mlp/up": "h.{}.mlp.c_fc",
        "blocks/mlp/down": "h.{}.mlp.c_proj",
        "final_norm": "ln_f",
        "output_embedding": "lm_head",
    },
    prefix="transformer.",
    transposed=False,
)

LLAMA = Family(
    architecture="LlamaForCausalLM",
    model_type="llama",
    keys={
        "vocab_size": "vocab_size",
        "d_model": "hidden_size",
        "n_heads": "num_attention_heads",
        "n_kv_heads": "num_key_value_heads",
        "n_layers": "num_hidden_layers",
        "d_ff": "intermediate_size",
        "max_seq_len": "max_position_embeddings",
        "norm_epsilon": "rms_norm_eps",
        "use_bias": "attention_bias mlp_bias",
        "tie_embeddings": "tie_word_embeddings",
    },
    implied={
        "norm": "rmsnorm",
        "pre_norm": True,
        "positions": "rotary",
        "qk_norm": False,
        "logit_softcap": None,
    },
    activation="hidden_act",
    activations=GATED,
    dropouts={"attention_dropout": "attention_dropout"},
    fixed={},
    left_out={
        "num_key_value_heads": None,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-6,
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": False,
    },
    modules={
        "token_embedding": "embed_tokens",
        "blocks/norm1": "layers.{}.input_layernorm",
        "blocks/attention/qkv": "layers.{0}.self_attn.q_proj layers.{0}.self_attn.k_proj layers.{0}.self_attn.v_proj",
        "blocks/attention/q": "layers.{}.self_attn.q_proj",
        "blocks/attention/kv": "layers.{0}.self_attn.k_proj layers.{0}.self_attn.v_proj",
        "blocks/attention/out": "layers.{}.self_attn.o_proj",
        "blocks/norm2": "layers.{}.post_attention_layernorm",
        "blocks/mlp/up": "layers.{0}.mlp.gate_proj layers.{0}.mlp.up_proj",
        "blocks/mlp/down": "layers.{}.mlp.down_proj",
        "final_norm": "norm",
        "output_embedding": "lm_head",
    },
    prefix="model.",
    transposed=True,
)


def _like_llama(architecture: str, model_type: str, implied: dict[str, Any], **more: Any) -> Family:
    """A class that differs from Llama by what is `implied`; none of these has biases in all linear layers."""
    keys = {field: key for field, key in LLAMA.keys.items() if field != "use_bias"}
    implied = {**LLAMA.implied, "use_bias": False, **implied}
    return dataclasses.replace(
        LLAMA, architecture=architecture, model_type=model_type, keys=keys, implied=implied, **more
    )


MISTRAL = _like_llama(
    "MistralForCausalLM",
    "mistral",
    {},
    left_out={**LLAMA.left_out, "num_key_value_heads": 8, "sliding_window": 4096},
)
QWEN3 = _like_llama(
    "Qwen3ForCausalLM",
    "qwen3",
    {"qk_norm": True},
    fixed={"attention_bias": False, "use_sliding_window": False},
    left_out={**LLAMA.left_out, "num_key_value_heads": 32, "head_dim": 128},
    modules={
        **LLAMA.modules,
        "blocks/attention/q_norm": "layers.{}.self_attn.q_norm",
        "blocks/attention/k_norm": "layers.{}.self_attn.k_norm",
    },
)
FAMILIES = {family.architecture: family for family in (GPT2, LLAMA, MISTRAL, QWEN3)}  # the first that fits is written


# -------------------------------------------------------------------- from jaxlm


def family_for(model: ModelConfig, where: str) -> Family:
    """The class that computes what a model of this configuration does.

    Raises:
      UserError: there is none; `where` begins the message, which names the options that stand in the way.
    """
    lacking = {architecture: _lacking(model, family) for architecture, family in FAMILIES.items()}
    closest = min(lacking, key=lambda architecture: len(lacking[architecture]))
    if lacking[closest]:
        raise UserError(
            f"{where} fits none of transformers' {', '.join(FAMILIES)}; "
            f"the closest, {closest}, has no {', '.join(lacking[closest])}"
        )
    return FAMILIES[closest]


def _lacking(model: ModelConfig, family: Family) -> list[str]:
    values = dataclasses.asdict(model)
    values["n_kv_heads"] = None if model.kv_heads == model.n_heads else model.n_kv_heads
    unlike = [field for field, value in family.implied.items() if values[field] != value]
    if model.activation not in family.activations:
        unlike.append("activation")
    return [f"model.{field} {_shown(values[field])}" for field in unlike]


def _shown(value: Any) -> str:
    return str(value).lower() if value is None or isinstance(value, bool) else str(value)


def to_config(model: ModelConfig, family: Family) -> dict[str, Any]:
    """What config.json says about the model, by the keys of transformers."""
    values = dataclasses.asdict(model) | {"n_kv_heads": model.kv_heads}
    named = {key: values[field] for field, keys in family.keys.items() for key in keys.split()}
    return {
        "architectures": [family.architecture],
        "model_type": family.model_type,
        **named,
        family.activation: family.activations[model.activation].split()[0],
        **{key: values[field] for key, field in family.dropouts.items()},
        **family.fixed,
        **(_to_rope(values) | {"head_dim": model.d_model // model.n_heads} if family.rotary else {}),
    }


def _to_rope(values: dict[str, Any]) -> dict[str, Any]:
    """As transformers 5 has it, `rope_parameters`, and as 4 has it, `rope_theta` and `rope_scaling`."""
    kind = values["rope_scaling"] or "default"
    scaling = {"rope_type": kind, **{key: values[field] for key, field in ROPE_TYPES[kind].items()}}
    old = {"rope_theta": values["rope_theta"], "rope_scaling": scaling if values["rope_scaling"] else None}
    return {**old, "rope_parameters": {"rope_theta": values["rope_theta"], **scaling}}


# -------------------------------------------------------------------- to jaxlm


def from_config(config: Any, where: str) -> tuple[Family, dict[str, Any]]:
    """The class of the model that config.json describes, and the fields of ModelConfig in `ARCHITECTURE`.

    Args:
      config: what config.json holds.
      where: begins the messages of errors.

    Raises:
      UserError: it is of another class, or has something that jaxlm has no option for.
    """
    if not isinstance(config, dict):
        raise UserError(f"{where}: config.json holds no object")
    family = _family_of(config, where)
    values = {**family.left_out, **config}
    missing = [key for keys in family.keys.values() for key in keys.split() if key not in values]
    if missing:
        raise UserError(f"{where}: config.json of a {family.architecture} lacks {', '.join(missing)}")
    fields = {field: values[keys.split()[0]] for field, keys in family.keys.items()}
    if fields["d_ff"] is None:
        fields["d_ff"] = 4 * _checked(fields, "d_model", where)
    for field in fields:
        _checked(fields, field, where)
    rope, refused = _from_rope(values) if family.rotary else ({}, [])
    refused += _refused(family, values)
    if refused:
        raise UserError(f"{where}: jaxlm has no {family.architecture} with {', '.join(refused)}")
    if family.rotary and fields["n_kv_heads"] == fields["n_heads"]:
        fields["n_kv_heads"] = None
    fields |= {**family.implied, "activation": _activation(family, values), **rope}
    fields = {field: fields.get(field, DEFAULTS[field]) for field in ARCHITECTURE}
    for field in fields:
        _checked(fields, field, where)
    return family, fields


def _family_of(config: dict[str, Any], where: str) -> Family:
    named = config.get("architectures")
    name = named[0] if isinstance(named, list) and named and isinstance(named[0], str) else None
    if name is None:
        found = [family for family in FAMILIES.values() if family.model_type == config.get("model_type")]
        name = found[0].architecture if found else f"model of type {config.get('model_type')!r}"
    if name not in FAMILIES:
        raise UserError(f"{where}: is a {name}; jaxlm reads {', '.join(FAMILIES)}")
    return FAMILIES[name]


def _refused(family: Family, values: dict[str, Any]) -> list[str]:
    """What the model has that no option of jaxlm does."""
    refused = [_named(key, values) for key, value in family.fixed.items() if values.get(key, value) != value]
    for keys in map(str.split, family.keys.values()):
        if any(values[key] != values[keys[0]] for key in keys):
            refused.append(" and ".join(_named(key, values) for key in keys))
    if _activation(family, values) is None:
        refused.append(_named(family.activation, values))
    if values.get("quantization_config") is not None:
        refused.append("quantized weights")
    return refused + (_refused_attention(values) if family.rotary else [])


def _named(key: str, values: dict[str, Any]) -> str:
    return f"{key} {_shown(values[key])}"


def _activation(family: Family, values: dict[str, Any]) -> str | None:
    theirs = values[family.activation]
    return next((ours for ours, names in family.activations.items() if theirs in names.split()), None)


def _refused_attention(values: dict[str, Any]) -> list[str]:
    """Heads of another size than width / heads, and a window of attention that is shorter than the context."""
    size, window, kinds = values.get("head_dim"), values.get("sliding_window"), values.get("layer_types")
    refused = []
    if size is not None and size != values["hidden_size"] / values["num_attention_heads"]:
        refused.append("head_dim")
    slides = window is not None and values.get("use_sliding_window") is not False
    if slides and not (isinstance(window, int) and window >= values["max_position_embeddings"]):
        refused.append("sliding_window")
    if kinds is not None and kinds != ["full_attention"] * values["num_hidden_layers"]:
        refused.append("layer_types")
    return [_named(key, values) for key in refused]


def _from_rope(values: dict[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """The fields of rotary positions; and what in them jaxlm has no option for."""
    rope = values.get("rope_parameters") or values.get("rope_scaling") or {}
    if not isinstance(rope, dict):
        return {}, [f"rope_parameters {rope!r}"]
    rope = {"rope_theta": values.get("rope_theta", 10000.0)} | {key: v for key, v in rope.items() if v is not None}
    old_name = rope.pop("type", "default")
    kind = str(rope.pop("rope_type", old_name))
    if kind not in ROPE_TYPES:
        return {}, [f"rope_type {kind}"]
    named = {"rope_theta": "rope_theta", **ROPE_TYPES[kind]}
    rope.setdefault("original_max_position_embeddings", values["max_position_embeddings"])
    refused = [f"rope_type {kind} without {key}" for key in named if key not in rope]
    unknown = [key for key in rope if key not in (*named, "original_max_position_embeddings")]
    refused += [f"{_named(key, rope)} of rope_type {kind}" for key in unknown if rope[key] != ROPE_FIXED.get(key)]
    fields = {field: rope[key] for key, field in named.items() if key in rope}
    return {**fields, "rope_scaling": None if kind == "default" else kind}, refused


def _checked(fields: dict[str, Any], name: str, where: str) -> Any:
    """The value of a field; UserError where it has another type, or is out of bounds."""
    declared = next(field for field in dataclasses.fields(ModelConfig) if field.name == name)
    check_field(f"{where}: model.{name}", declared, HINTS[name], fields[name])
    return fields[name]


# -------------------------------------------------------------------- tensors


def tensor_names(path: str, family: Family, layer: int | None) -> list[str]:
    """What the parameter at `path` is called there: one tensor, or the N that are one here; KeyError: it has none."""
    module, _, leaf = path.rpartition("/")
    if not module:  # an embedding is a parameter of its own here, and a module there
        module, leaf = path, "weight"
    parts = [part.format(layer) for part in family.modules[module].split()]
    kind = "bias" if leaf == "bias" else "weight"
    return [f"{'' if part == 'lm_head' else family.prefix}{part}.{kind}" for part in parts]


def _to_theirs(x: np.ndarray, path: str, parts: int, family: Family) -> list[np.ndarray]:
    """One parameter of one layer -> its tensors there, as views where that is possible."""
    is_kernel = path.endswith("/kernel")
    whole = [x[..., i, :] for i in range(parts)] if parts > 1 else [x]
    if is_kernel:  # [I, N, O] in one: [I, N * O]
        whole = [part.reshape(part.shape[0], -1) for part in whole]
    elif path.startswith("blocks/"):
        whole = [part.reshape(-1) for part in whole]
    return [part.T for part in whole] if is_kernel and family.transposed else whole


def to_tensors(params: Mapping[str, np.ndarray], family: Family) -> Iterator[tuple[str, np.ndarray]]:
    """(name, tensor) of all parameters, in their dtype."""
    for path, x in params.items():
        stacked = path.startswith("blocks/")
        for layer in range(len(x)) if stacked else (None,):
            names = tensor_names(path, family, layer)
            yield from zip(names, _to_theirs(x if layer is None else x[layer], path, len(names), family), strict=True)


def from_tensors(path: str, shape: tuple[int, ...], family: Family, read: Callable[[str], np.ndarray]) -> np.ndarray:
    """The parameter at `path`, float32 of `shape`, from tensors that `read` returns by name: `to_tensors` reversed."""
    stacked = path.startswith("blocks/")
    x = np.empty(shape, np.float32)
    for layer in range(shape[0]) if stacked else (None,):
        target = x if layer is None else x[layer]
        names = tensor_names(path, family, layer)
        for name, part in zip(names, _to_theirs(target, path, len(names), family), strict=True):
            part[...] = read(name)  # a view of `x`: no reshaping or transposing here has to copy
    return x

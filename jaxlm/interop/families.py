"""Classes of Hugging Face's `transformers` that compute what a model of jaxlm does: one table each, read both ways.

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

DROPOUTS = ("dropout", "attention_dropout")  # kept from the model that a run starts from, unless they are set
# Options of a run, whatever the model that it starts from; the others are the architecture.
_CHOSEN = (*DROPOUTS, "gradient_checkpointing", "remat_policy", "scan_layers", "attention", "zero_init_outputs")
ARCHITECTURE = tuple(f.name for f in dataclasses.fields(ModelConfig) if f.name not in _CHOSEN)

# Activations by their name in jaxlm; the first of several names in transformers is the one that is written.
PLAIN = {"gelu": "gelu_new gelu_pytorch_tanh gelu_fast", "gelu_exact": "gelu", "swish": "silu swish"}
PLAIN |= {name: name for name in ("relu", "relu2")}
GATED = {"swiglu": "silu swish", "geglu": "gelu_pytorch_tanh gelu_new gelu_fast"}

# For each rope_type: key of `rope_parameters` -> field of ModelConfig.
_LINEAR = {"factor": "rope_scaling_factor"}
_YARN = {**_LINEAR, "original_max_position_embeddings": "rope_original_length"}
_LLAMA3 = {**_YARN, "low_freq_factor": "rope_low_freq_factor", "high_freq_factor": "rope_high_freq_factor"}
ROPE_TYPES: dict[str, dict[str, str]] = {"default": {}, "linear": _LINEAR, "llama3": _LLAMA3, "yarn": _YARN}
ROPE_FIXED = {"beta_fast": 32, "beta_slow": 1, "truncate": True, "partial_rotary_factor": 1}  # the only values known

MOST_IMPLY = {"pre_norm": True, "norm_scale": True, "qk_norm": False, "value_embedding": False, "logit_softcap": None}


@dataclasses.dataclass(frozen=True)
class Family:
    """A class of transformers. Several names in one string, separated by spaces, correspond to one of jaxlm's."""

    architecture: str
    model_type: str
    keys: Mapping[str, str]  # field of ModelConfig -> key of config.json, or several keys that must agree
    implied: Mapping[str, Any]  # field of ModelConfig -> the value that all models of the class have
    activations: Mapping[str, str]  # PLAIN or GATED
    dropouts: Mapping[str, str]  # key of config.json -> field of ModelConfig; one without a key is 0
    required: Mapping[str, Any]  # key of config.json -> the only value that jaxlm can express
    defaults: Mapping[str, Any]  # key of config.json -> what transformers takes where it is missing
    modules: Mapping[str, str]  # jaxlm's module -> that of transformers; {} or {0} is the layer
    prefix: str  # of all modules in transformers except lm_head
    transposed: bool  # transformers holds matrices as [out, in], jaxlm as [in, out]

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
        "activation": "activation_function",
        "tie_embeddings": "tie_word_embeddings",
    },
    implied={**MOST_IMPLY, "n_kv_heads": None, "norm": "layernorm", "use_bias": True, "positions": "learned"},
    activations=PLAIN,
    dropouts={"embd_pdrop": "dropout", "resid_pdrop": "dropout", "attn_pdrop": "attention_dropout"},
    required={"scale_attn_weights": True, "scale_attn_by_inverse_layer_idx": False, "add_cross_attention": False},
    defaults={
        "n_inner": None,  # four times the width
        **dict.fromkeys(("embd_pdrop", "resid_pdrop", "attn_pdrop"), 0.1),
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
        "activation": "hidden_act",
        "use_bias": "attention_bias mlp_bias",
        "tie_embeddings": "tie_word_embeddings",
    },
    implied={**MOST_IMPLY, "norm": "rmsnorm", "positions": "rotary"},
    activations=GATED,
    dropouts={"attention_dropout": "attention_dropout"},
    required={},
    defaults={
        "num_key_value_heads": None,
        "attention_dropout": 0.0,
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

MISTRAL = dataclasses.replace(
    LLAMA,
    architecture="MistralForCausalLM",
    model_type="mistral",
    keys={field: key for field, key in LLAMA.keys.items() if field != "use_bias"},
    implied={**LLAMA.implied, "use_bias": False},
    defaults={**LLAMA.defaults, "num_key_value_heads": 8, "sliding_window": 4096},
)

QWEN3 = dataclasses.replace(
    MISTRAL,
    architecture="Qwen3ForCausalLM",
    model_type="qwen3",
    implied={**MISTRAL.implied, "qk_norm": True},
    required={"attention_bias": False, "use_sliding_window": False},
    defaults={**LLAMA.defaults, "num_key_value_heads": 32, "head_dim": 128},
    modules={
        **LLAMA.modules,
        "blocks/attention/q_norm": "layers.{}.self_attn.q_norm",
        "blocks/attention/k_norm": "layers.{}.self_attn.k_norm",
    },
)

# In this order: a model is exported as the first that fits.
FAMILIES = {family.architecture: family for family in (GPT2, LLAMA, MISTRAL, QWEN3)}


def family_for(model: ModelConfig, where: str) -> Family:
    """The class that computes what a model of this configuration does.

    Raises:
      UserError: there is none; `where` begins the message, which names the options that stand in the way.
    """
    values = dataclasses.asdict(model)
    values["n_kv_heads"] = None if model.kv_heads == model.n_heads else model.n_kv_heads
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
        "head_dim": model.d_model // model.n_heads,
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
    n_kv_heads = None if model.n_kv_heads == model.n_heads else model.n_kv_heads
    return family, dataclasses.replace(model, activation=activations[0], n_kv_heads=n_kv_heads)


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
    head_dim, window, layer_types = values.get("head_dim"), values.get("sliding_window"), values.get("layer_types")
    if head_dim is not None and head_dim != values["hidden_size"] / values["num_attention_heads"]:
        refused.append(_named("head_dim", values))
    slides = window is not None and values.get("use_sliding_window") is not False
    if slides and not (isinstance(window, int) and window >= values["max_position_embeddings"]):
        refused.append(_named("sliding_window", values))
    if layer_types is not None and layer_types != ["full_attention"] * values["num_hidden_layers"]:
        refused.append(_named("layer_types", values))
    return refused


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

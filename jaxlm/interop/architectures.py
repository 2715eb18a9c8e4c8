"""Classes of Hugging Face's `transformers` that compute what a model of jaxlm does: one table each.

`families` reads them both ways. Adding a class is adding a table. Needs no JAX or transformers.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

from jaxlm.config import ModelConfig

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
PARTIAL = "partial_rotary_factor"

MOST_IMPLY: dict[str, Any] = {"pre_norm": True, "norm_scale": True, "rotary_fraction": 1.0}
MOST_IMPLY |= dict.fromkeys(
    ("qk_norm", "value_embedding", "sandwich_norm", "parallel_residual", "scale_embeddings"), False
)
MOST_IMPLY |= dict.fromkeys(("qkv_bias", "attention_softcap", "logit_softcap"))


# What GPT-2 and GPT-NeoX have in common, and how the classes after GPT-2 call the shape.
CLASSIC = {"n_kv_heads": None, "head_dim": None, "norm": "layernorm", "use_bias": True}
SHAPE = {
    "vocab_size": "vocab_size",
    "d_model": "hidden_size",
    "n_heads": "num_attention_heads",
    "n_layers": "num_hidden_layers",
    "d_ff": "intermediate_size",
    "max_seq_len": "max_position_embeddings",
}


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
    rope: Mapping[str, str]  # key of `rope_parameters` -> that of config.json before transformers 5; {}: not rotary
    by_head: bool = False  # the joint matrix has each head's queries, keys and values together
    norm_offset: float = 0.0  # what transformers adds to the factors of norms that it holds


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
    implied={**MOST_IMPLY, **CLASSIC, "positions": "learned"},
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
    rope={},
)

LLAMA = Family(
    architecture="LlamaForCausalLM",
    model_type="llama",
    keys={
        **SHAPE,
        "n_kv_heads": "num_key_value_heads",
        "head_dim": "head_dim",
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
        "head_dim": None,
        "attention_dropout": 0.0,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0,
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
    rope={"rope_theta": "rope_theta"},
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

QWEN2 = dataclasses.replace(
    MISTRAL,
    architecture="Qwen2ForCausalLM",
    model_type="qwen2",
    keys={field: key for field, key in MISTRAL.keys.items() if field != "head_dim"},
    implied={**MISTRAL.implied, "qkv_bias": True, "head_dim": None},
    required={"use_sliding_window": False},
    defaults={**LLAMA.defaults, "num_key_value_heads": 32},
)

GEMMA2 = dataclasses.replace(
    MISTRAL,
    architecture="Gemma2ForCausalLM",
    model_type="gemma2",
    keys={
        **MISTRAL.keys,
        "head_dim": "head_dim query_pre_attn_scalar",  # scores are divided by the root of the second
        "activation": "hidden_activation",
        "attention_softcap": "attn_logit_softcapping",
        "logit_softcap": "final_logit_softcapping",
    },
    implied={
        **{name: x for name, x in MISTRAL.implied.items() if name not in ("attention_softcap", "logit_softcap")},
        "sandwich_norm": True,
        "scale_embeddings": True,
    },
    required={"attention_bias": False, "use_bidirectional_attention": False},
    defaults={
        **{key: x for key, x in MISTRAL.defaults.items() if key != "hidden_act"},
        "num_key_value_heads": 4,
        "head_dim": 256,
        "query_pre_attn_scalar": 256,
        "hidden_activation": "gelu_pytorch_tanh",
        "attn_logit_softcapping": 50.0,
        "final_logit_softcapping": 30.0,
        "tie_word_embeddings": True,
    },
    modules={
        **LLAMA.modules,
        "blocks/norm1_out": "layers.{}.post_attention_layernorm",
        "blocks/norm2": "layers.{}.pre_feedforward_layernorm",
        "blocks/norm2_out": "layers.{}.post_feedforward_layernorm",
    },
    norm_offset=1.0,
)

GPT_NEOX = Family(
    architecture="GPTNeoXForCausalLM",
    model_type="gpt_neox",
    keys={
        **SHAPE,
        "norm_epsilon": "layer_norm_eps",
        "activation": "hidden_act",
        "parallel_residual": "use_parallel_residual",
        "tie_embeddings": "tie_word_embeddings",
    },
    implied={
        **{name: x for name, x in MOST_IMPLY.items() if name not in ("parallel_residual", "rotary_fraction")},
        **CLASSIC,
        "positions": "rotary",
    },
    activations=PLAIN,
    dropouts={"hidden_dropout": "dropout", "attention_dropout": "attention_dropout"},
    required={"attention_bias": True},
    defaults={
        "hidden_act": "gelu",
        "hidden_dropout": 0.0,
        "attention_dropout": 0.0,
        "layer_norm_eps": 1e-5,
        "rotary_emb_base": 10000.0,
        "rotary_pct": 0.25,
        "use_parallel_residual": True,
        "tie_word_embeddings": False,
    },
    modules={
        "token_embedding": "embed_in",
        "blocks/norm1": "layers.{}.input_layernorm",
        "blocks/attention/qkv": "layers.{}.attention.query_key_value",
        "blocks/attention/out": "layers.{}.attention.dense",
        "blocks/norm2": "layers.{}.post_attention_layernorm",
        "blocks/mlp/up": "layers.{}.mlp.dense_h_to_4h",
        "blocks/mlp/down": "layers.{}.mlp.dense_4h_to_h",
        "final_norm": "final_layer_norm",
        "output_embedding": "embed_out",
    },
    prefix="gpt_neox.",
    transposed=True,
    rope={"rope_theta": "rotary_emb_base", PARTIAL: "rotary_pct"},
    by_head=True,
)

# In this order: a model is exported as the first that fits.
FAMILIES = {family.architecture: family for family in (GPT2, LLAMA, MISTRAL, QWEN3, QWEN2, GEMMA2, GPT_NEOX)}

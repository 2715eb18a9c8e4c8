"""Every option of the model, declared as in `schema`."""

import dataclasses

from jaxlm.config.option import Section, Unset, option


@dataclasses.dataclass(frozen=True)
class ModelConfig(Section):
    """The Transformer. Defaults are those of GPT-2 small."""

    vocab_size: int = option(
        50000, "BPE vocabulary to train; the model's is the size the tokenizer reached", low=1, high=2**24
    )
    d_model: int = option(768, "width of the residual stream", low=1)
    n_heads: int = option(12, "attention heads; must divide d_model, unless head_dim is set", low=1)
    head_dim: int | None = option(None, "channels of an attention head; none: d_model / n_heads", low=1)
    n_kv_heads: int | None = option(
        None, "heads of keys and values, each shared by n_heads / n_kv_heads query heads; none: n_heads", low=1
    )
    n_layers: int = option(12, "Transformer blocks", low=1)
    d_ff: int = option(3072, "width of the feed-forward layer", low=1)
    max_seq_len: int = option(1024, "longest sequence the model can take, in tokens", low=2, high=2**24)
    dropout: float = option(Unset(0.1), "dropout of embeddings and of each block's two outputs", low=0, below=1)
    attention_dropout: float = option(Unset(0.1), "dropout of the attention weights", low=0, below=1)
    activation: str = option(
        "gelu",
        "feed-forward activation; gelu is GPT-2's tanh form, gelu_exact the one with erf, relu2 the square of relu; "
        "swiglu and geglu (tanh form) are gated: a third matrix, all of width d_ff",
        choices=("gelu", "gelu_exact", "relu", "relu2", "swish", "swiglu", "geglu"),
    )
    norm: str = option("layernorm", "normalisation of the residual stream", choices=("layernorm", "rmsnorm"))
    norm_scale: bool = option(True, "factors to learn in norms, one a channel")
    norm_epsilon: float = option(1e-5, "term that keeps a norm's denominator off zero", above=0)
    use_bias: bool = option(True, "biases in linear layers and in layernorm (rmsnorm never has one)")
    qkv_bias: bool | None = option(
        None, "biases of queries, keys and values, if other than use_bias (as in Qwen2); none: as use_bias"
    )
    pre_norm: bool = option(True, "normalise before each sub-layer (false: after, as in the 2017 Transformer)")
    sandwich_norm: bool = option(False, "with pre_norm: normalise what each sub-layer adds, too (as in Gemma 2)")
    parallel_residual: bool = option(
        False, "with pre_norm: attention and feed-forward read the same input, and both are added (as in GPT-NeoX)"
    )
    gradient_checkpointing: bool = option(
        False, "recompute activations in the backward pass to save memory", resumable=True
    )
    remat_policy: str = option(
        "full",
        "what gradient_checkpointing recomputes: everything, or all but matrix products",
        choices=("full", "dots"),
        resumable=True,
    )
    positions: str = option("learned", "how positions enter", choices=("learned", "sinusoidal", "rotary"))
    rope_theta: float = option(10000.0, "base of the rotary frequencies (positions=rotary)", above=0)
    rotary_fraction: float = option(
        1.0,
        "share of each head's channels, the first, that rotary positions turn (0.25 in Pythia)",
        high=1,
    )
    rope_scaling: str | None = option(
        None,
        "stretch rotary positions to a longer context: linear for all frequencies, llama3 and yarn for low ones; "
        "none: as they are",
        choices=("linear", "llama3", "yarn"),
    )
    rope_scaling_factor: float = option(1.0, "how many times longer rope_scaling makes the context", low=1)
    rope_original_length: int | None = option(
        None, "tokens of the context before it was stretched (needed by rope_scaling llama3 and yarn)", low=1
    )
    rope_low_freq_factor: float = option(
        1.0, "llama3: frequencies that turn fewer times than this in the original length are stretched", above=0
    )
    rope_high_freq_factor: float = option(
        4.0, "llama3: frequencies that turn more times than this in the original length stay", above=0
    )
    qk_norm: bool = option(False, "rmsnorm over each head's queries and keys (as in Qwen3)")
    value_embedding: bool = option(
        False, "a second embedding of the tokens, added to every layer's values times a factor a head"
    )
    scale_embeddings: bool = option(
        False, "multiply token embeddings by the root of d_model (as in Gemma 2; positions=sinusoidal always does)"
    )
    attention_softcap: float | None = option(
        None,
        "squash attention scores to this, as logit_softcap does logits (Gemma 2); none: as they are",
        above=0,
    )
    logit_softcap: float | None = option(
        None, "squash output logits to this: cap * tanh(logits / cap) (as in Gemma 2); none: as they are", above=0
    )
    tie_embeddings: bool = option(True, "use the token embedding as the output projection too")
    zero_init_outputs: bool = option(
        False, "start the last matrices of attention and feed-forward at zero, so that each block adds nothing"
    )
    scan_layers: bool | None = option(
        None,
        "loop over one compiled block: compiles faster, runs slower; none: with gradient_checkpointing or stage 3, "
        "which save no memory without it",
        resumable=True,
    )
    attention: str = option(
        "auto",
        "attention kernel: blockwise runs everywhere; on GPUs and in 16 bits, cudnn is for rows without packing and "
        "attention_dropout, pallas for all, mosaic for heads up to 128 on Hopper (H100; JAX 0.11 with CUDA 13); "
        "auto takes the first that can of cudnn, pallas, mosaic, blockwise",
        choices=("auto", "blockwise", "cudnn", "mosaic", "pallas"),
    )

    @property
    def head_size(self) -> int:
        """Channels of an attention head."""
        return self.d_model // self.n_heads if self.head_dim is None else self.head_dim

    @property
    def rotary_size(self) -> int:
        """Channels of an attention head that rotary positions turn."""
        return int(self.head_size * self.rotary_fraction)

    @property
    def kv_heads(self) -> int:
        """Heads of keys and values."""
        return self.n_heads if self.n_kv_heads is None else self.n_kv_heads

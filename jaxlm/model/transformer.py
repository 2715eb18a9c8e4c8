"""The decoder-only Transformer and its blocks.

Shapes: B rows, T positions, D model width, V vocabulary, L layers, G heads of keys and values, K channels of a head.

The blocks' parameters are stacked on a leading layer axis, one layout for both ways to run them: `lax.scan` (compiles
fast) or the same scan unrolled (runs fast).
"""

from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from jaxlm.config import ModelConfig
from jaxlm.model.attention import Attention, Cache
from jaxlm.model.dropout import dropout
from jaxlm.model.layers import PRODUCT, Mlp, Norm, Parts
from jaxlm.model.positions import sinusoids
from jaxlm.ops.embedding import take_rows
from jaxlm.ops.matmul import add_bias, einsum
from jaxlm.ops.norm_kernels import Terms
from jaxlm.ops.norms import added
from jaxlm.ops.own_kernels import NORMS

Tree = TypeVar("Tree")  # of arrays
REMAT_POLICIES = {"full": None, "dots": jax.checkpoint_policies.save_only_these_names(PRODUCT)}

# A function from a block's parameters as they are stored to those it computes with, and the policy (`jax.checkpoint`)
# by which the backward pass calls it again.
Fetch = tuple[Callable[[Any], Any], Callable[..., bool]]


def _count(tokens_BT: jax.Array) -> jax.Array:
    """Positions 0, 1, 2, ... of each row."""
    return jnp.broadcast_to(jnp.arange(tokens_BT.shape[1], dtype=jnp.int32), tokens_BT.shape)


def _unstack(tree: Tree, n: int) -> list[Tree]:
    """The `n` layers of a tree with a leading layer axis, split so that the gradients are joined by one operation."""
    parts = jax.tree.map(lambda x: jax.lax.split(x, (1,) * n), tree)
    layer = lambda i: jax.tree.map(lambda _, layers: layers[i][0], tree, parts)  # noqa: E731
    return [layer(i) for i in range(n)]


class Block(nnx.Module):
    """Attention and feed-forward, each with a residual, a norm (before, after or both) and dropout.

    It takes and returns `Terms`, whose sum is the residual stream: the next norm adds them as it reads them.
    """

    by_kernels = False  # whether norms are computed by this package's kernels for GPUs

    def __init__(self, config: ModelConfig, implementation: str, dtype: DTypeLike, rngs: nnx.Rngs):
        self.config = config
        self.attention = Attention(config, implementation, dtype, rngs)
        self.mlp = Mlp(config, dtype, rngs)
        self.norm1 = Norm(config.d_model, config, kind=config.norm)
        self.norm2 = Norm(config.d_model, config, kind=config.norm)
        if config.sandwich_norm:
            self.norm1_out = Norm(config.d_model, config, kind=config.norm)
            self.norm2_out = Norm(config.d_model, config, kind=config.norm)

    def before(self, norm: Norm, terms: Terms, goes_on: bool = True) -> tuple[jax.Array, jax.Array]:
        """The sum of the terms, and what attention or the feed-forward part reads of it: its norm, with `pre_norm`."""
        if self.config.pre_norm:
            return norm.of_sum(terms, self.by_kernels, goes_on)
        x_BTD = added(terms)
        return x_BTD, x_BTD

    def after(
        self, x_BTD: jax.Array, parts: Parts, key_B2: jax.Array | None, norm: Norm, norm_out: Norm | None = None
    ) -> Terms:
        """The residual stream with one more update."""
        (y_BTD, bias_D), rate = parts, self.config.dropout
        if self.by_kernels and norm_out is None and (key_B2 is None or rate == 0.0):
            terms = Terms(x_BTD, y_BTD, bias_D)
        else:
            y_BTD = y_BTD if bias_D is None else add_bias(y_BTD, bias_D)
            y_BTD = y_BTD if norm_out is None else norm_out.of_sum(Terms(y_BTD), self.by_kernels, goes_on=False)[1]
            terms = Terms(x_BTD + dropout(y_BTD, key_B2, rate))
        return terms if self.config.pre_norm else Terms(norm.of_sum(terms, self.by_kernels, goes_on=False)[1])

    def _keeps_no_norm(self) -> bool:
        """Whether the feed-forward part's input is made again for the backward pass, without the rest of the block."""
        config = self.config
        once = config.pre_norm and not config.gradient_checkpointing
        return self.by_kernels and once and not self.mlp.up.use_adapter

    def _residuals(self, terms: Terms, attend: Callable[[jax.Array], tuple[Parts, Cache]], keys: Any) -> Any:
        sandwich = self.config.sandwich_norm
        x_BTD, y_BTD = self.before(self.norm1, terms)
        parts, cache = attend(y_BTD)
        terms = self.after(x_BTD, parts, keys[0], self.norm1, self.norm1_out if sandwich else None)
        if self.config.parallel_residual:
            y_BTD = self.before(self.norm2, Terms(x_BTD), goes_on=False)[1]
            x_BTD, parts = added(terms), self.mlp(y_BTD, keys[1])
        elif self._keeps_no_norm():
            x_BTD, parts = self.mlp.of_norm(self.norm2, terms, keys[1])
        else:
            x_BTD, y_BTD = self.before(self.norm2, terms)
            parts = self.mlp(y_BTD, keys[1])
        return self.after(x_BTD, parts, keys[1], self.norm2, self.norm2_out if sandwich else None), cache

    def __call__(
        self,
        terms: Terms,
        segments_BT: jax.Array | None,
        positions_BT: jax.Array,
        keys_SB2: jax.Array | None,
        embedded_BTGK: jax.Array | None = None,
    ) -> tuple[Terms, Cache]:
        """Returns the output, and the keys and values.

        Args:
          keys_SB2: uint32 dropout keys of the three sites, or None.
          embedded_BTGK: of `value_embedding`.
        """
        attention_key, *residual_keys = (None, None, None) if keys_SB2 is None else tuple(keys_SB2)
        attend = lambda y: self.attention(y, segments_BT, positions_BT, attention_key, embedded_BTGK)  # noqa: E731
        return self._residuals(terms, attend, residual_keys)

    def decode(
        self, x_B1D: jax.Array, position_B: jax.Array, cache: Cache, embedded_B1GK: jax.Array | None = None
    ) -> tuple[jax.Array, Cache]:
        """One position a row, at index `position_B`, with the keys and values [B, G, T, K] before it in `cache`."""
        attend = lambda y: self.attention.decode(y, position_B, cache, embedded_B1GK)  # noqa: E731
        terms, cache = self._residuals(Terms(x_B1D), attend, (None, None))
        return added(terms), cache


class Transformer(nnx.Module):
    """Language model, GPT-2-like by default; parameters are float32, computation is in `dtype`.

    Args:
      config: shapes and options; `config.vocab_size` is the tokenizer's.
      implementation: attention kernel, "blockwise" or one of `ops.attention_kernels.FUSED`.
      dtype: compute dtype, float32, bfloat16 or float16.

    A subclass may set `block_class` to a `Block` of its own.

    Attributes:
      fetch: makes a block's parameters just before it runs; None: they are stored as they are used.
      own_kernels: what this package's kernels for GPUs are used for (`ops.own_kernels`).
    """

    block_class: type[Block] = Block
    fetch: Fetch | None = None
    own_kernels: frozenset[str] = frozenset()

    def __init__(
        self, config: ModelConfig, *, implementation: str = "blockwise", dtype: DTypeLike = jnp.float32, rngs: nnx.Rngs
    ):
        self.config, self.dtype = config, dtype
        normal = nnx.initializers.normal(0.02)
        shape = (config.vocab_size, config.d_model)
        self.token_embedding = nnx.Param(normal(rngs.params(), shape))
        if config.positions == "learned":
            self.position_embedding = nnx.Param(normal(rngs.params(), (config.max_seq_len, config.d_model)))
        if config.value_embedding:
            width = config.kv_heads * config.head_size
            self.value_embedding = nnx.Param(normal(rngs.params(), (config.vocab_size, width)))
        stack = nnx.vmap(lambda rngs: self.block_class(config, implementation, dtype, rngs))
        self.blocks = stack(rngs.split(config.n_layers))
        if config.pre_norm:
            self.final_norm = Norm(config.d_model, config, kind=config.norm)
        if not config.tie_embeddings:
            self.output_embedding = nnx.Param(normal(rngs.params(), shape))

    def output_matrix(self) -> jax.Array:
        """float32 [V, D]: the token embedding if tied, its own matrix otherwise."""
        return (self.token_embedding if self.config.tie_embeddings else self.output_embedding)[...]

    def embed(self, tokens_BT: jax.Array, positions_BT: jax.Array) -> jax.Array:
        x_BTD = take_rows(self.token_embedding[...], tokens_BT)
        if self.config.scale_embeddings or self.config.positions == "sinusoidal":
            x_BTD = x_BTD * self.config.d_model**0.5
        if self.config.positions == "learned":
            x_BTD = x_BTD + take_rows(self.position_embedding[...], positions_BT)
        elif self.config.positions == "sinusoidal":
            x_BTD = x_BTD + sinusoids(positions_BT, self.config.d_model)
        return x_BTD.astype(self.dtype)

    def embed_values(self, tokens_BT: jax.Array) -> jax.Array | None:
        """What every layer adds to its values (after Zhou et al. 2024, arXiv:2410.17897), [B, T, G, K]."""
        if not self.config.value_embedding:
            return None
        x_BTE = take_rows(self.value_embedding[...], tokens_BT).astype(self.dtype)
        return x_BTE.reshape(*tokens_BT.shape, self.config.kv_heads, -1)

    def _finish(self, terms: Terms) -> jax.Array:
        if not self.config.pre_norm:
            return added(terms)
        return self.final_norm.of_sum(terms, NORMS in self.own_kernels, goes_on=False)[1]

    def __call__(
        self,
        tokens_BT: jax.Array,
        segments_BT: jax.Array | None = None,
        positions_BT: jax.Array | None = None,
        keys: jax.Array | None = None,
    ) -> jax.Array:
        """Hidden states [B, T, D] before the output projection.

        Args:
          tokens_BT: int32.
          segments_BT: int32, documents packed into a row; None: one document a row.
          positions_BT: int32 position in the document; None: 0, 1, 2, ...
          keys: uint32 [L + 1, 3, B, 2] from `dropout.row_keys`; None: no dropout.
        """
        if positions_BT is None:
            positions_BT = _count(tokens_BT)
        x_BTD = self.embed(tokens_BT, positions_BT)
        x_BTD = dropout(x_BTD, None if keys is None else keys[-1, 0], self.config.dropout)
        values = self.embed_values(tokens_BT)
        run = lambda block, terms, keys: (block(terms, segments_BT, positions_BT, keys, values)[0], None)  # noqa: E731
        return self._run_blocks(run, x_BTD, None if keys is None else keys[:-1])[0]

    def hidden_states(self, batch: Mapping[str, jax.Array], keys: jax.Array | None = None) -> jax.Array:
        """Hidden states [B, T, D] of a batch: of its tokens, its documents packed into rows kept apart."""
        return self(batch["tokens"], batch["segments"], batch["positions"], keys)

    def _run_blocks(
        self, run: Callable[..., tuple[Terms, Any]], x_BTD: jax.Array, keys: jax.Array | None
    ) -> tuple[jax.Array, Any]:
        """The final hidden states, and the outputs of all layers, stacked, of `run(block, terms, keys)`."""
        config, fetch = self.config, self.fetch
        graphdef, state = nnx.split(self.blocks)
        # What is kept between layers to run them again, or has one shape for all of them, is one array.
        sums_up = config.gradient_checkpointing or fetch is not None or config.scan_layers

        def body(terms: Terms, layer: tuple[Any, jax.Array | None]) -> tuple[Terms, Any]:
            params = layer[0] if fetch is None else fetch[0](layer[0])
            block = nnx.merge(graphdef, params)
            block.by_kernels = NORMS in self.own_kernels
            terms, output = run(block, terms, layer[1])
            return Terms(added(terms)) if sums_up else terms, output

        if config.gradient_checkpointing or fetch is not None:
            policy = REMAT_POLICIES[config.remat_policy] if config.gradient_checkpointing or fetch is None else fetch[1]
            body = jax.checkpoint(body, policy=policy, prevent_cse=not config.scan_layers)
        layers, terms = (nnx.to_pure_dict(state), keys), Terms(x_BTD)
        if config.scan_layers:
            terms, outputs = jax.lax.scan(body, terms, layers)
        else:
            body, each = (
                jax.jit(body),
                [],
            )  # traced once for all layers, or once more for the first
            for layer in _unstack(layers, config.n_layers):
                terms, output = body(terms, layer)
                each.append(output)
            outputs = jax.tree.map(lambda *layers: jnp.stack(layers), *each)
        return self._finish(terms), outputs

    def logits(self, hidden_BTD: jax.Array) -> jax.Array:
        """float32 [B, T, V]. For short sequences; training never holds all of them (`train.loss`)."""
        w = self.output_matrix().astype(self.dtype)
        logits_BTV = einsum("btd,vd->btv", hidden_BTD, w, jnp.float32)
        cap = self.config.logit_softcap
        return logits_BTV if cap is None else cap * jnp.tanh(logits_BTV / cap)

    def prefill(self, tokens_BT: jax.Array) -> tuple[jax.Array, tuple[Cache, ...]]:
        """Hidden states [B, T, D] of a prompt, and each layer's keys and values [B, G, T, K]."""
        positions_BT = _count(tokens_BT)
        values = self.embed_values(tokens_BT)
        run = lambda block, terms, keys: block(terms, None, positions_BT, keys, values)  # noqa: E731
        hidden_BTD, kept = self._run_blocks(run, self.embed(tokens_BT, positions_BT), None)
        k, v = (x_LBTGK.swapaxes(2, 3) for x_LBTGK in kept)
        return hidden_BTD, tuple(zip(k, v, strict=True))

    def decode(
        self, tokens_B1: jax.Array, position_B: jax.Array, caches: tuple[Cache, ...]
    ) -> tuple[jax.Array, tuple[Cache, ...]]:
        """Logits float32 [B, V] after one more token a row, and the caches with it.

        The layers are unrolled: a scan would copy the caches of all of them for every token.

        Args:
          position_B: int32 index of each row's token; what the caches hold from there on is not looked at.
          caches: keys and values [B, G, T, K] of each layer.
        """
        graphdef, state = nnx.split(self.blocks)
        params = nnx.to_pure_dict(state)

        @jax.jit  # traced once for all layers
        def step(block: Any, x_B1D: jax.Array, cache: Cache) -> tuple[jax.Array, Cache]:
            return nnx.merge(graphdef, block).decode(x_B1D, position_B, cache, values)

        values = self.embed_values(tokens_B1)
        x_B1D, after = self.embed(tokens_B1, position_B[:, None]), []
        for layer, cache in enumerate(caches):
            x_B1D, cache = step(jax.tree.map(lambda x: x[layer], params), x_B1D, cache)  # noqa: B023 - called at once
            after.append(cache)
        return self.logits(self._finish(Terms(x_B1D)))[:, 0], tuple(after)

"""The decoder-only Transformer: embeddings, stacked blocks, final norm.

Shapes: B rows, T positions, D model width, V vocabulary, L layers, G heads of keys and values, K channels of a head.

The blocks' parameters are stacked on a leading layer axis, one layout for both ways to run them: `lax.scan` (compiles
fast) or the same scan unrolled (runs fast).
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from jaxlm.config import ModelConfig
from jaxlm.model.dropout import dropout
from jaxlm.model.embedding import lookup
from jaxlm.model.layers import PRODUCT, Block, Cache, make_norm, normalised
from jaxlm.model.positions import sinusoids
from jaxlm.ops.matmul import product

REMAT_POLICIES = {"full": None, "dots": jax.checkpoint_policies.save_only_these_names(PRODUCT)}

Fetch = Callable[[Any], Any]  # parameters of one block as they are held -> as they are computed with


def _keep_all_but_fetched(primitive: Any, *_: Any, **params: Any) -> bool:
    """Checkpoint policy: what `fetch` gathers from other devices is gathered again in the backward pass."""
    if primitive.name != "custom_vjp_call":
        return primitive.name != "all_gather"
    return not any(equation.primitive.name == "all_gather" for equation in params["call_jaxpr"].eqns)


def _unstack(tree: Any, n: int) -> list[Any]:
    """The `n` layers of a tree with a leading layer axis. Its gradient puts theirs together once."""
    parts = jax.tree.map(lambda x: jax.lax.split(x, (1,) * n), tree)
    layer = lambda i: jax.tree.map(lambda _, layers: layers[i][0], tree, parts)  # noqa: E731
    return [layer(i) for i in range(n)]


class Transformer(nnx.Module):
    """Language model, GPT-2-like by default; parameters are float32, computation is in `dtype`.

    Args:
      config: shapes and options; `config.vocab_size` is the tokenizer's.
      implementation: attention kernel, "blockwise" or "cudnn".
      dtype: compute dtype, float32, bfloat16 or float16.

    A subclass may set `block_class` to a `Block` of its own.
    """

    block_class: type[Block] = Block

    def __init__(
        self, config: ModelConfig, *, implementation: str = "blockwise", dtype: Any = jnp.float32, rngs: nnx.Rngs
    ):
        self.config, self.dtype = config, dtype
        normal = nnx.initializers.normal(0.02)
        shape = (config.vocab_size, config.d_model)
        self.token_embedding = nnx.Param(normal(rngs.params(), shape))
        if config.positions == "learned":
            self.position_embedding = nnx.Param(normal(rngs.params(), (config.max_seq_len, config.d_model)))
        stack = nnx.vmap(lambda rngs: self.block_class(config, implementation, dtype, rngs))
        self.blocks = stack(rngs.split(config.n_layers))
        if config.pre_norm:
            self.final_norm = make_norm(config, dtype, rngs)
        if not config.tie_embeddings:
            self.output_embedding = nnx.Param(normal(rngs.params(), shape))

    def output_matrix(self) -> jax.Array:
        """float32 [V, D]: the token embedding if tied, its own matrix otherwise."""
        return (self.token_embedding if self.config.tie_embeddings else self.output_embedding)[...]

    def embed(self, tokens_BT: jax.Array, positions_BT: jax.Array) -> jax.Array:
        x_BTD = lookup(self.token_embedding[...], tokens_BT)
        if self.config.positions == "learned":
            x_BTD = x_BTD + lookup(self.position_embedding[...], positions_BT)
        elif self.config.positions == "sinusoidal":
            x_BTD = x_BTD * self.config.d_model**0.5 + sinusoids(positions_BT, self.config.d_model)
        return x_BTD.astype(self.dtype)

    def _run_blocks(self, step: Any, x: jax.Array, per_layer: Any, fetch: Fetch | None = None) -> tuple[jax.Array, Any]:
        """Folds `step(block, x, item) -> (x, out)` over the layers; `per_layer` leaves have a leading layer axis."""
        config = self.config
        graphdef, state = nnx.split(self.blocks)
        params = nnx.to_pure_dict(state)

        def body(x: jax.Array, layer: Any) -> tuple[jax.Array, Any]:
            block = layer[0] if fetch is None else fetch(layer[0])
            return step(nnx.merge(graphdef, block), x, layer[1])

        if config.gradient_checkpointing or fetch is not None:
            policy = REMAT_POLICIES[config.remat_policy] if config.gradient_checkpointing else _keep_all_but_fetched
            body = jax.checkpoint(body, policy=policy, prevent_cse=not config.scan_layers)
        if config.scan_layers:
            return jax.lax.scan(body, x, (params, per_layer))
        body, outs = jax.jit(body), []  # traced once for all layers
        for layer in _unstack((params, per_layer), config.n_layers):
            x, out = body(x, layer)
            outs.append(out)
        return x, jax.tree.map(lambda *layers: jnp.stack(layers), *outs)

    def _finish(self, x_BTD: jax.Array) -> jax.Array:
        return normalised(self.final_norm, x_BTD) if self.config.pre_norm else x_BTD

    def __call__(
        self,
        tokens_BT: jax.Array,
        segments_BT: jax.Array | None = None,
        positions_BT: jax.Array | None = None,
        keys: jax.Array | None = None,
        fetch: Fetch | None = None,
    ) -> jax.Array:
        """Hidden states [B, T, D] before the output projection.

        Args:
          tokens_BT: int32.
          segments_BT: int32, documents packed into a row; None: one document a row.
          positions_BT: int32 position in the document; None: 0, 1, 2, ...
          keys: uint32 [L + 1, 3, B, 2] from `dropout.row_keys`; None: no dropout.
          fetch: makes a block's parameters just before it runs, again in the backward pass; None: they are there.
        """
        hidden, _ = self._hidden_and_cache(tokens_BT, segments_BT, positions_BT, keys, fetch=fetch)
        return hidden

    def _hidden_and_cache(
        self,
        tokens_BT: jax.Array,
        segments_BT: Any = None,
        positions_BT: Any = None,
        keys: Any = None,
        *,
        fetch: Fetch | None = None,
        keep_cache: bool = False,
    ) -> tuple[jax.Array, Any]:
        if positions_BT is None:
            positions_BT = jnp.broadcast_to(jnp.arange(tokens_BT.shape[1], dtype=jnp.int32), tokens_BT.shape)
        x_BTD = self.embed(tokens_BT, positions_BT)
        x_BTD = dropout(x_BTD, None if keys is None else keys[-1, 0], self.config.dropout)

        def step(block: Block, x: jax.Array, layer_keys: Any) -> tuple[jax.Array, Any]:
            x, cache = block(x, segments_BT, positions_BT, layer_keys)
            return x, cache if keep_cache else None

        x_BTD, cache = self._run_blocks(step, x_BTD, None if keys is None else keys[:-1], fetch)
        return self._finish(x_BTD), cache

    def logits(self, hidden_BTD: jax.Array) -> jax.Array:
        """float32 [B, T, V]. For short sequences; training never holds all of them (see `loss.py`)."""
        w = self.output_matrix().astype(self.dtype)
        logits_BTV = product("btd,vd->btv", hidden_BTD, w)
        cap = self.config.logit_softcap
        return logits_BTV if cap is None else cap * jnp.tanh(logits_BTV / cap)

    def prefill(self, tokens_BT: jax.Array) -> tuple[jax.Array, tuple[Cache, ...]]:
        """Hidden states [B, T, D] of a prompt, and each layer's keys and values [B, G, T, K]."""
        hidden_BTD, kept = self._hidden_and_cache(tokens_BT, keep_cache=True)
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
            return nnx.merge(graphdef, block).decode(x_B1D, position_B, cache)

        x_B1D, after = self.embed(tokens_B1, position_B[:, None]), []
        for layer, cache in enumerate(caches):
            x_B1D, cache = step(jax.tree.map(lambda x: x[layer], params), x_B1D, cache)  # noqa: B023 - called at once
            after.append(cache)
        return self.logits(self._finish(x_B1D))[:, 0], tuple(after)

"""A model block of your own: python examples/own_block.py

Attention and feed-forward side by side instead of one after the other, as in GPT-J (Wang and Komatsuzaki 2021): both
read the same normalised input, and their outputs are added. Half a minute on 2 CPU cores.
"""

from collections.abc import Callable
from typing import Any

import jax

from jaxlm import Trainer, load, load_config, replace_fields
from jaxlm.model import Transformer
from jaxlm.model.attention import Cache
from jaxlm.model.dropout import dropout
from jaxlm.model.transformer import Block


class ParallelBlock(Block):
    """x + attention(norm(x)) + mlp(norm(x)); the second norm is there, and not used."""

    def _residuals(self, x_BTD: jax.Array, attend: Callable[[jax.Array], tuple[jax.Array, Cache]], keys: Any) -> Any:
        rate = self.config.dropout
        normed_BTD = self.norm1(x_BTD)
        attended_BTD, cache = attend(normed_BTD)
        return x_BTD + dropout(attended_BTD, keys[0], rate) + dropout(self.mlp(normed_BTD), keys[1], rate), cache


class ParallelTransformer(Transformer):
    block_class = ParallelBlock


class ParallelTrainer(Trainer):
    model_class = ParallelTransformer


config = replace_fields(
    load_config("small"),
    {
        "model.d_model": 128,
        "model.n_layers": 2,
        "model.d_ff": 512,
        "model.max_seq_len": 128,
        "data.max_length": 128,
        "data.validation_fraction": 0.01,
        "training.gradient_accumulation_steps": 1,
        "training.max_steps": 50,
        "training.checkpoint_dir": "runs/own_block",
    },
)

if __name__ == "__main__":
    ParallelTrainer(config).train()
    loaded = load("runs/own_block/final_model", ParallelTransformer)  # without the class, it is refused
    print(type(loaded.model).__name__, f"of {loaded.config.model.n_layers} blocks, {loaded.progress.step} updates")

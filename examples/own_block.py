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
from jaxlm.model.layers import Parts
from jaxlm.model.transformer import Block
from jaxlm.ops.norm_kernels import Terms
from jaxlm.ops.norms import added


class ParallelBlock(Block):
    """x + attention(norm(x)) + mlp(norm(x)), with model.pre_norm; the second norm is there, and not used."""

    def _residuals(self, terms: Terms, attend: Callable[[jax.Array], tuple[Parts, Cache]], keys: Any) -> Any:
        x_BTD, y_BTD = self.before(self.norm1, terms)
        attended, cache = attend(y_BTD)
        x_BTD = added(self.after(x_BTD, attended, keys[0], self.norm1))
        return self.after(x_BTD, self.mlp(y_BTD, keys[1]), keys[1], self.norm2), cache


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

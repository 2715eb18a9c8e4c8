"""A metric of your own, in every sink and in the progress line: python examples/custom_metric.py

Half a minute on 2 CPU cores. Then: `tensorboard --logdir runs/custom_metric/logs`, or runs/custom_metric/metrics.jsonl.
"""

import jax
import jax.numpy as jnp

from jaxlm import Trainer
from jaxlm.config import load_config, replace_fields


@jax.jit
def norm(params):
    """The square root of the sum of all squares."""
    return jnp.sqrt(sum(jnp.vdot(leaf, leaf) for leaf in jax.tree.leaves(params)))


class WithParameterNorm(Trainer):
    def _log_metrics(self, loss: float) -> None:
        super()._log_metrics(loss)
        values = {"custom/parameter_norm": norm(self.state.params), "custom/loss_squared": loss**2}
        self.metrics_tracker.update(values, self.current_step)


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
        "training.max_steps": 40,
        "training.checkpoint_dir": "runs/custom_metric",
    },
)

if __name__ == "__main__":
    trainer = WithParameterNorm(config)
    trainer.train()

"""A metric of your own, in every sink and in the progress line: python examples/custom_metric.py

Half a minute on 2 CPU cores. Then: `tensorboard --logdir runs/custom_metric/logs`, or runs/custom_metric/metrics.jsonl.
"""

import optax

from jaxlm import Hook, Trainer, load_config, replace_fields


class ParameterNorm(Hook):
    def on_log(self, run, row):
        values = {"custom/parameter_norm": optax.tree.norm(run.state.params), "custom/loss2": row["train/loss"] ** 2}
        run.metrics_tracker.update(values, run.current_step)


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
    print(Trainer(config, hooks=[ParameterNorm()]).train().last["custom/parameter_norm"])

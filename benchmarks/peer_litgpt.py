"""A second PyTorch voice for cpu.py: litgpt's GPT in the shape of ours, compiled, as litgpt's own pretraining has it.

What differs from GPT-2: positions are rotary (a quarter of each head's channels, as in Pythia) instead of learned, and
there is no dropout. Tied embeddings, biases, tanh GELU, LayerNorm before each sub-layer, one after the other: as ours.
The loss is litgpt's chunked cross entropy. Needs torch, litgpt and NumPy.
"""

from typing import Any

import torch
from lib.worker import train_forever
from peer_torch import Batches, recipe, start


def gpt(spec: dict[str, Any]) -> torch.nn.Module:
    from litgpt.config import Config
    from litgpt.model import GPT

    shape = spec["shape"]
    config = Config(
        block_size=spec["seq_len"],
        n_layer=shape["n_layers"],
        n_embd=shape["d_model"],
        n_head=shape["n_heads"],
        intermediate_size=shape["d_ff"],
        vocab_size=shape["vocab_size"],
        padded_vocab_size=shape["vocab_size"],
        mlp_class_name="GptNeoxMLP",
        gelu_approximate="tanh",
        parallel_residual=False,
        rotary_percentage=0.25,
        bias=True,
    )
    model = GPT(config)
    model.apply(model._init_weights)
    model.lm_head.weight = model.transformer.wte.weight
    return model.train()


def main() -> None:
    turns, spec = start()
    from litgpt.utils import chunked_cross_entropy

    model, batches = gpt(spec), Batches(spec)
    forward = torch.compile(model)

    def loss_of(number: int) -> torch.Tensor:
        tokens, labels = batches[number]
        targets = torch.nn.functional.pad(labels[:, 1:], (0, 1), value=-100)
        return chunked_cross_entropy(forward(tokens), targets)

    turns.about |= {"parameters": sum(p.numel() for p in model.parameters()), "threads": torch.get_num_threads()}
    train_forever(recipe(spec, model.parameters(), loss_of), turns, spec["updates_a_lap"])


if __name__ == "__main__":
    main()

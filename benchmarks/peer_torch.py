"""PyTorch peers of cpu.py and gpu/speed.py: transformers' GPT-2 in a plain training loop, as it is and compiled.

Needs torch, transformers and NumPy alone. `recipe`, `Batches` and `start` serve the other peers, too.
"""

import json
import sys
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import torch
from lib.worker import Turns, train_forever


class Batches:
    """The rows of real text that jaxlm packed, with the targets that count; `batches[number]` goes round them.

    All are on the device from the start.
    """

    def __init__(self, spec: dict[str, Any]) -> None:
        with np.load(spec["data"]) as arrays:
            self.tokens_NBT = torch.from_numpy(arrays["tokens"]).long()
            counts = torch.from_numpy(arrays["segments"] > 0) & (self.tokens_NBT != spec["bos_id"])
        self.labels_NBT = torch.where(counts, self.tokens_NBT, -100).to(spec["device"])  # the models shift them
        self.tokens_NBT = self.tokens_NBT.to(spec["device"])

    def __len__(self) -> int:
        return len(self.tokens_NBT)

    def __getitem__(self, number: int) -> tuple[torch.Tensor, torch.Tensor]:
        i = number % len(self)
        return self.tokens_NBT[i], self.labels_NBT[i]


def gpt2(spec: dict[str, Any]) -> torch.nn.Module:
    """A fresh GPT-2 of the given shape and dropout, with SDPA attention."""
    from transformers import GPT2Config, GPT2LMHeadModel

    shape, dropout = spec["shape"], spec["dropout"]
    config = GPT2Config(
        vocab_size=shape["vocab_size"],
        n_embd=shape["d_model"],
        n_head=shape["n_heads"],
        n_layer=shape["n_layers"],
        n_inner=shape["d_ff"],
        n_positions=spec["seq_len"],
        resid_pdrop=dropout,
        embd_pdrop=dropout,
        attn_pdrop=dropout,
        attn_implementation="sdpa",
        use_cache=False,
        bos_token_id=None,
        eos_token_id=None,
    )
    return GPT2LMHeadModel(config).train().to(spec["device"])


def autocast(spec: dict[str, Any]) -> torch.autocast:
    return torch.autocast(spec["device"], dtype=torch.bfloat16, enabled=spec["precision"] == "bf16")


def recipe(
    spec: dict[str, Any], parameters: Iterable[torch.nn.Parameter], loss_of: Callable[[int], torch.Tensor]
) -> Callable[[int], torch.Tensor]:
    """The update: forward in the given precision, backward, clipping, fused AdamW."""
    parameters, training = list(parameters), spec["training"]
    optimizer = torch.optim.AdamW(
        parameters, lr=training["learning_rate"], weight_decay=training["weight_decay"], fused=True
    )

    def update(number: int) -> torch.Tensor:
        with autocast(spec):
            loss = loss_of(number)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, training["max_grad_norm"])
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.detach()

    return update


def start() -> tuple[Turns, dict[str, Any]]:
    """What a peer begins with; on a GPU TF32 is allowed, and the peak memory is the device's."""
    turns, spec = Turns(), json.loads(sys.argv[1])
    torch.manual_seed(0)
    if spec["device"] == "cuda":
        torch.set_float32_matmul_precision("high")
        turns.peak = torch.cuda.max_memory_allocated
    return turns, spec


def main() -> None:
    turns, spec = start()
    model, batches = gpt2(spec), Batches(spec)
    forward = torch.compile(model) if spec["contender"] == "compiled" else model

    def loss_of(number: int) -> torch.Tensor:
        tokens, labels = batches[number]
        return forward(input_ids=tokens, labels=labels).loss

    turns.about |= {"parameters": sum(p.numel() for p in model.parameters()), "threads": torch.get_num_threads()}
    train_forever(recipe(spec, model.parameters(), loss_of), turns, spec["updates_a_lap"])


if __name__ == "__main__":
    main()

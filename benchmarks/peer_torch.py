"""The PyTorch side of cpu.py: transformers' GPT-2, trained as PyTorch users do. Needs torch and transformers alone."""

import json
import sys
from typing import Any

import numpy as np
import torch
from cpu import BATCHES, TRAINING, Update, serve
from transformers import GPT2Config, GPT2LMHeadModel


def build(spec: dict[str, Any]) -> tuple[Update, dict[str, Any]]:
    """The update of GPT-2 in the given shape, precision and dropout: SDPA attention, fused AdamW, clipping."""
    torch.manual_seed(0)
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
    model = GPT2LMHeadModel(config).train()
    parameters = list(model.parameters())
    optimizer = torch.optim.AdamW(
        parameters, lr=TRAINING["learning_rate"], weight_decay=TRAINING["weight_decay"], fused=True
    )
    forward = torch.compile(model) if spec["contender"] == "compiled" else model

    arrays = np.load(spec["data"])
    tokens = torch.from_numpy(arrays["tokens"]).long()
    counts = torch.from_numpy(arrays["segments"] > 0) & (tokens != spec["bos_id"])
    labels = torch.where(counts, tokens, -100)  # the model shifts them

    def update(number: int) -> float:
        i = number % BATCHES
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=spec["precision"] == "bf16"):
            loss = forward(input_ids=tokens[i], labels=labels[i]).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, TRAINING["max_grad_norm"])
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.item()

    return update, {"parameters": sum(p.numel() for p in parameters), "threads": torch.get_num_threads()}


if __name__ == "__main__":
    serve(lambda: build(json.loads(sys.argv[1])))

"""A plain GPT in eager PyTorch on the text of recipes.py, one pass by nanoGPT's recipe, evaluated as small.py is.

Needs torch and NumPy alone; the tokens are there already. As in nanoGPT a row is any stretch of the text, in which
documents see each other. Its rate is the one that nanoGPT has for small models, its warm-up a tenth of the updates.

Shapes: N rows that are evaluated, B rows of a micro-batch, T positions.
"""

import json
import math
import sys
from pathlib import Path

import numpy as np
import torch
from peer_gpt import GPT
from torch.nn import functional as F

RATE, LOWEST_RATE, BETAS, WEIGHT_DECAY, LARGEST_NORM = 1e-3, 1e-4, (0.9, 0.99), 0.1, 1.0


def rate(step: int, steps: int, warmup: int) -> float:
    """Of update `step`, from 0: up in a line, down along a cosine."""
    if step < warmup:
        return RATE * (step + 1) / (warmup + 1)
    done = (step - warmup) / (steps - warmup)
    return LOWEST_RATE + 0.5 * (1 + math.cos(math.pi * done)) * (RATE - LOWEST_RATE)


def optimizer_of(model: GPT) -> torch.optim.Optimizer:
    matrices = [p for p in model.parameters() if p.dim() >= 2]
    others = [p for p in model.parameters() if p.dim() < 2]
    groups = [{"params": matrices, "weight_decay": WEIGHT_DECAY}, {"params": others, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=RATE, betas=BETAS, fused=True)


@torch.no_grad()
def evaluate(model: GPT, data: dict[str, np.ndarray], rows: int) -> tuple[float, float]:
    """(nats a target, bits a byte) of the held-out rows."""
    total, count = 0.0, 0
    for first in range(0, len(data["tokens"]), rows):
        tokens_BT, targets_BT, segments_BT = (
            torch.from_numpy(data[name][first : first + rows]).long() for name in ("tokens", "targets", "segments")
        )
        targets_BT[segments_BT == 0] = -100
        logits_BTV = model.logits(tokens_BT)
        total += F.cross_entropy(logits_BTV.flatten(0, 1), targets_BT.flatten(), reduction="sum").item()
        count += int((targets_BT >= 0).sum())
    return total / count, total / math.log(2) / int(data["bytes"])


def main() -> None:
    spec = json.loads(sys.argv[1])
    with np.load(spec["data"]) as file:
        data = {name: file[name] for name in file.files}
    torch.manual_seed(spec["seed"])
    text, length, rows = torch.from_numpy(data["train"].astype(np.int32)), spec["seq_len"], spec["rows"]
    model = GPT(spec["shape"], length, dropout=0.0)
    optimizer, steps = optimizer_of(model), spec["steps"]
    about = {"parameters": sum(p.numel() for p in model.parameters()), "torch": torch.__version__}
    Path(spec["data"]).with_suffix(".json").write_text(json.dumps(about))
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = rate(step, steps, steps // 10)
        for _ in range(spec["micro_batches"]):
            starts = torch.randint(len(text) - length, (rows,)).tolist()
            tokens_BT, targets_BT = (
                torch.stack([text[start + by : start + by + length] for start in starts]).long() for by in (0, 1)
            )
            loss = F.cross_entropy(model.logits(tokens_BT).flatten(0, 1), targets_BT.flatten())
            (loss / spec["micro_batches"]).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), LARGEST_NORM)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if (step + 1) % spec["eval_steps"] == 0 or step + 1 == steps:
            loss, bits = evaluate(model, data, rows)
            said = f"validation loss {loss:.4f}, perplexity {math.exp(loss):.2f}, {bits:.4f} bits per byte"
            print(f"step {step + 1}: {said}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()

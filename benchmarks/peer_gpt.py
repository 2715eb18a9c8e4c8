"""A plain GPT in PyTorch for gpu/speed.py, written to be fast: what somebody gets who builds GPT-2 by hand, and well.

Shapes: B rows, T positions, D model width, H heads, K channels of a head, V vocabulary.

Biases, tied embeddings, tanh GELU, LayerNorm before each sub-layer, as in GPT-2; fused query, key and value products,
`scaled_dot_product_attention` told that it is causal and nothing else, the loss inside of what is compiled, and the
vocabulary padded to a multiple of 128. Autocast, clipping and fused AdamW are peer_torch.py's.
"""

import torch
from lib.worker import train_forever
from peer_torch import Batches, recipe, start
from torch import nn
from torch.nn import functional as F

MULTIPLE = 128  # of the vocabulary: the output product runs at full speed then


class Attention(nn.Module):
    def __init__(self, width: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.heads, self.dropout = heads, dropout
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x_BTD: torch.Tensor) -> torch.Tensor:
        b, t, d = x_BTD.shape
        q_BHTK, k_BHTK, v_BHTK = (
            x.view(b, t, self.heads, d // self.heads).transpose(1, 2) for x in self.qkv(x_BTD).split(d, dim=2)
        )
        dropout = self.dropout if self.training else 0.0
        y_BHTK = F.scaled_dot_product_attention(q_BHTK, k_BHTK, v_BHTK, is_causal=True, dropout_p=dropout)
        return self.out(y_BHTK.transpose(1, 2).reshape(b, t, d))


class Block(nn.Module):
    def __init__(self, width: int, heads: int, hidden: int, dropout: float) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention = Attention(width, heads, dropout)
        self.up, self.down, self.dropout = nn.Linear(width, hidden), nn.Linear(hidden, width), nn.Dropout(dropout)

    def forward(self, x_BTD: torch.Tensor) -> torch.Tensor:
        x_BTD = x_BTD + self.dropout(self.attention(self.norm1(x_BTD)))
        return x_BTD + self.dropout(self.down(F.gelu(self.up(self.norm2(x_BTD)), approximate="tanh")))


class GPT(nn.Module):
    """Gives the mean loss of the labels that are not -100, each predicted from what comes before it."""

    def __init__(self, shape: dict[str, int], seq_len: int, dropout: float) -> None:
        super().__init__()
        width = shape["d_model"]
        self.tokens = nn.Embedding(-(-shape["vocab_size"] // MULTIPLE) * MULTIPLE, width)
        self.positions, self.dropout = nn.Embedding(seq_len, width), nn.Dropout(dropout)
        self.blocks = nn.ModuleList(
            Block(width, shape["n_heads"], shape["d_ff"], dropout) for _ in range(shape["n_layers"])
        )
        self.norm = nn.LayerNorm(width)
        self.apply(self._initialize)

    @staticmethod
    def _initialize(module: nn.Module) -> None:
        if isinstance(module, nn.Linear | nn.Embedding):
            nn.init.normal_(module.weight, std=0.02)
        if isinstance(module, nn.Linear):
            nn.init.zeros_(module.bias)

    def logits(self, tokens_BT: torch.Tensor) -> torch.Tensor:
        """[B, T, V], V as padded."""
        positions_T = torch.arange(tokens_BT.shape[1], device=tokens_BT.device)
        x_BTD = self.dropout(self.tokens(tokens_BT) + self.positions(positions_T))
        for block in self.blocks:
            x_BTD = block(x_BTD)
        return F.linear(self.norm(x_BTD), self.tokens.weight)

    def forward(self, tokens_BT: torch.Tensor, labels_BT: torch.Tensor) -> torch.Tensor:
        logits_BTV = self.logits(tokens_BT)
        targets_BT = F.pad(labels_BT[:, 1:], (0, 1), value=-100)
        return F.cross_entropy(logits_BTV.flatten(0, 1), targets_BT.flatten(), ignore_index=-100)


def main() -> None:
    turns, spec = start()
    model, batches = GPT(spec["shape"], spec["seq_len"], spec["dropout"]).train().to(spec["device"]), Batches(spec)
    loss_of = torch.compile(model)
    turns.about |= {"parameters": sum(p.numel() for p in model.parameters())}
    train_forever(recipe(spec, model.parameters(), lambda i: loss_of(*batches[i])), turns, spec["updates_a_lap"])


if __name__ == "__main__":
    main()

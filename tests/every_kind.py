"""A net with a layer of each kind that HiRA adapts."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

IDS = torch.arange(10).view(2, 5)
TARGETS = ["embedding", "first", "second", "attention", "convolution"]
PARAMETERS = ["experts.up"]
LAYERS = 7  # attention has two


class Experts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Parameter(torch.randn(3, 8, 8))

    def forward(self, x: Tensor) -> Tensor:
        return torch.stack([nn.functional.linear(x, self.up[i]) for i in range(3)]).sum(0)


class Net(nn.Module):
    """With the same weights each time."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(11, 8)
        self.first, self.second, self.experts = nn.Linear(8, 12), Conv1D(8, 12), Experts()
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.convolution, self.norm = nn.Conv1d(8, 6, 3, groups=2), nn.LayerNorm(8)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.experts(torch.tanh(self.second(torch.tanh(self.first(self.norm(self.embedding(ids)))))))
        return self.convolution(self.attention(x, x, x)[0].transpose(1, 2))

"""Start exactly on a ridge: a two-layer linear net at the origin, whose gradient vanishes though the loss is high."""

from __future__ import annotations

import torch
from torch import nn

from .squares import LeastSquares


class Saddle(LeastSquares):
    """Fit a rank-`rank` map by W2 W1 x from W1 = W2 = 0: the gradient is exactly zero, the Hessian is indefinite."""

    def __init__(self, seed: int = 0, size: int = 8, hidden: int = 8, rank: int = 3, samples: int = 64, steps: int = 600):
        g = torch.Generator().manual_seed(seed)
        x = torch.randn(samples, size, generator=g)
        u, v = torch.randn(size, rank, generator=g), torch.randn(rank, size, generator=g)
        torch.manual_seed(seed)
        model = nn.Sequential(nn.Linear(size, hidden, bias=False), nn.Linear(hidden, size, bias=False))
        for p in model.parameters():
            nn.init.zeros_(p)
        super().__init__(model, x, x @ (u @ v / size).T, steps)

"""Start exactly on a ridge: a two-layer linear net at the origin, whose gradient vanishes though the loss is high."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .canyon import HalfSquares


class Saddle:
    """Fit a rank-`rank` map by W2 W1 x from W1 = W2 = 0: the gradient is exactly zero, the Hessian is indefinite."""

    def __init__(self, seed: int = 0, size: int = 8, hidden: int = 8, rank: int = 3, samples: int = 64, steps: int = 600):
        g = torch.Generator().manual_seed(seed)
        self.x = torch.randn(samples, size, generator=g)
        u, v = torch.randn(size, rank, generator=g), torch.randn(rank, size, generator=g)
        self.y = self.x @ (u @ v / size).T
        torch.manual_seed(seed)
        self.model = nn.Sequential(nn.Linear(size, hidden, bias=False), nn.Linear(hidden, size, bias=False))
        for p in self.model.parameters():
            nn.init.zeros_(p)
        self.loss_fn = HalfSquares()
        self.steps = steps

    def batch(self, step: int) -> tuple[Tensor, Tensor]:
        return self.x, self.y

    @torch.no_grad()
    def evaluate(self) -> dict[str, float]:
        return {"loss": float(self.loss_fn(self.model(self.x), self.y))}

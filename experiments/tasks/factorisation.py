"""Matrix factorisation from next to nothing: U V from entries of 1e-4 sits by the saddle at zero."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .canyon import HalfSquares


class Factorisation:
    """Fit a matrix of rank `rank` by U V, full batch. start: standard deviation of the entries at the start."""

    def __init__(self, seed: int = 0, steps: int = 400, size: int = 256, rank: int = 5, start: float = 1e-4):
        g = torch.Generator().manual_seed(seed)
        u, v = torch.randn(size, rank, generator=g), torch.randn(rank, size, generator=g)
        self.x, self.y = torch.eye(size), u @ v / size**0.5  # largest singular values near size**0.5
        torch.manual_seed(seed)
        self.model = nn.Sequential(nn.Linear(size, rank, bias=False), nn.Linear(rank, size, bias=False))
        for p in self.model.parameters():
            nn.init.normal_(p, std=start)
        self.loss_fn: nn.Module = HalfSquares()
        self.steps = steps

    def batch(self, step: int) -> tuple[Tensor, Tensor]:
        return self.x, self.y

    @torch.no_grad()
    def evaluate(self) -> dict[str, float]:
        return {"loss": float(self.loss_fn(self.model(self.x), self.y))}

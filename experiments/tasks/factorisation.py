"""Matrix factorisation from next to nothing: U V from entries of 1e-4 sits by the saddle at zero."""

from __future__ import annotations

import torch
from torch import nn

from .squares import LeastSquares


class Factorisation(LeastSquares):
    """Fit a matrix of rank `rank` by U V, full batch. start: standard deviation of the entries at the start."""

    def __init__(self, seed: int = 0, steps: int = 400, size: int = 256, rank: int = 5, start: float = 1e-4):
        g = torch.Generator().manual_seed(seed)
        u, v = torch.randn(size, rank, generator=g), torch.randn(rank, size, generator=g)
        torch.manual_seed(seed)
        model = nn.Sequential(nn.Linear(size, rank, bias=False), nn.Linear(rank, size, bias=False))
        for p in model.parameters():
            nn.init.normal_(p, std=start)
        super().__init__(model, torch.eye(size), u @ v / size**0.5, steps)  # largest singular values near size**0.5

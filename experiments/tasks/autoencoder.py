"""A deep tanh autoencoder of the digits, 64-100-50-16-50-100-64: a classic of second-order methods."""

from __future__ import annotations

import itertools

import torch
from torch import Tensor, nn

from .digits import pixels


class Autoencoder:
    """Mean squared error; batches are drawn with replacement by torch's global generator."""

    def __init__(self, seed: int = 0, batch_size: int = 512, steps: int = 600):
        torch.manual_seed(seed)
        sizes = [64, 100, 50, 16, 50, 100, 64]
        parts = [part for a, b in itertools.pairwise(sizes) for part in (nn.Linear(a, b), nn.Tanh())]
        self.model, self.loss_fn = nn.Sequential(*parts[:-1]), nn.MSELoss()
        self.x, self.batch_size, self.steps = pixels()[0], batch_size, steps

    def batch(self, step: int) -> tuple[Tensor, Tensor]:
        rows = self.x[torch.randint(0, len(self.x), (self.batch_size,))]
        return rows, rows

    @torch.no_grad()
    def evaluate(self) -> dict[str, float]:
        """Over the whole training set."""
        return {"mse": float(self.loss_fn(self.model(self.x), self.x))}

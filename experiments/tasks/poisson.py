"""A physics-informed net for -laplace(u) = f on the unit square, u = sin(pi x) sin(2 pi y)."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn


class Poisson:
    """Full batch: the equation's residual at `points` and the boundary's values. No `loss_fn` says it: `objective` does."""

    def __init__(self, seed: int = 0, steps: int = 1000, width: int = 48, points: int = 256):
        torch.manual_seed(seed)
        self.model = nn.Sequential(
            nn.Linear(2, width), nn.Tanh(), nn.Linear(width, width), nn.Tanh(),
            nn.Linear(width, width), nn.Tanh(), nn.Linear(width, 1),
        )  # fmt: skip
        self.loss_fn = nn.MSELoss()
        self.steps = steps
        self.inside = torch.rand(points, 2).requires_grad_()
        self.f = 5 * math.pi**2 * exact(self.inside.detach())
        s = torch.linspace(0, 1, 20)
        self.edge = torch.cat(
            [torch.stack([a, b], 1) for a, b in ((s, 0 * s), (s, 0 * s + 1), (0 * s, s), (0 * s + 1, s))]
        )  # (80, 2)
        self.grid = torch.cartesian_prod(torch.linspace(0, 1, 50), torch.linspace(0, 1, 50))

    def batch(self, step: int) -> tuple[Tensor, Tensor]:
        return self.inside, self.f

    def objective(self) -> Tensor:
        """Mean square of the residual, and 100 times that of the boundary values."""
        (slope,) = torch.autograd.grad(self.model(self.inside).sum(), self.inside, create_graph=True)
        (xx,) = torch.autograd.grad(slope[:, 0].sum(), self.inside, create_graph=True)
        (yy,) = torch.autograd.grad(slope[:, 1].sum(), self.inside, create_graph=True)
        return (xx[:, 0] + yy[:, 1] + self.f).square().mean() + 100 * self.model(self.edge).square().mean()

    @torch.no_grad()
    def evaluate(self) -> dict[str, float]:
        """L2 distance to the exact solution on a grid, relative to its norm."""
        u = exact(self.grid)
        return {"relative_error": float((self.model(self.grid)[:, 0] - u).norm() / u.norm())}


def exact(p: Tensor) -> Tensor:
    return torch.sin(math.pi * p[:, 0]) * torch.sin(2 * math.pi * p[:, 1])

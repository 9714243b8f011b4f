"""A least-squares canyon: find a weight matrix whose inputs' covariance has a given condition number."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class Canyon:
    """loss = |W X - Y|^2 / 2N over (outputs, inputs) W, full batch; the Hessian's condition number is exactly kappa.

    `best_lr` is gradient descent's optimal constant step 2 / (lambda_max + lambda_min), for the tuned baseline.
    """

    def __init__(
        self,
        seed: int = 0,
        kappa: float = 1e4,
        inputs: int = 20,
        outputs: int = 10,
        samples: int = 200,
        steps: int = 2000,
    ):
        g = torch.Generator().manual_seed(seed)
        raw = torch.randn(samples, inputs, generator=g, dtype=torch.float64)
        white = torch.linalg.qr(raw).Q * samples**0.5  # exactly white: covariance I
        turn = torch.linalg.qr(torch.randn(inputs, inputs, generator=g, dtype=torch.float64)).Q
        spectrum = torch.logspace(0, -float(torch.log10(torch.tensor(kappa))), inputs, dtype=torch.float64)
        x = white @ torch.diag(spectrum.sqrt()) @ turn.T
        truth = torch.randn(outputs, inputs, generator=g, dtype=torch.float64)
        self.x, self.y = x, x @ truth.T
        torch.manual_seed(seed)
        self.model = nn.Linear(inputs, outputs, bias=False).double()
        nn.init.zeros_(self.model.weight)
        self.loss_fn = HalfSquares()
        self.steps = steps
        self.best_lr = 2.0 / (1.0 + 1.0 / kappa)  # lambda_max = 1 by construction

    def batch(self, step: int) -> tuple[Tensor, Tensor]:
        return self.x, self.y

    @torch.no_grad()
    def evaluate(self) -> dict[str, float]:
        return {"loss": float(self.loss_fn(self.model(self.x), self.y))}


class HalfSquares(nn.Module):
    """|prediction - target|^2 / 2, mean over the samples."""

    def forward(self, prediction: Tensor, target: Tensor) -> Tensor:
        return 0.5 * (prediction - target).square().sum(1).mean()

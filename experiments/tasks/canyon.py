"""A least-squares canyon: find a weight matrix whose inputs' covariance has a given condition number."""

from __future__ import annotations

import torch
from torch import nn

from .squares import LeastSquares


class Canyon(LeastSquares):
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
        torch.manual_seed(seed)
        model = nn.Linear(inputs, outputs, bias=False).double()
        nn.init.zeros_(model.weight)
        super().__init__(model, x, x @ truth.T, steps)
        self.best_lr = 2.0 / (1.0 + 1.0 / kappa)  # lambda_max = 1 by construction

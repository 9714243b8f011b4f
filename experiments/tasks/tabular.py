"""Breast cancer (scikit-learn): 569 patients, 30 measurements whose scales differ a hundred-thousandfold."""

from __future__ import annotations

import torch
from torch import nn

from .base import Classification


class Tabular(Classification):
    """A ReLU MLP 30-width-width-2 on 400 of them. scaled: standardised by the training set's means and spreads."""

    def __init__(
        self,
        seed: int = 0,
        batch_size: int = 400,
        steps: int = 300,
        width: int = 256,
        scaled: bool = False,
        validation: int = 0,
    ):
        try:
            from sklearn.datasets import load_breast_cancer
        except ImportError as error:
            raise SystemExit('task=tabular needs scikit-learn: pip install "adaptive-opt[experiments]"') from error
        data = load_breast_cancer()
        x, y = torch.tensor(data.data, dtype=torch.float32), torch.tensor(data.target)
        order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
        x, y = x[order], y[order]
        if scaled:
            x = (x - x[:400].mean(0)) / x[:400].std(0)
        torch.manual_seed(seed)
        model = nn.Sequential(
            nn.Linear(30, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 2)
        )  # fmt: skip
        super().__init__(model, (x[:400], y[:400]), (x[400:], y[400:]), batch_size, steps, seed, validation)

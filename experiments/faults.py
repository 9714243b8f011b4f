"""Faults to heal: batches that are broken now and then, from a seed of their own."""

from __future__ import annotations

import torch
from torch import Tensor


class Faults:
    """Multiplies a batch's inputs by `scale` (or fills them with NaN) in a share `rate` of the steps."""

    def __init__(self, rate: float = 0.0, scale: float = 1000.0, nan: bool = False, seed: int = 0):
        self.rate, self.scale, self.nan = rate, scale, nan
        self._generator = torch.Generator().manual_seed(seed + 1)
        self.count = 0

    def __call__(self, x: Tensor) -> Tensor:
        if float(torch.rand((), generator=self._generator)) >= self.rate:
            return x
        self.count += 1
        return torch.full_like(x, float("nan")) if self.nan else x * self.scale

"""Faults to heal: batches that are broken now and then, from a seed of their own."""

from __future__ import annotations

import torch
from torch import Tensor

KINDS = ("scale", "nan", "mixed")


class Faults:
    """Breaks the inputs in a share `rate` of the steps: times `scale`, all NaN, or the two in turn ("mixed")."""

    def __init__(self, rate: float = 0.0, kind: str = "scale", scale: float = 1000.0, seed: int = 0):
        if not 0 <= rate <= 1 or kind not in KINDS:
            raise ValueError(f"Faults(rate={rate}, kind={kind!r}): a rate in [0, 1] and one of {', '.join(KINDS)}")
        self.rate, self.kind, self.scale = rate, kind, scale
        self._generator = torch.Generator().manual_seed(seed + 1)
        self.count = 0

    def __call__(self, x: Tensor) -> Tensor:
        if float(torch.rand((), generator=self._generator)) >= self.rate:
            return x
        self.count += 1
        nan = self.kind == "nan" or (self.kind == "mixed" and self.count % 2 == 0)
        return torch.full_like(x, float("nan")) if nan else x * self.scale

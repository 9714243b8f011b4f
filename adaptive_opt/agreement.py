"""How much of a batch's gradient is the loss's own and how much the batch's: whether curvature limits the run, or noise."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from adaptive_opt.curvature import flatten

FIRST, EVERY = 15, 50  # the first step of a window, and steps between the beginnings of two
WINDOW = 10  # steps, each with a cosine to the one before
FEWEST = 5  # cosines that a mean is worth saying of


class Agreement:
    """The mean |cosine| between the gradients of successive good steps, over windows of ten in every fifty.

    With a signal S = |E g|^2 and noise N = E |g - E g|^2 the cosine of two batches' gradients is about S / (S + N): one half
    where the noise is as large as the signal, which is where the batch is as large as the gradient noise scale (McCandlish
    et al., 2018). Below it progress is limited by noise, and a preconditioner has little to gain (Zhang et al., 2019, "Which
    algorithmic choices matter at which batch sizes?"). Steps that throw the gradient to the other side of a valley and back
    make the cosine negative, and that is curvature's doing: hence its absolute value.

    Costs, in a window: a copy of the gradient between two steps and a norm and a dot product a step.
    """

    def __init__(self) -> None:
        self.indices: tuple[int, ...] = ()  # positions of the parameters that had a gradient
        self.last: Tensor | None = None  # (n,): the gradient of the step before, at length 1
        self.seen = -1  # its step
        self.cosines: list[Tensor] = []  # of the present window, still on the device
        self.mean: float | None = None  # of the last whole window
        self.read = 0  # the step at which it ended

    def due(self, step: int) -> bool:
        """In a window, or past the end of one whose last step was not good."""
        return step >= FIRST and ((step - FIRST) % EVERY <= WINDOW or len(self.cosines) >= FEWEST)

    def see(self, step: int, params: Sequence[Tensor], indices: Sequence[int]) -> bool:
        """The gradients of a good step that is due; True where a window ends with it. On several devices nothing is seen."""
        gradients = [p.grad for p in params if p.grad is not None]
        if len({g.device for g in gradients}) != 1:
            return False
        g = flatten(gradients)
        if step - self.seen > WINDOW or not _alike(g, self.last):
            self.forget()
        size = torch.linalg.vector_norm(g).clamp_min(torch.finfo(g.dtype).tiny)
        g /= size  # three digits are plenty here, so nothing is added up in a wider type
        if self.last is not None and self.indices == tuple(indices):
            self.cosines.append(torch.dot(g, self.last).abs())
        self.last, self.indices, self.seen = g, tuple(indices), step
        if (step - FIRST) % EVERY < WINDOW:
            return False
        mean = float(torch.stack(self.cosines).mean()) if len(self.cosines) >= FEWEST else math.nan
        if math.isfinite(mean):
            self.mean, self.read = mean, step
        self.forget()
        return True

    def now(self, step: int) -> float | None:
        """The mean |cosine| of the last window; None where it is too long ago."""
        return self.mean if step - self.read <= EVERY else None

    def forget(self) -> None:
        """The window so far; the parameters may have jumped."""
        self.last, self.cosines = None, []

    def state_dict(self) -> dict[str, Any]:
        return {**vars(self), "cosines": list(self.cosines)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        vars(self).update({**state, "cosines": list(state["cosines"]), "indices": tuple(state["indices"])})


def _alike(g: Tensor, last: Tensor | None) -> bool:
    """Whether the two can be multiplied: the model may have been moved, or cast, between two steps."""
    return last is None or (g.shape, g.dtype, g.device) == (last.shape, last.dtype, last.device)

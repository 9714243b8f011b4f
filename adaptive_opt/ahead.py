"""A look ahead: the loss at the end of the coming step makes a parabola with the loss and the slope here."""

from __future__ import annotations

import math

from torch import Tensor

from adaptive_opt.curvature import unflatten
from adaptive_opt.curvature.vectors import dot
from adaptive_opt.metric import Metric
from adaptive_opt.objective import Objective, moved

ROUNDING = 1e-5  # of the loss: float32's sums of a batch are good to 1e-7, the difference to a hundredth
FURTHEST = 100.0  # times the bottom of the valley: where the loss is not finite any more, and no further anywhere


def overshoot_ahead(objective: Objective, m: Metric, g: Tensor, share: float) -> tuple[float | None, int]:
    """Overshoot of the coming step d = -root * momentum from the loss at w + share * d, and the forward passes that it took.

    With phi(t) = loss(w + t d), on the batch that g is the gradient of, the parabola through phi(0), phi'(0) = g'd and
    phi(t) has overshoot (1 + (phi(t) - phi(0)) / (t |g'd|)) / t, which is (d'Hd / 2) / |g'd| where the loss is quadratic
    (Bu and Xu, 2025, fit it through three losses). None: d does not descend here, the loss curves down along it, or
    the difference is below the loss's own rounding.

    g: (n,), unclipped. share: of d, what is really taken. Parameters, buffers and RNG are afterwards what they were.
    """
    d = -m.root * m.momentum
    slope = share * float(dot(g, d))
    here, passes = objective.seen_loss(), 1
    if here is None:
        here, passes = objective.loss(), 2
    if not slope < -ROUNDING * abs(here):
        return None, passes - 1
    with moved(objective.params, unflatten(d, objective.params), share):
        there = objective.loss()
    if not math.isfinite(there):
        return FURTHEST / share, passes
    of_taken = 1 + (there - here) / -slope
    return (min(of_taken, FURTHEST) / share if of_taken > 0 else None), passes

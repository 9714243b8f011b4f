"""When a Lanczos run knows enough: what is asked of it, and when it is worth looking.

A question maps a run so far to an excess: the factor by which what is still unknown exceeds what was asked. At 1 or below
it is answered. The residual is what certifies: an eigenvalue lies within it of the Ritz value. That no eigenvalue lies
further out is only as sure as the start vector is random (see `outer_ends`).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Protocol

import numpy as np


class Known(Protocol):
    """What a question may look at."""

    @property
    def ritz_values(self) -> np.ndarray: ...
    @property
    def residuals(self) -> np.ndarray: ...
    @property
    def weights(self) -> np.ndarray: ...
    @property
    def dim(self) -> int: ...
    @property
    def epsilon(self) -> float: ...


Question = Callable[[Known], float]
FIRST_LOOK = 3


def top(tol: float) -> Question:
    """lambda_max to `tol` of itself."""
    return largest(1, tol)


def largest(count: int, tol: float) -> Question:
    """The `count` largest eigenvalues, each to `tol` of itself."""

    def excess(s: Known) -> float:
        if len(s.ritz_values) < count:
            return math.inf
        values, errors = s.ritz_values[-count:], s.residuals[-count:]
        return float(np.max(errors / np.maximum(tol * np.abs(values), _TINY)))

    return excess


def ends(top: float, bottom: float | None = None, floor: float = 0.0, failure: float | None = None) -> Question:
    """lambda_max to `top` of itself, lambda_min to `bottom` of itself or `floor` of epsilon, whichever is larger.

    With `top` alone, both ends to `top` of epsilon. A residual speaks for the eigenvalue that was found: a bulk at zero has a
    small one long before the negative eigenvalues come out of it. With `failure` the run goes on until the lowest eigenvalue
    is not further below either, but with this probability (see `hidden_below`; for random start vectors).
    """

    def excess(s: Known) -> float:
        scale = s.epsilon
        of_bottom = max(top * scale if bottom is None else max(bottom * abs(s.ritz_values[0]), floor * scale), _TINY)
        of_top = max(top * (scale if bottom is None else abs(s.ritz_values[-1])), _TINY)
        hidden = 0.0 if failure is None else hidden_below(s, failure)
        return float(max(s.residuals[-1] / of_top, s.residuals[0] / of_bottom, hidden / of_bottom))

    return excess


def hidden_below(s: Known, failure: float) -> float:
    """How far below the lowest Ritz value the lowest eigenvalue can be, but with probability `failure`; random starts only.

    Let u be its unit eigenvector, q the start, d the distance. The lowest Ritz vector is p(A) q for a polynomial that has all
    other Ritz values theta_i as its roots and is 1 / sqrt(w_0) at theta_0, w_0 the weight. So its residual is at least
    d |u'q| prod_i (1 + d / (theta_i - theta_0)) / sqrt(w_0), and |u'q| >= 1.25 failure / sqrt(n) but with that probability.
    """
    if not len(s.weights):
        return math.inf  # a restarted basis has no quadrature
    gaps = np.maximum(s.ritz_values[1:] - s.ritz_values[0], _TINY)
    goal = float(s.residuals[0] * math.sqrt(s.weights[0] * s.dim) / (1.25 * failure))
    low, high = 0.0, goal  # the product is 1 at least
    for _ in range(50):
        d = (low + high) / 2
        low, high = (low, d) if math.log(max(d, _TINY)) + np.log1p(d / gaps).sum() > math.log(max(goal, _TINY)) else (d, high)
    return high


def negative_below(tau: float) -> Question:
    """Is lambda_min below -tau * epsilon? See `is_below` for the answer.

    Yes is certain as soon as one Ritz value and the residuals of both ends, of which one is epsilon, allow no other answer. No
    is given when the lowest Ritz value lies above by four times its residual: certain for the eigenvalue found, likely for the
    spectrum (`outer_ends` says how likely).
    """

    def excess(s: Known) -> float:
        margin = -tau * s.epsilon - s.ritz_values[0]  # above 0: below the line
        # No takes four times the care: a lower eigenvalue that the first steps have not seen yet shows while this one converges
        unsure = tau * max(s.residuals[0], s.residuals[-1]) if margin > 0 else 4 * s.residuals[0]
        return float(unsure / max(abs(margin), _TINY))

    return excess


def is_below(s: Known, tau: float) -> bool | None:
    """The answer to `negative_below(tau)`; None where the run ended before it was known."""
    return bool(s.ritz_values[0] < -tau * s.epsilon) if negative_below(tau)(s) <= 1 else None


def next_look(step: int, excess: float = math.nan, before: float = math.nan) -> int:
    """The step at which to look again: where the decay of the excess will have brought it to 1, two to four steps on."""
    if step == 0:
        return FIRST_LOOK
    falls = 0 < excess < before and math.isfinite(before)
    ahead = math.ceil(math.log(excess) / math.log(before / excess)) if falls else 2
    return step + min(max(ahead, 2), 4)


_TINY = 1e-200  # in the place of 0: a quotient by the least float would overflow

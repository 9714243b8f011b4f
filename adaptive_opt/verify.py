"""Verdicts: did a treatment move the number that it was meant to move? Pure functions of the losses before and since."""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import median

from scipy.stats import linregress

Verdict = tuple[bool, str]  # kept?, the numbers in words


def lower_level(before: float | None, since: Sequence[float]) -> Verdict:
    """The loss's level (median of the last ten) against the level at the treatment."""
    if before is None or not since:
        return True, "no loss to compare"
    now = median(since[-10:])
    return now < before, f"loss {before:.4g} -> {now:.4g}"


def faster_progress(before: Sequence[float], since: Sequence[float]) -> Verdict:
    """Relative progress a step, by least squares on the loss before the switch and since; slower beyond its error fails."""
    if len(before) < 5 or len(since) < 5:
        return True, "too few losses to compare"
    old, old_error = _slope(before)
    new, new_error = _slope(since)
    start, end = median(before[-10:]), median(since[-10:])
    slower = new - old > 2 * math.hypot(old_error, new_error)  # slopes are negative when the loss falls
    worse = end > start and new > 2 * new_error
    words = f"progress {-old:.2e} -> {-new:.2e} of the loss a step, loss {start:.4g} -> {end:.4g}"
    return not (slower or worse), words


def _slope(losses: Sequence[float]) -> tuple[float, float]:
    """Slope a step of log(loss), or of loss / |mean| where it is not positive, and its standard error."""
    if min(losses) > 0:
        y = [math.log(x) for x in losses]
    else:
        size = abs(sum(losses) / len(losses)) or 1.0
        y = [x / size for x in losses]
    fit = linregress(range(len(y)), y)
    return float(fit.slope), float(fit.stderr)  # pyright: ignore[reportAttributeAccessIssue]

"""Trials and verdicts: did a treatment move the number that it was meant to move?"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from statistics import median
from typing import Any

from scipy.stats import linregress
from torch import Tensor

from adaptive_opt.interventions import Snapshot
from adaptive_opt.objective import Objective
from adaptive_opt.records import Event

Verdict = tuple[bool, str]  # kept?, the numbers in words


@dataclass
class Trial:
    """A treatment waiting for its verdict."""

    name: str
    event: Event
    until: int  # step of the verdict
    level: float | None  # the loss before
    losses_before: list[float]
    before: Snapshot | None  # the way back
    validation: float | None = None  # the user's validation loss before a change of mode

    def state_dict(self) -> dict[str, Any]:
        plain = {k: v for k, v in vars(self).items() if k not in ("event", "before")}
        return {
            **plain,
            "event": asdict(self.event),
            "before": None if self.before is None else self.before.state_dict(),
        }

    @classmethod
    def from_state_dict(cls, d: dict[str, Any] | None) -> Trial | None:
        return (
            None if d is None else cls(**{**d, "event": Event(**d["event"]), "before": Snapshot.from_state_dict(d["before"])})
        )


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


def better_mode(trial: Trial, since: Sequence[float], validation: float | None) -> Verdict:
    """A mode stays if it is not slower, and where the user shows a validation loss, only if that did not get worse.

    SAM is slower on the training loss by its nature: the validation loss alone judges it.
    """
    kept, result = faster_progress(trial.losses_before, since)
    if validation is None or trial.validation is None:
        return kept, result
    words = f"validation loss {trial.validation:.4g} -> {validation:.4g}"
    no_worse = validation <= trial.validation
    return (no_worse, words) if trial.name == "sam" else (kept and no_worse, f"{result}, {words}")


def with_and_without(objective: Objective | None, values_before: Mapping[int, Tensor]) -> Verdict:
    """The next batch's loss where the treatment led, and with the parameters as they were before it (by id)."""
    if objective is None:
        return True, "no batch to compare on"
    with_it, without = objective.loss(), objective.loss_with(values_before)
    return with_it < without, f"next batch's loss {without:.6g} without, {with_it:.6g} with it"


def _slope(losses: Sequence[float]) -> tuple[float, float]:
    """Slope a step of log(loss), or of loss / |mean| where it is not positive, and its standard error."""
    if min(losses) > 0:
        y = [math.log(x) for x in losses]
    else:
        size = abs(sum(losses) / len(losses)) or 1.0
        y = [x / size for x in losses]
    fit = linregress(range(len(y)), y)
    return float(fit.slope), float(fit.stderr)  # pyright: ignore[reportAttributeAccessIssue]

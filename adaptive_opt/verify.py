"""Trials and verdicts: did a treatment move the number that it was meant to move?"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from itertools import pairwise
from statistics import fmean, median, pstdev
from typing import Any

from scipy.stats import linregress
from torch import Tensor

from adaptive_opt.interventions import Snapshot
from adaptive_opt.objective import Objective
from adaptive_opt.records import Event, Look

ERRORS = 2.0  # standard errors that a difference must exceed to count as one
LEVEL = 10  # losses whose median is a level
FEWEST = 10  # losses from which a slope has an error worth the name
FEWEST_LOOKS = 4  # at the validation loss, through which a line has an error
GAIN = 1.5  # times the base's progress that a mode must show (docs/evidence.md, "length of kfac's steps")
SLOWER = 0.5  # of the base's progress: a mode that is slower than that is not given more time
MORE = 3  # times that a mode's trial is made longer where it tells nothing


@dataclass(frozen=True)
class Verdict:
    """What a trial showed. `kept` is None where it is undecided."""

    kept: bool | None
    result: str  # the numbers in words, and why


@dataclass
class Trial:
    """A treatment waiting for its verdict."""

    name: str
    event: Event
    until: int  # step of the verdict
    level: float | None  # the loss before
    steps_before: list[int] = field(default_factory=list[int])
    losses_before: list[float] = field(default_factory=list[float])  # of those steps
    before: Snapshot | None = None  # the way back
    validation: float | None = None  # the user's validation loss before a change of mode
    longer: int = 0  # times that it was made longer
    seconds: float = 0.0  # that the run had taken, readings left out
    length: dict[str, Any] | None = None  # the state of the step length in the mode before
    moved: bool = False  # the mode has changed the parameters as it began: `level` is of there

    def state_dict(self) -> dict[str, Any]:
        plain = {k: v for k, v in vars(self).items() if k not in ("event", "before")}
        return {
            **plain,
            "event": asdict(self.event),
            "before": None if self.before is None else self.before.state_dict(),
        }

    @classmethod
    def from_state_dict(cls, d: dict[str, Any] | None) -> Trial | None:
        if d is not None and "steps_before" not in d:  # of an older version: nothing to compare with
            d = {**d, "losses_before": [], "steps_before": []}
        return (
            None if d is None else cls(**{**d, "event": Event(**d["event"]), "before": Snapshot.from_state_dict(d["before"])})
        )


def lower_level(before: float | None, since: Sequence[float]) -> Verdict:
    """The loss's level (median of the last ten) against the level at the treatment."""
    if before is None or not since:
        return Verdict(True, "no loss to compare")
    now = median(since[-LEVEL:])
    return Verdict(now < before, f"loss {before:.4g} -> {now:.4g}")


def below_its_start(level: float | None, since: Sequence[float]) -> Verdict:
    """The loss's level against the start that a mode has made: the higher of two batches' losses there.

    level: of the batch that it was made on; the next one's is the first since. The level now counts as higher from two
    standard deviations of the batches' losses, there and now, on.
    """
    last = since[-LEVEL:]
    if level is None or not last:
        return Verdict(None, "no loss to compare")
    start, now = max(level, since[0]), median(last)
    kept = True if now < start else False if now - start > ERRORS * pstdev([level, since[0], *last]) else None
    return Verdict(kept, f"loss {start:.4g} -> {now:.4g}")


Series = tuple[Sequence[int], Sequence[float]]  # steps, and the loss of each


def faster_progress(before: Series, since: Series, at: int | None = None, price: float = 1.0) -> Verdict:
    """Relative progress a step, by least squares on the loss before the switch and since.

    price: steps of the base that a step takes since; the progress counts in the base's.

    at: the step of the switch. A loss falls about like a power of the step count: without a switch, what it gained in the
    n' = n at / (at + n) steps before is what it would gain in the n since. Only those are compared, and their slope counts
    n' / n. Without it a mode that is tried early would be held against the steep beginning.

    Kept where the loss is seen to fall, faster than before by two standard errors, and `GAIN` times as fast. Taken back where
    it is seen to be slower, or less than `SLOWER` times as fast as a base that falls, or to rise. Undecided in between.
    """
    if min(len(before[1]), len(since[1])) < FEWEST:
        return Verdict(None, "too few losses to compare")
    share, span = 1.0, since[0][-1] - since[0][0] + 1
    if at is not None:
        share = at / (at + span)
        near = sum(step >= at - share * span for step in before[0])
        before = before[0][-max(near, FEWEST) :], before[1][-max(near, FEWEST) :]
    old, old_error = (share * x for x in slope(before[1], before[0]))
    new, new_error = (x / price for x in slope(since[1], since[0]))  # negative when the loss falls
    start, end = median(before[1][-LEVEL:]), median(since[1][-LEVEL:])
    error = math.hypot(old_error, new_error)
    words = (
        f"progress {-old:.2e} +- {old_error:.1e} -> {-new:.2e} +- {new_error:.1e} of the loss a step"
        f"{f' of the base ({price:.3g} in one since)' if price > 1 else ''}, loss {start:.4g} -> {end:.4g}"
    )
    if new - old > ERRORS * error or (old < -ERRORS * old_error and new > SLOWER * old):
        return Verdict(False, f"{words}: slower")
    if new > ERRORS * new_error and end > start:
        return Verdict(False, f"{words}: the loss rises")
    if new < min(GAIN * old, -ERRORS * new_error) and old - new > ERRORS * error:
        return Verdict(True, f"{words}: faster")
    return Verdict(None, f"{words}: too little to tell")


def better_mode(trial: Trial, since: Series, validation: float | None, price: float = 1.0) -> Verdict:
    """A mode stays if it is faster, and where the user shows a validation loss, only if that did not get worse."""
    progress = faster_progress((trial.steps_before, trial.losses_before), since, trial.event.step, price)
    return no_worse(progress, trial.validation, validation)


def no_worse(verdict: Verdict, before: float | None, now: float | None) -> Verdict:
    """The verdict, but against what the user's validation loss got worse by."""
    if before is None or now is None:
        return verdict
    return Verdict(verdict.kept if now <= before else False, f"{verdict.result}, validation loss {before:.4g} -> {now:.4g}")


def better_validation(before: Sequence[Look], since: Sequence[Look]) -> Verdict:
    """The validation loss during a trial against the line through that of the same stretch before, drawn on.

    SAM is slower on the training loss by its nature: the validation loss alone judges it. A line that falls is drawn on for
    twice the steps: so many the base would have taken for SAM's gradients. One that rises is not, or standing still would be
    a gain. Undecided where the difference is less than two standard errors.
    """
    if not before or not since:
        return Verdict(None, "no looks at the validation loss to compare")
    seen = fmean(look.validation for look in since)
    if len(before) < FEWEST_LOOKS:  # no line yet
        return Verdict(seen <= before[-1].validation, f"validation loss {before[-1].validation:.4g} -> {seen:.4g}")
    before = before[-max(len(since), FEWEST_LOOKS) :]
    x, y = [look.step for look in before], [look.validation for look in before]
    middle, end = fmean(x), before[-1].step
    b = float(linregress(x, y).slope)  # pyright: ignore[reportAttributeAccessIssue]
    drawn_on = [look.step + (look.step - end if b < 0 else 0) for look in since]
    expected = fmean(y) + b * (fmean(drawn_on) - middle)
    scatter = math.sqrt(sum((v - fmean(y) - b * (s - middle)) ** 2 for s, v in zip(x, y, strict=True)) / (len(x) - 2))
    spread = sum((s - middle) ** 2 for s in x)
    error = scatter * math.sqrt(1 / len(since) + 1 / len(x) + (fmean(drawn_on) - middle) ** 2 / spread)
    words = f"validation loss {seen:.4g} in the trial, {expected:.4g} +- {error:.2g} by the line through {len(x)} looks before"
    return Verdict(None if abs(seen - expected) <= ERRORS * error else seen < expected, words)


def with_and_without(objective: Objective | None, values_before: Mapping[int, Tensor]) -> Verdict:
    """The next batch's loss where the treatment led, and with the parameters as they were before it (by id)."""
    if objective is None:
        return Verdict(True, "no batch to compare on")
    with_it, without = objective.loss(), objective.loss_with(values_before)
    return Verdict(with_it < without, f"next batch's loss {without:.6g} without, {with_it:.6g} with it")


def slope(losses: Sequence[float], steps: Sequence[int] | None = None) -> tuple[float, float]:
    """Slope a step of log(loss), or of loss / |mean| where it is not positive, and its standard error.

    Losses of neighbouring steps are alike: with residuals of lag-one autocorrelation r, n of them tell as much as
    n (1 - r) / (1 + r) independent ones (Santer et al., 2000), and the error is larger by the root of that.
    """
    if min(losses) > 0:
        y = [math.log(x) for x in losses]
    else:
        size = abs(sum(losses) / len(losses)) or 1.0
        y = [x / size for x in losses]
    x = range(len(y)) if steps is None else steps
    fit = linregress(x, y)
    a, b = float(fit.intercept), float(fit.slope)  # pyright: ignore[reportAttributeAccessIssue]
    residuals = [v - a - b * t for t, v in zip(x, y, strict=True)]
    variance = fmean(r * r for r in residuals)
    alike = fmean(r * s for r, s in pairwise(residuals)) / variance if variance > 0 else 0.0
    r = min(max(alike, 0.0), 0.9)  # fifty losses do not tell 0.9 from 1
    return b, float(fit.stderr) * math.sqrt((1 + r) / (1 - r))  # pyright: ignore[reportAttributeAccessIssue]

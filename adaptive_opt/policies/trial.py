"""TrialPolicy: tries every mode for the same compute, keeps the one that gained most, and tries again when its gain is gone."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import linear_regression, median

from adaptive_opt.policies.common import MODES, checked, fitting, with_interventions
from adaptive_opt.records import Decision, Diagnosis, History, Stay

STEPS = 10  # that a level of a Stay stands for
LEAST = 3  # levels from which a slope can be taken


@dataclass(frozen=True)
class TrialPolicy:
    """A round gives each mode `window` gradient-equivalents, so that a mode that pays two a step gets half the steps.

    The mode whose loss fell fastest per gradient-equivalent is kept. When it gains less than `reopen` times what it gained in
    its trial, over as much compute again, a new round begins. All that is known comes from `History.stays`: the policy has no
    memory of its own. A round that goes wrong is not taken back; give `interventions=("rollback", ...)` for that.
    """

    window: float = 60.0  # six levels of ten steps for the base, three for SAM
    reopen: float = 0.5
    modes: Sequence[str] = MODES
    interventions: Sequence[str] = ()

    def __post_init__(self) -> None:
        checked("TrialPolicy", self.modes, self.window, "window")
        if not 0 <= self.reopen <= 1:
            raise ValueError(f"TrialPolicy(reopen={self.reopen}): a share of the gain in the trial, in [0, 1]")

    def decide(self, diagnosis: Diagnosis, history: History) -> Decision:
        mode, reason = self._choose(history, fitting(self.modes, history))
        return with_interventions(mode, reason, self.interventions, diagnosis, history)

    def _choose(self, history: History, modes: Sequence[str]) -> tuple[str, str]:
        tried, kept = self._round(history.stays, modes)
        now = history.stays[-1] if history.stays else None
        if now is None:
            return modes[0], "the first on trial"
        if kept is None and now.spent < self.window and now.mode in modes:
            return now.mode, ""  # its trial goes on
        left = [m for m in modes if m not in tried]
        if left:
            return left[0], f"on trial for {self.window:g} gradients"
        gains = self._gains(tried, modes)
        best = max(modes, key=lambda m: gains[m])
        if now.mode != best:
            return best, f"gained most a gradient: {', '.join(f'{m} {g:.2e}' for m, g in gains.items())}"
        stayed = now.spent if kept is not None else now.spent - self.window
        if stayed < self.window or gain(now, self.window) >= self.reopen * gains[best]:
            return best, ""
        others = [m for m in modes if m != best]
        return (others or [best])[0], f"{best} gains less than {self.reopen:g} of what it did: a new round"

    def _round(self, stays: Sequence[Stay], modes: Sequence[str]) -> tuple[dict[str, Stay], Stay | None]:
        """The trials of the present round by mode, and the stay of the one that was kept, if it has begun."""
        tried: dict[str, Stay] = {}
        kept: Stay | None = None
        for stay in stays:
            whole = all(m in tried for m in modes)
            gains = self._gains(tried, modes) if whole and kept is None else {}
            if gains and stay.mode == max(modes, key=lambda m: gains[m]):
                kept = stay
            elif whole or stay.mode in tried:
                tried, kept = {stay.mode: stay}, None
            else:
                tried[stay.mode] = stay
        return tried, kept

    def _gains(self, tried: Mapping[str, Stay], modes: Sequence[str]) -> dict[str, float]:
        return {m: gain(tried[m], self.window, first=True) for m in modes}


def gain(stay: Stay, window: float, first: bool = False) -> float:
    """Fall of the loss's logarithm (of its level, where it is not positive) per gradient-equivalent.

    Over the first or the latest `window` gradient-equivalents of a stay; minus infinity where too little was seen to tell.
    """
    price = stay.spent / stay.steps if stay.steps else 1.0
    count = max(LEAST, round(window / price / STEPS))
    levels = stay.levels[:count] if first else stay.levels[-count:]
    if len(levels) < LEAST:
        return -math.inf
    if min(levels) > 0:
        y = [math.log(level) for level in levels]
    else:
        size = abs(median(levels)) or 1.0
        y = [level / size for level in levels]
    return -linear_regression(range(len(y)), y).slope / (STEPS * price)

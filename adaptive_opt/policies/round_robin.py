"""RoundRobinPolicy: every mode in turn, as long as the others."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from adaptive_opt.policies.common import MODES, checked, fitting, with_interventions
from adaptive_opt.records import Decision, Diagnosis, History


@dataclass(frozen=True)
class RoundRobinPolicy:
    """`dwell` steps in each of `modes`, one after the other, over and over."""

    dwell: int = 50
    modes: Sequence[str] = MODES
    interventions: Sequence[str] = ()

    def __post_init__(self) -> None:
        checked("RoundRobinPolicy", self.modes, self.dwell, "dwell")

    def decide(self, diagnosis: Diagnosis, history: History) -> Decision:
        turn = history.step // self.dwell
        modes = fitting(self.modes, history)
        reason = f"turn {turn} of the round"
        return with_interventions(modes[turn % len(modes)], reason, self.interventions, diagnosis, history)

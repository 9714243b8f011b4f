"""RandomPolicy: another mode every so often, by chance. What beats the base must beat this too."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from random import Random

from adaptive_opt.policies.common import MODES, checked, fitting, with_interventions
from adaptive_opt.records import Decision, Diagnosis, History


@dataclass(frozen=True)
class RandomPolicy:
    """Every `dwell` steps a mode is drawn from `modes`: a function of seed and step alone, the same on every rank."""

    dwell: int = 50
    seed: int = 0
    modes: Sequence[str] = MODES
    interventions: Sequence[str] = ()

    def __post_init__(self) -> None:
        checked("RandomPolicy", self.modes, self.dwell, "dwell")

    def decide(self, diagnosis: Diagnosis, history: History) -> Decision:
        turn = history.step // self.dwell
        mode = Random(f"{self.seed}:{turn}").choice(fitting(self.modes, history))
        return with_interventions(mode, f"drawn by chance for turn {turn}", self.interventions, diagnosis, history)

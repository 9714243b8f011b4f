"""The nouns of the clinic: what is run, how a careful human would have run it, and what a run's row says."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from ..tasks.base import Task

BASES = ("AdamW", "SGD")  # SGD with momentum 0.9
Row = dict[str, Any]  # a line of JSON


@dataclass(frozen=True)
class Human:
    """The cheap fix: what somebody who knows what is wrong would write in a few lines."""

    words: str
    task: Callable[[int], Task] | None = None  # other data or another start
    base: tuple[str, float] | None = None  # another optimizer and its learning rate, for both bases
    factor: float | None = None  # on the sensible learning rate; None: the workload's own
    clip: float | None = None  # gradient norm
    skip: bool = False  # steps whose gradient is not finite
    best: bool = False  # early stopping: ends with the parameters of the lowest validation loss


@dataclass(frozen=True)
class Workload:
    """A task of a seed with a learning rate for each base, and what is wrong with it."""

    name: str
    group: str  # "ill-conditioned", "saddle", "sharp", "drift", "broken steps" or "healthy"
    task: Callable[[int], Task]
    rates: dict[str, float]  # base -> a sensible learning rate
    metric: str  # of the task's evaluate(); "log10 X": its logarithm relative to `chance`, no lower than FLOOR
    chance: float  # what the metric is when nothing was learned
    higher: bool = False  # whether more of it is better
    factor: float = 1.0  # on the sensible learning rate
    faults: tuple[float, str] | None = None  # share of the batches that are broken, and how
    validate: bool = False  # the user shows a validation loss
    human: Human | None = None  # None: nothing to fix
    reference: str = "human"  # whose value is the healthy one: "human", or the workload that is this one's healthy twin

    @property
    def healthy(self) -> bool:
        return self.group == "healthy"


@dataclass(frozen=True)
class Job:
    """One run."""

    workload: str
    arm: str
    base: str
    seed: int
    budget: str = "compute"  # or "steps": as many steps as the bare optimizer takes

    @property
    def key(self) -> tuple[str, str, str, int, str]:
        return self.workload, self.arm, self.base, self.seed, self.budget


@dataclass
class Treated:
    """What was done in a run, from its events."""

    interventions: int = 0  # treatments begun
    reverted: int = 0  # taken back
    gainless: int = 0  # kept without the gain that they were meant for
    skipped: int = 0  # batches
    void: int = 0  # decided on, and nothing found that helps
    sentences: list[str] = field(default_factory=list)

    @property
    def alarms(self) -> int:
        """False ones, if nothing was wrong."""
        return self.reverted + self.gainless + self.skipped

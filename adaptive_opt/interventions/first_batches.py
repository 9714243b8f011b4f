"""The first batches of a run: before anything was seen nothing can stand out, so they are compared with one another."""

from __future__ import annotations

from statistics import median
from typing import Any

from adaptive_opt.interventions.base import Snapshot
from adaptive_opt.modes import StepContext
from adaptive_opt.probe import FORWARD
from adaptive_opt.records import Outlier
from adaptive_opt.signals import LEARNED

STANDS_OUT = 30.0  # times the median of the five; docs/evidence.md, "first batches"
FEWEST = 8  # samples: of five squared errors of one sample each, the largest is 30 times the median in 6 % of all draws


class FirstBatches:
    """Losses of the first five good batches at the same parameters, those of the snapshot before the first.

    A batch that is broken shows there whatever its step did to the parameters since; a learning rate that is too high, or
    a loss that falls fast, does not. One forward pass a batch, four in all.
    """

    def __init__(self) -> None:
        self.losses: list[float] | None = None  # None: nothing is compared (any more)
        self.steps: list[int] = []

    def begin(self, step: int, ctx: StepContext) -> None:
        """`step` is the first: a snapshot of its parameters was taken just now."""
        self.losses, self.steps = [], []
        self._add(step, ctx, None)

    def look(self, step: int, ctx: StepContext, start: Snapshot) -> Outlier | None:
        """The batch that stood out, once there are five; a broken one that is the fifth itself is not counted."""
        self._add(step, ctx, start)
        if self.losses is None or len(self.losses) < LEARNED:
            return None
        usual, most = median(self.losses), max(self.losses)
        if not 0 < usual * STANDS_OUT < most:  # a loss that goes below zero has no level to compare with
            self.losses = None
            return None
        found = Outlier(self.steps[self.losses.index(most)], most / usual, STANDS_OUT)
        if found.step == step:
            self.losses.pop()
            self.steps.pop()
        else:
            self.losses = None
        return found

    def _add(self, step: int, ctx: StepContext, start: Snapshot | None) -> None:
        objective = ctx.objective
        if objective is None or self.losses is None or (objective.batch_size or FEWEST) < FEWEST:
            self.losses = None
            return
        try:
            loss = objective.seen_loss() if start is None else None
            if loss is None:
                ctx.cost += FORWARD
                loss = objective.loss() if start is None else objective.loss_with(start.values(ctx.base))
        except Exception as error:
            ctx.failure, self.losses = error, None
            return
        self.losses.append(loss)
        self.steps.append(step)

    def state_dict(self) -> dict[str, Any]:
        return {"losses": None if self.losses is None else list(self.losses), "steps": list(self.steps)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.losses, self.steps = state["losses"], state["steps"]

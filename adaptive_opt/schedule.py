"""When to measure: every N steps, or within a share of the training time."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from adaptive_opt.memory import ProbeMemory
from adaptive_opt.records import Trend

FINANCED = 500  # steps: the first readings are paid for by the budget of this many steps
EARLY = 64  # at steps 0, 1, 2, 4, ... up to this one it is looked whether the step is too long
EARLY_LOOKS = 16  # steps: while a momentum fills and the first large gradients pass
REPRICED = 128  # the first step at which measured time is looked at; then at every power of two


@dataclass(frozen=True)
class Schedule:
    """The part of a LanczosProbe that says when; its docstring has the rules."""

    every: int | None = None
    overhead: float | None = None
    price: float | None = None

    def __post_init__(self) -> None:
        if self.every is not None and self.overhead is not None:
            raise ValueError(f"LanczosProbe(every={self.every}, overhead={self.overhead}): give one of the two")
        if self.every is None and self.overhead is None:
            object.__setattr__(self, "overhead", 0.05)
        if self.every is not None and (not isinstance(self.every, int) or self.every < 1):
            raise ValueError(f"LanczosProbe(every={self.every!r}): a whole number of steps, 1 or more")
        if self.overhead is not None and not 0 <= self.overhead <= 10:
            raise ValueError(f"LanczosProbe(overhead={self.overhead!r}): a share of the training work, for example 0.05")
        if self.price is not None and not self.price > 0:
            raise ValueError(f"LanczosProbe(price={self.price}): above 0, or None to measure it")

    @property
    def idle(self) -> bool:
        """Never measures by itself."""
        return self.every is None and self.overhead == 0

    def due(
        self,
        trend: Trend,
        memory: ProbeMemory,
        cheap_cost: float,
        full_cost: float,
        watchful: bool = False,
        alarm: bool = False,
        early: bool = True,
        first: bool = True,
    ) -> str | None:
        """What to take in this step, "full", "cheap" or None: deterministic, from counts and costs alone.

        `watchful`: a treatment follows the readings; the whole budget goes into them. `alarm`: look now.
        `early`, `first`: False where looks ahead see what the readings at steps 1, 2, 4, ... 64 and at step 0 are for, at a
        tenth of their cost.
        """
        step, price = trend.step, memory.price if self.price is None else self.price
        if self.every is not None:
            return "full" if step % self.every == 0 else None
        if not self.overhead:
            return None
        # in steps of the run: what was spent, and what a reading would; who is watched or alarmed pays as counted
        spent, cheap, full = memory.spent * price, cheap_cost * price, full_cost * price
        allowance = self.overhead * max(step, FINANCED)
        if trend.stalled and step - memory.last_full >= 50 and memory.spent + full_cost <= self.overhead * (step + FINANCED):
            return "full"
        if spent + full <= allowance and (step - memory.last_full) * self.overhead >= 2 * full:
            return "full"
        if alarm and self.lends(step, memory, cheap_cost):
            return "cheap"
        if watchful and (step - memory.last_cheap) * self.overhead >= cheap_cost:
            return "cheap" if memory.spent + cheap_cost <= self.overhead * (step + FINANCED) else None
        soon = (early if step else first) and self._early(step)
        late = (step - memory.last_cheap) * self.overhead >= 2 * cheap  # half of the budget
        return "cheap" if (soon or late) and spent + cheap <= allowance else None

    def looks_ahead(self, step: int, memory: ProbeMemory, cost: float, automatic: bool = True) -> bool:
        """Whether a look ahead is due that the step's length follows: for two thirds of the budget.

        `automatic`: each of the first steps too, no reading being there that the length could come from.
        """
        if self.every is not None or not self.overhead:
            return False
        return (automatic and step < EARLY_LOOKS) or (step - memory.last_look) * self.overhead >= 1.5 * cost

    def glances(self, step: int, memory: ProbeMemory, cost: float) -> bool:
        """Whether a look ahead is due at a step that nothing seems wrong with: early, then for a tenth of the budget."""
        if self.every is not None or not self.overhead:
            return False
        return self._early(step) or (step - memory.last_look) * self.overhead >= 10 * cost

    def lends(self, step: int, memory: ProbeMemory, cost: float) -> bool:
        """Whether a reading that something asks for can be paid: from the steps to come, if it must be."""
        return memory.spent + cost <= (self.overhead or 0.0) * (step + 2 * FINANCED)

    @staticmethod
    def _early(step: int) -> bool:
        return step <= EARLY and (step & (step - 1)) == 0

    def keep_time(self, step: int, memory: ProbeMemory, device: torch.device) -> bool:
        """To be called at the end of every step: the run's time goes on, and now and then (True) the price is looked at."""
        if self.price is None and self.every is None and self.overhead:
            memory.clock.tick(device)
            if step >= REPRICED and (step & (step - 1)) == 0:
                memory.reprice(step)
                return True
        return False

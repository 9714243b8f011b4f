"""No learning rate at all: the step is held at a fraction of its stability limit from the first step to the last."""

from __future__ import annotations

import math

from torch.optim import Optimizer

from adaptive_opt.family import family
from adaptive_opt.interventions.base import Applied, Patient
from adaptive_opt.interventions.damp import Damp, fraction_of_limit
from adaptive_opt.metric import RULES
from adaptive_opt.records import Reading

FLATTER = 0.1  # of what the readings so far say: a single flat batch counts no further


class AutoStep(Damp):
    """`step_size="auto"`: the learning rate comes from curvature, the user's gives only the shape over time.

    The rule is Damp's, without its cap: the geometric mean of `hold` / overshoot and the fraction of the stability limit.
    Both are proportional to the learning rate that they were read at, so what is averaged, in the logarithm over the
    readings, is what they are per unit of it; the result does not depend on the user's. The effective rate is
    that times lr / (the largest lr so far): a schedule's decay is kept, a warm-up comes of itself.

    bounds: the least and the largest effective learning rate.
    """

    state = (*Damp.state, "peak", "lr", "wanted")

    def __init__(self, hold: float = 0.5, rule: str = "both", bounds: tuple[float, float] = (0.0, math.inf)):
        super().__init__(hold=hold, rule=rule)
        if not 0 <= bounds[0] < bounds[1]:
            raise ValueError(f"AutoStep(bounds={bounds}): the least learning rate, then a larger one")
        self.bounds = bounds
        self.peak = 0.0  # the largest lr that the schedule has given so far
        self.lr = 0.0  # the present one
        self.wanted: float | None = None  # effective learning rate at the peak of the schedule; None before the first reading

    def choose(self, base: Optimizer) -> None:
        """The base whose steps it is for. Raises ValueError where their stability limit is not known."""
        if RULES.get(family(base) or "") is None:
            raise ValueError(
                f"AdaptiveOptimizer(base={type(base).__name__}(...), step_size='auto'): the stability limit of its steps is "
                f"not known, so there is nothing to take a learning rate from; known are {', '.join(sorted(RULES))}"
            )
        self.fraction = fraction_of_limit(base)

    @property
    def engaged(self) -> bool:
        return True  # never lets go

    @property
    def watched(self) -> bool:
        return False  # its readings are the schedule's own

    def apply(self, patient: Patient) -> Applied | None:
        return None  # what UNSTABLE asks for is done at every reading

    def see(self, lr: float) -> None:
        self.lr, self.peak = lr, max(self.peak, lr)
        if self.wanted is not None and self.peak > 0:
            self.scale = self.wanted / self.peak

    def follow(self, reading: Reading) -> str | None:
        if not reading.stability or not self.lr > 0:
            return None
        first, weight = self.wanted is None, 0.5
        if first or self.moved:
            weight = 1.0
        self.stability = self._averaged(self.stability, reading.stability / self.lr, weight)
        if reading.overshoot is not None:
            self.overshoot = self._averaged(self.overshoot, reading.overshoot / self.lr, weight)
            self.moved = False
        elif first:  # no descent or no upward curvature along the step: as long as the limit allows, until the next reading
            self.overshoot = self.stability + math.log(self.hold / self.fraction)
        self._hold()
        if not first:
            return None
        return f"took {self.scale * self.lr:.3g} as the learning rate, the user's {self.lr:.3g} gives only the shape"

    def good_step(self) -> None:
        pass

    def press_on(self) -> bool:
        return False

    def _averaged(self, so_far: float, value: float, weight: float) -> float:
        new = math.log(value)
        if weight < 1:
            new = max(new, so_far + math.log(FLATTER))
        return so_far + weight * (new - so_far)

    def _hold(self) -> None:
        self.wanted = min(max(self._length(), self.bounds[0]), self.bounds[1])
        self.see(self.lr)

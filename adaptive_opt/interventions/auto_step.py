"""No learning rate at all: the step is held at a fraction of its stability limit from the first step to the last."""

from __future__ import annotations

import math

from torch.optim import Optimizer

from adaptive_opt.family import family
from adaptive_opt.interventions.base import Applied, Patient
from adaptive_opt.interventions.damp import Damp, fraction_of_limit, has_momentum
from adaptive_opt.metric import RULES
from adaptive_opt.records import Reading

LOOKED = 0.3  # weight of one look ahead in the average of their logarithms
GROWTH = 1.05  # a step: faster, a deep net without normalisation leaves the place that the looks are of (docs/evidence.md)
BEYOND = 1.2  # times the way to the bottom, the schedule's decay included: up to there a step stays as long as it is
CAREFUL = 0.8  # of the limit and of 1 / overshoot, for steps without momentum


class AutoStep(Damp):
    """`step_size="auto"`: the learning rate comes from curvature, the user's gives only the shape over time.

    With momentum the step grows to `hold` / overshoot: at 1/2 the coming step ends at the bottom of the parabola that looks
    ahead measure, a forward pass at a time. It is shortened where the step that is really taken goes a fifth beyond: a shorter
    step finds a sharper place, so while a schedule decays, what is read per unit of rate would shorten it a second time.
    Without momentum that is a trap from the first step on, and Damp's rule holds: the geometric mean of the step to the
    bottom and a fraction of the stability limit, from the readings.
    Both are proportional to the learning rate that they were read at, so what is averaged, in the logarithm, is
    what they are per unit of it; the result does not depend on the user's. The effective rate is that
    times lr / (the largest lr so far): a schedule's decay is kept, a warm-up comes of itself.

    bounds: the least and the largest effective learning rate.
    """

    state = (*Damp.state, "peak", "lr", "wanted", "at")

    def __init__(self, hold: float | None = None, bounds: tuple[float, float] = (0.0, math.inf)):
        super().__init__(hold=0.5 if hold is None else hold)
        if not 0 <= bounds[0] < bounds[1]:
            raise ValueError(f"AutoStep(bounds={bounds}): the least learning rate, then a larger one")
        self.given, self.bounds = hold, bounds
        self.looks = False
        self.peak = 0.0  # the largest lr that the schedule has given so far
        self.lr = 0.0  # the present one
        self.wanted: float | None = None  # effective learning rate at the peak of the schedule; None before the first reading
        self.at = 0  # step of `wanted`

    def choose(self, base: Optimizer) -> None:
        """The base whose steps it is for. Raises ValueError where their stability limit is not known."""
        if RULES.get(family(base) or "") is None:
            raise ValueError(
                f"AdaptiveOptimizer(base={type(base).__name__}(...), step_size='auto'): the stability limit of its steps is "
                f"not known, so there is nothing to take a learning rate from; known are {', '.join(sorted(RULES))}"
            )
        self.looks = has_momentum(base)
        self.rule = "step" if self.looks else "both"
        if self.looks:
            self.fraction = fraction_of_limit(base)
        else:
            self.fraction, self.hold = CAREFUL, CAREFUL if self.given is None else self.given

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

    def look(self, step: int, overshoot: float) -> None:
        if self.wanted is not None and self.lr > 0:
            self.overshoot = self._averaged(self.overshoot, overshoot / self.lr, 1.0 if self.moved else LOOKED)
            self.moved = False
            self._take(step)

    def follow(self, reading: Reading) -> str | None:
        if not reading.stability or not self.lr > 0:
            return None
        first = self.wanted is None
        weight = 1.0 if first or self.moved else 0.5
        self.stability = self._averaged(self.stability, reading.stability / self.lr, weight)
        if reading.overshoot is not None:
            self.overshoot = self._averaged(self.overshoot, reading.overshoot / self.lr, weight)
            self.moved = False
        elif first:  # no descent or no upward curvature along the step: as long as the limit allows, until the next reading
            self.overshoot = self.stability + math.log(self.hold / self.fraction)
        self._take(reading.step)
        if not first:
            return None
        return f"took {self.scale * self.lr:.3g} as the learning rate, the user's {self.lr:.3g} gives only the shape"

    def good_step(self) -> None:
        pass

    def press_on(self) -> bool:
        return False

    def _averaged(self, so_far: float, value: float, weight: float) -> float:
        return so_far + weight * (math.log(value) - so_far)

    def _take(self, step: int) -> None:
        bottom = self._length()
        if self.wanted is None:
            length = self._first(bottom)
        else:
            length = min(bottom, self.wanted * math.exp(min((step - self.at) * math.log(GROWTH), 700.0)))
            length = self._kept(self.wanted, length, bottom) if self.looks else length
        self.wanted, self.at = min(max(length, self.bounds[0]), self.bounds[1]), step
        self.see(self.lr)

    def _first(self, bottom: float) -> float:
        """A careful start, from which it grows."""
        return math.sqrt(bottom * self.fraction / math.exp(self.stability)) if self.looks else bottom

    def _kept(self, present: float, length: float, bottom: float) -> float:
        """The present length, unless that is short of `length` or, as the schedule has it now, far beyond the bottom."""
        return min(max(present, length), BEYOND * bottom * self.peak / self.lr)

"""A ceiling over the step size that comes down when the loss rises: a trust region (Conn, Gould and Toint, 2000)."""

from __future__ import annotations

import math
from statistics import fmean, variance
from typing import Any

BLOCK = 10  # losses of which the mean is compared
RISE = 3.0  # standard errors: at 2 healthy recurrent nets are held back too (docs/evidence.md, "step size")
REGROWTH = 1.005  # a step: faster, a step that was too long is so again a few steps later


class Ceiling:
    """The largest step that the losses of the run allow; none until they rise.

    Whoever chooses the step foresees a fall of the loss at every one. Where the mean of ten losses is nevertheless above the
    lowest of all such means, by three standard errors, twice in turn, and the second time by no less, the steps were too
    long: the ceiling is half of the last one, and rises again by half a percent a step.
    """

    def __init__(self) -> None:
        self.block: list[float] = []
        self.above: float | None = None  # mean of the block before if that was clearly above the lowest
        self.lowest = math.inf  # of all blocks' means
        self.noise = 0.0  # variance of the lowest block's mean
        self.height = math.inf
        self.at = 0  # step at which the height was set

    def risen(self, loss: float | None) -> str | None:
        """Hear the loss of a step; a sentence where it has risen."""
        if loss is None or not math.isfinite(loss):
            return None
        self.block.append(loss)
        if len(self.block) < BLOCK:
            return None
        mean, noise = fmean(self.block), variance(self.block) / BLOCK
        above = mean - self.lowest > RISE * math.sqrt(noise + self.noise)
        again = above and self.above is not None and mean >= self.above
        self.block, self.above = [], mean if above else None
        if mean < self.lowest:
            self.lowest, self.noise = mean, noise
        return f"the loss has risen from {self.lowest:.3g} to {mean:.3g}, means of {BLOCK} steps" if again else None

    def lower(self, step: int, length: float) -> None:
        """To half of what was too long."""
        self.height, self.at = length / 2, step

    def __call__(self, step: int) -> float:
        return grown(self.height, REGROWTH, step - self.at)

    def state_dict(self) -> dict[str, Any]:
        return {**vars(self), "block": list(self.block)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        vars(self).update({**state, "block": list(state["block"])})


def grown(length: float, rate: float, steps: int) -> float:
    """The length times rate to the power of the steps, which overflows nowhere."""
    return length * math.exp(min(steps * math.log(rate), 700.0))

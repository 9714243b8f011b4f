"""What the probe remembers between readings; everything here goes into the checkpoint."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from adaptive_opt.clock import Clock

VECTORS = ("top", "sharpest", "bottom", "below", "anchor")
COUNTS = ("spent", "price", "whole", "last_cheap", "last_full", "last_look", "began")


@dataclass
class ProbeMemory:
    """Vectors that the next reading starts from, and the accounts of what was spent."""

    generator: torch.Generator
    top: Tensor | None = None  # (n,) Ritz vector of the largest eigenvalue in the optimizer's metric
    sharpest: Tensor | None = None  # (n,) Ritz vector of H's largest eigenvalue
    bottom: Tensor | None = None  # (n,) Ritz vector of the most negative eigenvalue of H, from the latest full reading
    below: Tensor | None = None  # (n,) all of its negative Ritz directions together, downhill, if there are several
    anchor: Tensor | None = None  # (n,) parameters at the latest reading
    spent: float = 0.0  # gradient-equivalents, as counted
    price: float = 1.0  # steps of the run that a counted gradient-equivalent takes in measured time, 1 at least
    whole: bool = False  # the batch cannot be cut
    last_cheap: int = -1
    last_full: int = -1
    last_look: int = -1  # ahead
    began: int | None = None  # step of a reading at which the base had no state yet; None: there was none
    clock: Clock = field(default_factory=Clock)

    def reprice(self, steps: int) -> None:
        """Set the price from the clock: a power of the square root of two, and no other than it is while it is about right.

        So runs that differ by the clock's noise alone seldom differ in their price.
        """
        training = self.clock.training
        if steps > 0 and training > 0 and self.spent > 0:
            measured = self.clock.probing / (training / steps) / self.spent
            if not self.price / 2 < measured <= 1.1 * self.price:
                self.price = 2.0 ** max(math.ceil(2 * math.log2(max(measured, 1.0))) / 2, 0.0)

    def state_dict(self) -> dict[str, Any]:
        seed, state = self.generator.initial_seed(), self.generator.get_state()
        unused = torch.equal(state, torch.Generator().manual_seed(seed).get_state())  # then its seed says it all, in no memory
        return {
            "generator": seed if unused else state,
            "clock": self.clock.state_dict(),
            **{name: getattr(self, name) for name in (*VECTORS, *COUNTS)},
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        generator = state["generator"]
        if isinstance(generator, int):
            self.generator.manual_seed(generator)
        else:
            self.generator.set_state(generator.cpu())
        self.clock.load_state_dict(state["clock"])
        for name in (*VECTORS, *COUNTS):
            setattr(self, name, state[name])

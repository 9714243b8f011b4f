"""Stays: how long the run was in each mode, what it spent there, and how the loss went."""

from __future__ import annotations

import math
from dataclasses import asdict
from statistics import median
from typing import Any

from adaptive_opt.records import Stay

CHUNK = 10  # steps whose median loss is one level
KEPT, LEVELS = 24, 60  # stays, and levels of each


class Stays:
    """The latest stays, oldest first; the last one is the present."""

    def __init__(self) -> None:
        self.stays: list[Stay] = []
        self._chunk: list[float] = []  # losses of the level that is not whole yet
        self._treatment_cost: float | None = None  # up to the last step

    def remember(self, step: int, mode: str, loss: float | None, treatment_cost: float) -> None:
        """A step was taken in `mode`; treatment_cost: gradient-equivalents of all replays so far."""
        if not self.stays or self.stays[-1].mode != mode:
            self.stays = [*self.stays[-KEPT + 1 :], Stay(mode, step)]
            self._chunk = []
        before = 0.0 if self._treatment_cost is None else self._treatment_cost
        self._treatment_cost = treatment_cost
        now = self.stays[-1]
        levels = now.levels
        if loss is not None and math.isfinite(loss):
            self._chunk.append(loss)
        if len(self._chunk) == CHUNK:
            levels = (*levels[-LEVELS + 1 :], median(self._chunk))
            self._chunk = []
        spent = now.spent + 1 + treatment_cost - before
        self.stays[-1] = Stay(now.mode, now.since, now.steps + 1, spent, levels)

    def state_dict(self) -> dict[str, Any]:
        stays = [{**asdict(stay), "levels": list(stay.levels)} for stay in self.stays]
        return {"stays": stays, "chunk": list(self._chunk), "treatment_cost": self._treatment_cost}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.stays = [Stay(**{**stay, "levels": tuple(stay["levels"])}) for stay in state["stays"]]
        self._chunk, self._treatment_cost = list(state["chunk"]), state["treatment_cost"]

"""Skip a broken step; after a blow-up go back to the last good parameters and take shorter steps for a while."""

from __future__ import annotations

from typing import Any

import torch

from adaptive_opt.interventions.base import Applied, Patient, Snapshot, all_params
from adaptive_opt.records import Trend


class Rollback:
    """One bad batch is skipped. Bad steps in a row, lost progress or broken parameters: back to a snapshot.

    every: good steps between snapshots. patience: bad steps in a row that are blamed on the batch; after that the
    parameters are. shrink: factor on the step after each return; it grows back by 2 % a good step. Two snapshots at most
    are kept (the latest and the best); each costs the size of the parameters and the base's state, on their device.
    Returns are spaced out by doubling, so that it never loops.
    """

    name = "rollback"

    def __init__(self, every: int = 25, patience: int = 3, shrink: float = 0.5):
        if every < 1 or patience < 1 or not 0 < shrink <= 1:
            raise ValueError(f"Rollback(every={every}, patience={patience}, shrink={shrink}): out of range")
        self.every, self.patience, self.shrink = every, patience, shrink
        self.latest: Snapshot | None = None
        self.best: Snapshot | None = None
        self.best_level: float | None = None
        self.bad = 0  # bad steps in a row
        self.good = 0  # good steps since the last return
        self.returns = 0  # returns without a calm stretch between them
        self.scale = 1.0

    def apply(self, patient: Patient) -> Applied | None:
        """Called when the diagnosis says NON_FINITE or BROKEN."""
        trend = patient.trend
        sick_step = not trend.finite or trend.spike
        broken = not trend.finite and not self._finite(patient)
        self.bad += sick_step
        if sick_step and not broken and self.bad < self.patience:
            return Applied("skipped this batch", skip=True, outcome="done")
        target = self.latest if sick_step else self.best
        if target is None or (not broken and self._waiting()):
            if not sick_step:
                return None
            return Applied("skipped this batch", skip=True, outcome="done") if not trend.finite or self.bad < 4 * self.patience else None
        self.returns += 1
        self.good, self.bad = 0, 0
        self.scale = max(self.shrink**self.returns, 1e-3)
        target.restore(patient.ctx.base)
        return Applied(
            f"went back to the parameters of step {target.step}, steps shortened to {self.scale:.3g}", skip=True, trial=20
        )

    def good_step(self, trend: Trend, base: Any) -> None:
        """A step went well: count it, let the step size return, keep a snapshot when it is time."""
        self.bad = 0
        self.good += 1
        self.scale = min(1.0, self.scale * 1.02)
        if self.good >= 200 * 2 ** min(self.returns, 10) // 2:
            self.returns = 0

    def keep(self, step: int, trend: Trend, base: Any) -> None:
        """Before a step on healthy parameters: a snapshot when it is time."""
        if trend.lost > 0.1 or (self.latest is not None and step - self.latest.step < self.every):
            return
        self.latest = Snapshot.take(step, base)
        level = trend.usual_loss
        if level is None or self.best_level is None or level <= self.best_level:
            self.best, self.best_level = self.latest, level

    def _waiting(self) -> bool:
        return self.returns > 0 and self.good < 10 * 2 ** min(self.returns, 10)

    @staticmethod
    def _finite(patient: Patient) -> bool:
        params = all_params(patient.ctx.base)
        return bool(torch.stack([torch.isfinite(p.detach()).all() for p in params]).all())

    def state_dict(self) -> dict[str, Any]:
        return {
            "latest": None if self.latest is None else self.latest.state_dict(),
            "best": None if self.best is None else self.best.state_dict(),
            "shared": self.best is self.latest,
            "best_level": self.best_level,
            "bad": self.bad,
            "good": self.good,
            "returns": self.returns,
            "scale": self.scale,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.latest = Snapshot.from_state_dict(state["latest"])
        self.best = self.latest if state["shared"] else Snapshot.from_state_dict(state["best"])
        self.best_level, self.bad, self.good = state["best_level"], state["bad"], state["good"]
        self.returns, self.scale = state["returns"], state["scale"]

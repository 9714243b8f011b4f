"""Skip a broken step; after a blow-up go back to the last good parameters, and take shorter steps for a while."""

from __future__ import annotations

from statistics import median
from typing import Any

import torch

from adaptive_opt.interventions.base import Applied, Patient, Snapshot
from adaptive_opt.interventions.first_batches import FirstBatches
from adaptive_opt.modes import StepContext, all_params
from adaptive_opt.probe import FORWARD
from adaptive_opt.records import Outlier, Trend

BETTER = 0.9  # of the loss here: going back must be worth it
CALM = 200  # good steps after which earlier returns are forgotten
USUAL = 10  # norms whose median is the usual one
CLIP = 4.0  # times the usual gradient norm; docs/evidence.md, "layers"


class Rollback:
    """One bad batch is skipped. Bad steps in a row, lost progress or broken parameters: back to a snapshot.

    every: good steps between snapshots. patience: bad steps in a row that are blamed on the batch; after that the
    parameters are. shrink: factor on the step for each return without a calm stretch since; the step grows back by 2 % a
    good step, slower after each return. After a return gradients are clipped at four times the norm that was usual at the
    snapshot (Pascanu et al., 2013), until none has been longer for 200 steps. most: returns without a calm stretch; after
    them it only skips what is not finite, so that it never loops, and still restores parameters that are not finite. Two
    snapshots at most are kept (the latest and the best); each costs the size of the parameters and the base's state, and
    `bytes` says how much that is. device: where they are kept, for example "cpu" for host memory; None: with the parameters.
    """

    name = "rollback"

    def __init__(
        self, every: int = 25, patience: int = 3, shrink: float = 0.5, most: int = 8, device: str | torch.device | None = None
    ):
        if every < 1 or patience < 1 or not 0 < shrink <= 1 or most < 1:
            raise ValueError(f"Rollback(every={every}, patience={patience}, shrink={shrink}, most={most}): out of range")
        self.every, self.patience, self.shrink, self.most = every, patience, shrink, most
        self.device = None if device is None else torch.device(device)
        self.latest: Snapshot | None = None
        self.best: Snapshot | None = None
        self.best_level: float | None = None
        self.bad = 0  # bad steps in a row
        self.good = 0  # good steps since the last return
        self.returns = 0  # returns without a calm stretch between them
        self.scale = 1.0
        self.clip: float | None = None  # gradient norm at most, since a return
        self.clipped = 0  # step at which it last was more
        self.cliffs = False  # a single high loss is the edge of one, which the clipping is for, and no rise
        self.learned: list[float] | None = None  # norms of which the usual one is to be learned
        self.first = FirstBatches()

    @property
    def bytes(self) -> int:
        """What the snapshots take."""
        both = [self.latest] if self.best is self.latest else [self.latest, self.best]
        return sum(snapshot.bytes for snapshot in both if snapshot is not None)

    def apply(self, patient: Patient) -> Applied | None:
        """Called when the diagnosis says NON_FINITE or BROKEN."""
        trend = patient.trend
        if trend.outlier is not None:
            return self._without(trend.outlier, trend)
        if trend.poison is not None:
            return Applied("took back what it did to the running statistics", cleanse=trend.poison.step)
        sick_step = not trend.finite or trend.spike
        broken = not trend.finite and not self._finite(patient)
        self.bad += sick_step
        skipped = Applied("skipped this batch", skip=True)
        if sick_step and not broken and self.bad < self.patience:
            return skipped
        target = self.latest if sick_step and self.returns < 2 else self.best
        if target is None or (self.returns >= self.most and not broken):
            return skipped if not trend.finite else None
        if trend.finite and not self._better_there(patient, target):
            self.bad, self.best_level = 0, None
            done = f"took it for a change of the data: the parameters of step {target.step} do no better on this batch"
            return Applied(done, forget=True)
        self.returns = min(self.returns + 1, self.most)
        self.good, self.bad = 0, 0
        self.scale = self.shrink**self.returns
        done = f"went back to the parameters of step {target.step}, steps shortened to {self.scale:.3g}"
        if target.usual_norm is not None:
            self.clip, self.clipped = CLIP * target.usual_norm, trend.step
            done += f", gradients clipped at {self.clip:.3g}"
        return Applied(done, skip=True, moved=True, back_to=target, forget=True, but=target.step, trial=20)

    def _without(self, outlier: Outlier, trend: Trend) -> Applied | None:
        """One of the first batches was broken: go on as if it had not been there."""
        if outlier.step == trend.step:
            return Applied("skipped this batch", skip=True)
        if self.latest is None:
            return None
        done = f"went back to the parameters of step {self.latest.step}"
        return Applied(done, skip=True, moved=True, back_to=self.latest, forget=True)

    def forget(self) -> None:
        """The run begins again elsewhere: no snapshot, and nothing that was held back, is of it."""
        self.latest = self.best = self.best_level = self.clip = None
        self.bad = self.good = self.returns = 0
        self.scale = 1.0

    def expect_cliffs(self) -> None:
        """From here on gradients are held near the norm that is usual in the steps to come."""
        self.clip, self.learned, self.cliffs = None, [], True

    def hold(self, step: int, trend: Trend, ctx: StepContext) -> str | None:
        """The gradients of this step, no longer than they may be; what was done, when that is news."""
        if trend.grad_norm is None:
            return None
        done = None
        if self.learned is not None:
            self.learned.append(trend.grad_norm)
            if len(self.learned) == USUAL:
                self.clip, self.clipped, self.learned = CLIP * median(self.learned), step, None
                done = f"clipping gradients at {self.clip:.3g}, {CLIP:g} times their usual norm"
        if self.clip is not None and trend.grad_norm > self.clip:
            self.clipped = step
            for p in all_params(ctx.base):
                if p.grad is not None:
                    p.grad.mul_(self.clip / trend.grad_norm)
        elif step - self.clipped >= CALM:
            self.clip, self.cliffs = None, self.cliffs and self.learned is not None
        return done

    def good_step(self) -> None:
        """A step went well: count it and let the step size return."""
        self.bad = 0
        self.good += 1
        self.scale = min(1.0, self.scale * 1.02 ** (1 / max(self.returns, 1)))
        if self.good >= CALM:
            self.returns = 0

    def keep(self, step: int, trend: Trend, ctx: StepContext) -> None:
        """Before a step on healthy parameters: a snapshot when it is time and the loss is no higher than it has been."""
        if self.latest is not None and step - self.latest.step < self.every:
            return
        level = trend.usual_loss if trend.usual_loss is not None else trend.loss
        fresh = self.returns > 0 and self.good < 20  # what is usual since a return may be bad: compare with the best then
        compared = self.best_level if fresh else level
        if compared is not None and trend.loss is not None and trend.loss - compared > abs(compared):
            return
        self.latest = Snapshot.take(step, ctx, trend.usual_grad_norm, self.device)
        if trend.usual_grad_norm is None:  # nothing was seen yet
            self.first.begin(step, ctx)
        if level is None or self.best_level is None or level <= self.best_level:
            self.best, self.best_level = self.latest, level

    @staticmethod
    def _better_there(patient: Patient, target: Snapshot) -> bool:
        """Whether this batch's loss is lower at the snapshot: if not, it is the data that changed."""
        objective = patient.ctx.objective
        if objective is None:
            return True
        patient.ctx.cost += 2 * FORWARD
        try:
            return objective.loss_with(target.values(patient.ctx.base)) < BETTER * objective.loss()
        except Exception as error:
            patient.ctx.failure = error
            return True

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
            "clip": self.clip,
            "clipped": self.clipped,
            "cliffs": self.cliffs,
            "learned": None if self.learned is None else list(self.learned),
            "first": self.first.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.latest = Snapshot.from_state_dict(state["latest"], self.device)
        self.best = self.latest if state["shared"] else Snapshot.from_state_dict(state["best"], self.device)
        self.best_level, self.bad, self.good = state["best_level"], state["bad"], state["good"]
        self.returns, self.scale = state["returns"], state["scale"]
        for k in ("clip", "clipped", "cliffs", "learned"):  # older checkpoints have none of them
            setattr(self, k, state.get(k, getattr(self, k)))
        self.first.load_state_dict(state["first"])

"""Leave a saddle along negative curvature (Goldfarb et al., 2020; Curtis and Robinson, 2019)."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from adaptive_opt.curvature import flatten, unflatten
from adaptive_opt.curvature.vectors import norm
from adaptive_opt.interventions.base import Applied, Patient, Snapshot
from adaptive_opt.objective import moved
from adaptive_opt.probe import FORWARD
from adaptive_opt.sharded import placed


class Escape:
    """Line search along the most negative Ritz direction, both signs, on forward passes only.

    The first length is `first` times (1 + |w|); it grows by `growth` while the loss falls, up to `cap` times (1 + |w|).
    The move stands in for the base's step. It is kept if the loss is lower on the next batch too.
    """

    name = "escape"

    def __init__(self, first: float = 0.01, growth: float = 3.0, cap: float = 1.0):
        if not 0 < first <= cap or growth <= 1:
            raise ValueError(f"Escape(first={first}, growth={growth}, cap={cap}): 0 < first <= cap and growth above 1")
        self.first, self.growth, self.cap = first, growth, cap

    def apply(self, patient: Patient) -> Applied | None:
        """Called when the diagnosis says SADDLE; None when no step along the direction lowers the loss."""
        ctx, objective = patient.ctx, patient.ctx.objective
        if objective is None or patient.bottom is None:
            return None
        direction = unflatten(patient.bottom, objective.params)
        size = 1 + float(norm(flatten(objective.params)))  # of whole parameters: a shard's own norm is another on each process

        def loss_at(length: float) -> float:
            ctx.cost += FORWARD
            with moved(objective.params, direction, length):
                value = objective.loss()
            return value if math.isfinite(value) else math.inf

        try:
            return self._search(patient, direction, size, loss_at)
        except Exception as error:  # the batch cannot be had again; `moved` has put the parameters back
            ctx.failure = error
            return None

    def _search(
        self, patient: Patient, direction: list[Tensor], size: float, loss_at: Callable[[float], float]
    ) -> Applied | None:
        ctx = patient.ctx
        assert ctx.objective is not None
        start = loss_at(0.0)
        tries = {sign * self.first * size: loss_at(sign * self.first * size) for sign in (1.0, -1.0)}
        length = min(tries, key=lambda t: tries[t])
        best = tries[length]
        while best < start and abs(length) * self.growth <= self.cap * size:
            further = loss_at(length * self.growth)
            if not further < best:
                break
            length, best = length * self.growth, further
        if not best < start:
            return None
        before = Snapshot.take(patient.trend.step, ctx)
        with torch.no_grad():
            for p, d in zip(ctx.objective.params, direction, strict=True):
                p.add_(placed(d, p).to(p.dtype), alpha=length)
        done = f"stepped {length:.3g} along the most negative curvature, loss {start:.6g} -> {best:.6g}"
        return Applied(done, moved=True, trial=1, before=before)

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        pass

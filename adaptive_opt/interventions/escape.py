"""Leave a saddle along negative curvature (Goldfarb et al., 2020; Curtis and Robinson, 2019)."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from adaptive_opt.curvature import flatten, unflatten
from adaptive_opt.curvature.vectors import dot, norm
from adaptive_opt.interventions.base import Applied, Patient, Snapshot
from adaptive_opt.modes import StepContext
from adaptive_opt.objective import moved
from adaptive_opt.probe import FORWARD
from adaptive_opt.sharded import placed

KICK = 0.01  # of a weight's root mean square: as somebody does who breaks the symmetry by hand
WORTH = 0.01  # of the loss: what counts as progress in a stall, or the step is not worth its measurement


class Escape:
    """Line search along negative curvature, both signs, on forward passes only.

    Two directions are tried: that of the most negative Ritz value, and all negative ones together, each as long as its
    curvature and downhill. The first length is `first` times (1 + |w|); it grows by `growth` while the loss falls, up to
    `cap` times (1 + |w|). The move stands in for the base's step; what the base's momentum had along it is taken out. It is
    made if it lowers the loss by 1 %, and kept if the loss is lower on the next batch too.

    Units that are exact copies of one another need no measurement of curvature: their weights get noise of a hundredth, which
    is kept if the loss is lower after `trial` steps.
    """

    name = "escape"

    def __init__(self, first: float = 0.01, growth: float = 3.0, cap: float = 10.0, trial: int = 50):
        if not 0 < first <= cap or growth <= 1 or trial < 2:
            given = f"Escape(first={first}, growth={growth}, cap={cap}, trial={trial})"
            raise ValueError(f"{given}: 0 < first <= cap, growth above 1, trial of 2 or more")
        self.first, self.growth, self.cap, self.trial = first, growth, cap, trial

    def apply(self, patient: Patient) -> Applied | None:
        """Called when the diagnosis says SADDLE; None when no step along the directions lowers the loss."""
        if (kicked := self._kicked(patient)) is not None:
            return kicked
        ctx, objective = patient.ctx, patient.ctx.objective
        directions = [d for d in (patient.bottom, patient.below) if d is not None]
        if objective is None or not directions:
            return None
        size = 1 + float(norm(flatten(objective.params)))  # of whole parameters: a shard's own norm is another on each process
        try:
            start, found = objective.loss(), []
            ctx.cost += FORWARD
            for direction in directions:
                found.append((*self._search(ctx, unflatten(direction, objective.params), size, start), direction))
        except Exception as error:  # the batch cannot be had again; `moved` has put the parameters back
            ctx.failure = error
            return None
        best, length, direction = min(found, key=lambda f: f[0])
        if not start - best > WORTH * abs(start):
            return None
        before = Snapshot.take(patient.trend.step, ctx)
        pieces = unflatten(direction, objective.params)
        with torch.no_grad():
            for p, d in zip(objective.params, pieces, strict=True):
                p.add_(placed(d, p).to(p.dtype), alpha=length)
            if ctx.mode.steps_as_base:  # elsewhere the momentum is in another basis
                _without(ctx, pieces, direction)
        along = "the most negative curvature" if direction is patient.bottom else "all negative curvature together"
        done = f"stepped {length:.3g} along {along}, loss {start:.6g} -> {best:.6g}"
        return Applied(done, moved=True, trial=1, before=before)

    @torch.no_grad()
    def _kicked(self, patient: Patient) -> Applied | None:
        """Noise on layers whose units are copies of one another; None where there are none."""
        if patient.model is None or patient.reading is None:
            return None
        mine = {id(p) for p in patient.ctx.params}
        named = {n: p for n, p in patient.model.named_parameters() if id(p) in mine}
        copied = [r.name for r in patient.reading.layers if r.copies and f"{r.name}.weight" in named]
        if not copied:
            return None
        before = Snapshot.take(patient.trend.step, patient.ctx)
        generator = torch.Generator().manual_seed(patient.trend.step)  # the same on every process
        for name in copied:
            w = named[f"{name}.weight"]
            noise = torch.randn(w.shape, generator=generator).to(w.device, w.dtype)
            w.add_(placed(noise, w), alpha=KICK * float(norm(flatten([w]))) / w.numel() ** 0.5)
        done = f"told them apart by noise of {KICK:.0%} on the weights of {', '.join(copied)}"
        return Applied(done, moved=True, trial=self.trial, before=before)

    def _search(self, ctx: StepContext, direction: list[Tensor], size: float, start: float) -> tuple[float, float]:
        """The lowest loss along +-direction, and the signed length at which it is."""
        objective = ctx.objective
        assert objective is not None

        def loss_at(length: float) -> float:
            ctx.cost += FORWARD
            with moved(objective.params, direction, length):
                value = objective.loss()
            return value if math.isfinite(value) else math.inf

        tries = {sign * self.first * size: loss_at(sign * self.first * size) for sign in (1.0, -1.0)}
        length = min(tries, key=lambda t: tries[t])
        best = tries[length]
        while best < start and abs(length) * self.growth <= self.cap * size:
            further = loss_at(length * self.growth)
            if not further < best:
                break
            length, best = length * self.growth, further
        return best, length

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        pass


def _without(ctx: StepContext, pieces: list[Tensor], direction: Tensor) -> None:
    """The base's momentum without its component along the direction: it would go on where the saddle's slope led."""
    assert ctx.objective is not None
    params = ctx.objective.params
    for name in ("momentum_buffer", "exp_avg"):
        averages = [ctx.base.state.get(p, {}).get(name) for p in params]
        if any(not isinstance(m, Tensor) or m.shape != p.shape for m, p in zip(averages, params, strict=True)):
            continue
        along = float(dot(flatten(averages), direction))
        for m, d in zip(averages, pieces, strict=True):
            m.sub_(placed(d, m).to(m.dtype), alpha=along)

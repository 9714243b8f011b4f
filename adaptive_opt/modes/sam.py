"""Sharpness-aware minimisation (Foret et al., 2021): the gradient is taken at w + e(w)."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from adaptive_opt.modes.base import StepContext
from adaptive_opt.objective import moved


class SAM:
    """The base optimizer's step with the gradient at the top of the neighbourhood, by one replay of the batch.

    rho: radius relative to the weights' norm; the absolute rho of the paper is rho * |w|. With label noise twice that is
    better still, on a 13-layer net half of it already hurts (docs/evidence.md, "modes"): sam belongs on trial, with
    `validate=`. every: only every k-th step climbs, the others are the base's own.
    """

    name = "sam"
    needs_replay = True
    steps_as_base = True

    def __init__(self, rho: float = 0.01, every: int = 1):
        if rho < 0 or every < 1:
            raise ValueError(f"SAM(rho={rho}, every={every}): rho of 0 or more, every of 1 or more")
        self.rho, self.every = rho, every
        self._count = 0

    def refuses(self, base: Optimizer) -> str | None:
        return None

    def listen(self, model: nn.Module | None, base: Optimizer) -> None:
        pass

    def enter(self, ctx: StepContext) -> None:
        self._count = 0

    def exit(self, ctx: StepContext) -> None:
        pass

    def step(self, ctx: StepContext) -> None:
        climb = self._count % self.every == 0 and self.rho > 0 and ctx.objective is not None
        self._count += 1
        if not climb:
            ctx.base.step()
            return
        assert ctx.objective is not None
        grads = ctx.grads
        g_norm = torch.linalg.vector_norm(torch.stack([g.norm() for g in grads]))
        w_norm = torch.linalg.vector_norm(torch.stack([p.detach().norm() for p in ctx.params]))
        rho = self.rho * w_norm / g_norm.clamp_min(1e-12)
        climbed = [rho.to(g.dtype) * g for g in grads]  # e(w) = rho g / |g|
        ctx.cost += 1.0
        try:
            with moved(ctx.params, climbed, 1.0):
                above = dict(zip(map(id, ctx.objective.params), ctx.objective.gradient(), strict=True))
        except Exception as error:  # the batch cannot be had again: the base's own step, and the controller says why
            ctx.failure = error
            ctx.base.step()
            return
        new = [above.get(id(p), g) for p, g in zip(ctx.params, grads, strict=True)]
        new_norm = torch.linalg.vector_norm(torch.stack([g.norm() for g in new]))
        if not bool(torch.isfinite(new_norm)):
            ctx.base.step()
            return
        scale = torch.ones_like(new_norm)
        if ctx.objective.clip_norm is not None:  # the user clips: hold the new gradient to what was let through
            scale = (ctx.objective.clip_norm / new_norm.clamp_min(1e-12)).clamp_max(1.0)
        try:
            for p, g in zip(ctx.params, new, strict=True):
                p.grad = (scale.to(g.dtype) * g).to(p.dtype)
            ctx.base.step()
        finally:
            for p, g in zip(ctx.params, grads, strict=True):
                p.grad = g

    def state_dict(self) -> dict[str, Any]:
        return {"count": self._count}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._count = state["count"]

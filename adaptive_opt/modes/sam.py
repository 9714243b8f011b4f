"""Sharpness-aware minimisation (Foret et al., 2021): the gradient is taken at w + e(w)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from adaptive_opt.curvature import whole
from adaptive_opt.modes.base import BaseStep, Mode, StepContext
from adaptive_opt.modes.kfac import KFAC
from adaptive_opt.objective import moved

DOSES = 4.0  # times rho at most: 0.02 of |w| is where a trial begins, 0.04 where it may end; 0.05 from the first step
# stops learning (docs/evidence.md, "validation")
ETA = 0.01  # ASAM's, added to |w| so that what is 0 can move (Kwon et al., 2021)


class SAM:
    """A step with the gradient at the top of the neighbourhood, by one replay of the batch.

    rho: radius relative to the weights' norm; the absolute rho of the paper is rho * |w|. With label noise five times that
    is better still, on a 13-layer net half of it already hurts (docs/evidence.md, "modes"): sam belongs on trial, with
    `validate=`, and `stronger` doubles the radius where that asks for it. adaptive: ASAM's neighbourhood (Kwon et al., 2021),
    in which every weight moves in proportion to itself; rho is then the paper's own, 0.5 to 2. every: only every k-th step
    climbs. inner: the mode that takes the step with that gradient; None is the base's own step.

    Weights, gradients, batch-norm statistics and random states are the very bits they were; dropout masks at the top are
    those of the user's own pass; a gradient longer than the user's clipping lets through is cut to that length.
    """

    name = "sam"
    needs_replay = True

    def __init__(self, rho: float = 0.01, every: int = 1, adaptive: bool = False, inner: Mode | None = None):
        if rho < 0 or every < 1:
            raise ValueError(f"SAM(rho={rho}, every={every}): rho of 0 or more, every of 1 or more")
        self.rho, self.every, self.adaptive = rho, every, adaptive
        self.inner: Mode = BaseStep() if inner is None else inner
        self.steps_as_base = self.inner.steps_as_base
        self.dose = 1.0  # times rho: what `stronger` has made of it
        self._count = 0

    def refuses(self, base: Optimizer) -> str | None:
        return self.inner.refuses(base)

    def listen(self, model: nn.Module | None, base: Optimizer) -> None:
        self.inner.listen(model, base)

    def enter(self, ctx: StepContext) -> None:
        self._count, self.dose = 0, 1.0
        self.inner.enter(ctx)

    def stronger(self) -> str | None:
        """Twice the radius, until the mode is left: in words; None where it is as wide as it may be."""
        if self.dose >= DOSES:
            return None
        self.dose *= 2
        return f"rho {self.rho * self.dose / 2:.3g} -> {self.rho * self.dose:.3g}"

    def exit(self, ctx: StepContext) -> None:
        self.inner.exit(ctx)

    def step(self, ctx: StepContext) -> None:
        climb = self._count % self.every == 0 and self.rho > 0 and ctx.objective is not None
        self._count += 1
        above = self._gradient_above(ctx) if climb else None
        if above is None:
            self.inner.step(ctx)
            return
        grads = ctx.grads
        try:
            for p, g in zip(ctx.params, above, strict=True):
                p.grad = g
            self.inner.step(ctx)
        finally:
            for p, g in zip(ctx.params, grads, strict=True):
                p.grad = g

    @torch.no_grad()
    def _gradient_above(self, ctx: StepContext) -> list[Tensor] | None:
        """The gradient at w + e(w), held to the user's clipping; None where it cannot be had or is not finite."""
        assert ctx.objective is not None
        grads = ctx.grads
        ctx.cost += 1.0
        try:
            with moved(ctx.params, *self._climb(ctx.params, grads)):
                found = dict(zip(map(id, ctx.objective.params), ctx.objective.gradient(), strict=True))
        except Exception as error:  # the batch cannot be had again: the base's own step, and the controller says why
            ctx.failure = error
            return None
        above = [found.get(id(p), g) for p, g in zip(ctx.params, grads, strict=True)]
        norm = _norm(above)
        if not bool(torch.isfinite(norm)):
            return None
        if ctx.objective.clip_norm is None:
            return [g.to(p.dtype) for p, g in zip(ctx.params, above, strict=True)]
        scale = (ctx.objective.clip_norm / norm.clamp_min(1e-12)).clamp_max(1.0)  # what the user's clipping lets through
        return [(scale.to(g.dtype) * g).to(p.dtype) for p, g in zip(ctx.params, above, strict=True)]

    def _climb(self, params: Sequence[Tensor], grads: Sequence[Tensor]) -> tuple[Sequence[Tensor], float]:
        """(direction, length) of e(w) = rho |w| g / |g|; ASAM: rho T^2 g / |T g| with T = |w| + eta."""
        rho = self.rho * self.dose
        if self.adaptive:
            T = [p.detach().abs() + ETA for p in params]
            Tg = [t * g for t, g in zip(T, grads, strict=True)]
            return [t * s for t, s in zip(T, Tg, strict=True)], rho / max(float(_norm(Tg)), 1e-12)
        return grads, rho * float(_norm(params)) / max(float(_norm(grads)), 1e-12)

    def state_dict(self) -> dict[str, Any]:
        return {"count": self._count, "dose": self.dose, "inner": self.inner.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._count, self.dose = state["count"], state.get("dose", 1.0)
        self.inner.load_state_dict(state["inner"])


class KFACSAM(SAM):
    """sam's gradient in kfac's basis: `SAM(inner=KFAC())` under a name of its own."""

    name = "kfac_sam"

    def __init__(self, rho: float = 0.01, every: int = 1, adaptive: bool = False, kfac: Mode | None = None):
        super().__init__(rho, every, adaptive, inner=KFAC() if kfac is None else kfac)


def _norm(tensors: Sequence[Tensor]) -> Tensor:
    return whole(torch.nn.utils.get_total_norm(tensors))

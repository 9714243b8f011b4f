"""SGD whose learning rate is taken from the base optimizer's own steps (SWATS: Keskar and Socher, 2017)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from adaptive_opt.curvature import whole
from adaptive_opt.family import family
from adaptive_opt.modes.base import StepContext
from adaptive_opt.sharded import placed


class SGDStep:
    """Heavy-ball SGD that takes over from the base.

    During `warm_up` steps the base steps on and the learning rate is estimated as SWATS does: gamma = s's / (-s'g) for
    the base's step s, averaged with bias correction. Then w -= gamma * lr(now) / lr(then) * m, so that the user's
    schedule keeps its meaning. A base that is SGD already stays as it is.
    """

    name = "sgd"
    needs_replay = False
    steps_as_base = False

    def __init__(self, momentum: float = 0.9, warm_up: int = 10, beta: float = 0.9):
        if not 0 <= momentum < 1 or warm_up < 1:
            raise ValueError(f"SGDStep(momentum={momentum}, warm_up={warm_up}): momentum in [0, 1), warm_up of 1 or more")
        self.momentum, self.warm_up, self.beta = momentum, warm_up, beta
        self._seen, self._gamma = 0, 0.0  # EMA of gamma / lr, so that it is relative to the user's learning rate
        self._buffers: dict[int, Tensor] = {}

    def refuses(self, base: Optimizer) -> str | None:
        return None

    def listen(self, model: nn.Module | None, base: Optimizer) -> None:
        pass

    def enter(self, ctx: StepContext) -> None:
        self._seen, self._gamma, self._buffers = 0, 0.0, {}

    def exit(self, ctx: StepContext) -> None:
        self._buffers = {}

    def step(self, ctx: StepContext) -> None:
        if family(ctx.base) == "SGD" or not ctx.params:
            ctx.base.step()
        elif self._seen < self.warm_up:
            self._estimate(ctx)
        else:
            self._descend(ctx)

    @torch.no_grad()
    def _estimate(self, ctx: StepContext) -> None:
        before, grads = [p.clone() for p in ctx.params], ctx.grads
        ctx.base.step()
        steps = [p - b for p, b in zip(ctx.params, before, strict=True)]
        ss = torch.stack([(s * s).sum().float() for s in steps]).sum()
        sg = torch.stack([(s * g).sum().float() for s, g in zip(steps, grads, strict=True)]).sum()
        size, along = whole(torch.stack([ss, -sg])).tolist()
        lr = max(float(group["lr"]) for group in ctx.base.param_groups)
        if along > 0 and lr > 0:
            self._seen += 1
            self._gamma = self.beta * self._gamma + (1 - self.beta) * size / along / lr

    @torch.no_grad()
    def _descend(self, ctx: StepContext) -> None:
        self._step_others(ctx)
        gamma = self._gamma / (1 - self.beta**self._seen) * (1 - self.momentum)  # SWATS, eq. 5 and its momentum form
        for index, p, g in zip(ctx.indices, ctx.params, ctx.grads, strict=True):
            group = ctx.group_of(p)
            lr = gamma * float(group["lr"])
            if group.get("weight_decay"):
                p.mul_(1 - float(group["lr"]) * float(group["weight_decay"]))
            buffer = self._buffers[index] = placed(self._buffers.get(index, torch.zeros_like(p)), p)
            buffer.mul_(self.momentum).add_(g)
            p.add_(buffer, alpha=-lr)

    @staticmethod
    def _step_others(ctx: StepContext) -> None:
        """The base's own step where this mode has none: sparse and complex parameters."""
        mine = {id(p) for p in ctx.params}
        if all(p.grad is None or id(p) in mine for group in ctx.base.param_groups for p in group["params"]):
            return
        grads = [p.grad for p in ctx.params]
        try:
            for p in ctx.params:
                p.grad = None
            ctx.base.step()
        finally:
            for p, g in zip(ctx.params, grads, strict=True):
                p.grad = g

    def state_dict(self) -> dict[str, Any]:
        return {"seen": self._seen, "gamma": self._gamma, "buffers": dict(self._buffers)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._seen, self._gamma, self._buffers = state["seen"], state["gamma"], dict(state["buffers"])

"""SGD whose learning rate is taken from the base optimizer's own steps (SWATS: Keskar and Socher, 2017)."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from adaptive_opt.curvature import whole
from adaptive_opt.family import family
from adaptive_opt.modes.base import StepContext
from adaptive_opt.sharded import placed


class SGDStep:
    """Heavy-ball SGD that takes over from the base, and hands back to it.

    During `warm_up` steps the base steps on and the learning rate is estimated from its steps s as SWATS does,
    gamma = s's / (-s'g), with both products averaged before they are divided: -s'g of one noisy batch may be next to 0. Then
    w -= gamma * lr(now) / lr(then) * m, so that the user's schedule keeps its meaning; m begins as the base's own momentum
    where it keeps one. Meanwhile the base steps on in the dark, on these gradients, and its steps are undone: its moments are
    those of the present weights when it takes over again. A base that is SGD already stays as it is.
    """

    name = "sgd"
    needs_replay = False
    steps_as_base = False

    def __init__(self, momentum: float = 0.9, warm_up: int = 10, beta: float = 0.9):
        if not 0 <= momentum < 1 or warm_up < 1:
            raise ValueError(f"SGDStep(momentum={momentum}, warm_up={warm_up}): momentum in [0, 1), warm_up of 1 or more")
        self.momentum, self.warm_up, self.beta = momentum, warm_up, beta
        self._seen, self._size, self._along = 0, 0.0, 0.0  # EMAs of s's / lr^2 and -s'g / lr
        self._buffers: dict[int, Tensor] = {}

    def refuses(self, base: Optimizer) -> str | None:
        return None

    def listen(self, model: nn.Module | None, base: Optimizer) -> None:
        pass

    def enter(self, ctx: StepContext) -> None:
        self._seen, self._size, self._along, self._buffers = 0, 0.0, 0.0, {}

    def exit(self, ctx: StepContext) -> None:
        self._buffers = {}

    @torch.no_grad()
    def step(self, ctx: StepContext) -> None:
        if family(ctx.base) == "SGD" or not ctx.params:
            ctx.base.step()
            return
        before = [p.clone() for p in ctx.params]
        ctx.base.step()
        if self._seen < self.warm_up or self._along <= 0:
            self._estimate(ctx, [p - b for p, b in zip(ctx.params, before, strict=True)])
            return
        for p, b in zip(ctx.params, before, strict=True):
            p.copy_(b)
        self._descend(ctx)

    def _estimate(self, ctx: StepContext, steps: list[Tensor]) -> None:
        size = torch.stack([(s * s).sum().float() for s in steps]).sum()
        along = -torch.stack([(s * g).sum().float() for s, g in zip(steps, ctx.grads, strict=True)]).sum()
        size, along = whole(torch.stack([size, along])).tolist()
        lr = max(float(group["lr"]) for group in ctx.base.param_groups)
        if lr > 0 and math.isfinite(size) and math.isfinite(along):
            self._seen += 1
            self._size = self.beta * self._size + (1 - self.beta) * size / lr**2
            self._along = self.beta * self._along + (1 - self.beta) * along / lr

    def _descend(self, ctx: StepContext) -> None:
        gamma = self._size / self._along * (1 - self.momentum)  # SWATS, eq. 5 and its momentum form
        for index, p, g in zip(ctx.indices, ctx.params, ctx.grads, strict=True):
            group = ctx.group_of(p)
            if group.get("weight_decay"):
                p.mul_(1 - float(group["lr"]) * float(group["weight_decay"]))
            if index not in self._buffers:
                self._buffers[index] = self._momentum_of(ctx, p)
            buffer = self._buffers[index] = placed(self._buffers[index], p)  # a checkpoint's may come back whole
            buffer.mul_(self.momentum).add_(g)
            p.add_(buffer, alpha=-gamma * float(group["lr"]))

    def _momentum_of(self, ctx: StepContext, p: Tensor) -> Tensor:
        """The base's mean gradient as heavy ball keeps it, a sum of 1 / (1 - momentum) gradients."""
        state = ctx.base.state.get(p, {})
        if "exp_avg" not in state:
            return torch.zeros_like(p)
        beta1, t = float(ctx.group_of(p)["betas"][0]), float(state["step"])
        return state["exp_avg"] * (1 / (1 - beta1**t) / (1 - self.momentum))

    def state_dict(self) -> dict[str, Any]:
        return {"seen": self._seen, "size": self._size, "along": self._along, "buffers": dict(self._buffers)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._seen, self._size, self._along = state["seen"], state["size"], state["along"]
        self._buffers = dict(state["buffers"])

"""The trust gate: builds the Objective of each step's batch, and lets a replay be used only if it reproduces the gradient."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from adaptive_opt.capture import Ambient, Capture, LossCall, device_of
from adaptive_opt.curvature import whole
from adaptive_opt.modes import Mode, StepContext, all_params
from adaptive_opt.objective import CapturedBatch, Closure, GivenLoss, Objective, ReplayError, Source, agreement
from adaptive_opt.parallel import ALONE, Team, world

STATE = ("trusted", "distrust", "scaled_loss", "clip_norm")
COSINE, COSINE_LOW = (
    0.999,
    0.99,
)  # a replay repeats the very same kernels: float32 gives 1 - 1e-7; below 32 bits SDPA's differ


MOVED = (
    "parameters of the model that this optimizer does not hold have changed since the forward pass; where another optimizer "
    "has stepped first, let this one step before it, or give the groups of both to one"
)


class Gate:
    """Where the batch comes from, and whether it can be believed. Once refused, always refused: the loop is what it is."""

    def __init__(self, base: Optimizer):
        self.base = base
        self.model: nn.Module | None = None
        self.capture: Capture | None = None
        self.given: Callable[[], Tensor] | None = None
        self.trusted: bool | None = None  # None: not compared yet
        self.distrust = ""  # why
        self.scaled_loss = 0.0  # a gradient scaler's factor on the sum of the captured weights; 0: there is none
        self.clip_norm: float | None = None  # the norm that the user's clipping let through; None: nothing was clipped

    @property
    def team(self) -> Team:
        """The processes that train this model together."""
        return ALONE if self.capture is None else self.capture.team

    # ---- the batch ------------------------------------------------------------------------------------------------

    def context(self, mode: Mode, closure: Callable[[], Any] | None = None, ambient: Ambient | None = None) -> StepContext:
        """What modes and interventions may use in this step; without an objective once the gate has refused."""
        every = all_params(self.base)
        found = [(i, p, p.grad) for i, p in enumerate(every) if p.grad is not None]
        chosen = [(i, p) for i, p, g in found if p.requires_grad and p.is_floating_point() and not (g is None or g.is_sparse)]
        params, given = [p for _, p in chosen], [g for _, _, g in found if g is not None]
        objective = self._objective(closure, ambient, params, every) if self.trusted is not False and params else None
        return StepContext(self.base, params, [i for i, _ in chosen], objective, mode, team=self.team, given=given)

    def nats(self) -> Tensor | None:
        """The loss as loss_fn returned it, where that is a mean cross-entropy of one label a row: at 0.01 nats the labels are
        predicted with a mean confidence of 99 %. None elsewhere: binary ones and those over pixels are as low where a rare
        class is never predicted, and class weights take a part of the rows out.
        """
        loss_fn = None if self.capture is None else self.capture.loss_fn
        if not isinstance(loss_fn, (nn.CrossEntropyLoss, nn.NLLLoss)) or loss_fn.reduction != "mean":
            return None
        known = loss_fn.weight is None and all(map(_one_label_a_row, self._losses()))
        return self.loss() if known else None

    def loss(self) -> Tensor | None:
        """The captured loss of this step, on the device."""
        return self.capture.loss() if self.capture is not None else None

    def forget(self) -> None:
        """The step is done: let the batch go."""
        if self.capture is not None and self.capture.calls:
            self.capture.forget_used()
            if self.given is not None or self.capture.problem:
                self.capture.calls.clear()

    def _objective(
        self, closure: Callable[[], Any] | None, ambient: Ambient | None, params: list[Tensor], bystanders: list[Tensor]
    ) -> Objective | None:
        calls = self.capture.step_calls() if self.capture is not None else []
        modules = self.capture.modules if self.capture is not None else []
        ddp = self.capture.ddp if self.capture is not None else None
        if self.capture is not None and self.capture.unreplayable:
            return None
        source: Source
        if self.given is not None:
            seen = self.capture.calls[0].ambient if self.capture is not None and self.capture.calls else None
            source = GivenLoss(self.given, modules, seen, ddp)
        elif self.capture is not None and calls and not any(c.refusal for c in calls):
            source = CapturedBatch(self.capture, [c for c in calls if c.weighted])
        elif closure is not None:
            source = Closure(closure, modules, ambient, ddp)
        else:
            return None
        objective = Objective(source, params, bystanders, self.team)
        objective.clip_norm = self.clip_norm
        objective.loss_scale = self._loss_scale()
        return objective

    # ---- trust ------------------------------------------------------------------------------------------------------

    def passes(self, ctx: StepContext) -> bool:
        """Compare a replay's gradient with the one that backward left (cosine: clipping and scaling do not matter).

        False when this batch proves nothing because it is not finite. Raises ReplayError, naming the likely cause, when
        the replay is of another loss. Costs one gradient.
        """
        objective = ctx.objective
        assert objective is not None
        objective.loss_scale = self._loss_scale()
        cosine, ratio = agreement(objective.gradient(), [p.grad for p in objective.params])
        if math.isnan(cosine):
            return False
        low = any(p.dtype not in (torch.float32, torch.float64) for p in objective.params) or self._autocast()
        if cosine < (COSINE_LOW if low else COSINE):
            raise ReplayError(
                f"the replayed gradient does not reproduce the one that backward left (cosine {cosine:.4f}): "
                f"{self._moved_elsewhere() or objective.source.cause}{self._averaged_unseen()}"
            )
        captured = self.team.mean(self._captured_scale())
        if not self.scaled_loss and captured >= 2 and ratio >= 8:
            # A gradient scaler multiplied the loss and has divided the gradients already? It does so by powers of two.
            if _power_of_two(ratio):  # also where the loss is a sum, or weighted by sample
                self.scaled_loss = ratio / captured
            elif _power_of_two(captured) and ratio >= 0.99 * captured:  # and the user clips
                self.scaled_loss = 1.0
            objective.loss_scale = self._loss_scale()
            ratio /= objective.loss_scale
        self.clip_norm = float(whole(torch.nn.utils.get_total_norm(ctx.grads))) if ratio > 1.01 else None
        objective.clip_norm = self.clip_norm
        self.trusted = True
        return True

    def _averaged_unseen(self) -> str:
        if self.team.size > 1 or world() == 1:
            return ""
        return ", or the gradients are averaged over processes by something else than DistributedDataParallel and FSDP2"

    def _moved_elsewhere(self) -> str:
        """A likelier cause than the source's own, if it is there."""
        return MOVED if self.capture is not None and self.capture.moved_elsewhere() else ""

    def refuse(self, error: Exception) -> str:
        """No replay is used from here on; returns why, in one line."""
        first = str(error).partition("\n")[0] or type(error).__name__
        why = first if isinstance(error, ReplayError) else f"the batch could not be evaluated again: {first}"
        self.trusted, self.distrust = False, why
        return why

    def why_not(self) -> str:
        """Why there is no objective."""
        if self.trusted is False:
            return self.distrust
        if self.capture is not None and self.capture.unreplayable:
            return self.capture.unreplayable
        refusals = [c.refusal for c in self.capture.calls if c.refusal] if self.capture is not None else []
        if self.capture is not None and (refusals or self.capture.problem):
            return refusals[0] if refusals else str(self.capture.problem)
        if not any(p.grad is not None for p in all_params(self.base)):
            return "no parameter has a gradient: run backward on a batch first"
        if not self._any_measurable():
            return f"no parameter has a dense, real gradient ({self.unmeasured()})"
        if self.capture is not None or self.given is not None:
            return (
                "no batch is remembered: probe_now() belongs between backward and step, and the loop must call the very model "
                "and loss_fn that were given (compile the model, not the whole training step: hooks hear nothing in there)"
            )
        return (
            "there is no way to evaluate the loss again: give AdaptiveOptimizer model= and loss_fn= (a Module), a model with "
            "output.loss, objective=, or step(closure); after unpickling or copying, give them again by attach()"
        )

    def without_replay(self, closure: bool) -> str | None:
        """Why this step's loss cannot be evaluated again, or None; None too when that was said already."""
        if self.trusted is False:
            return None
        if not self._any_measurable() and any(p.grad is not None for p in all_params(self.base)):
            return self.why_not()
        calls = self.capture.step_calls() if self.capture is not None else []
        captured = any(c.weighted for c in calls) and not any(c.refusal for c in calls)
        if self.capture is not None and self.capture.unreplayable:
            return self.capture.unreplayable
        return None if closure or captured or self.given is not None else self.why_not()

    # ---- parameters and scales ----------------------------------------------------------------------------------------

    def unmeasured(self) -> str:
        """The parameters with a gradient that no reading covers, in words; empty when there are none."""
        grads = [(p, p.grad) for p in all_params(self.base) if p.grad is not None]
        sparse, odd = sum(g.is_sparse for _, g in grads), sum(not p.is_floating_point() for p, _ in grads)
        parts = [f"{sparse} with sparse gradients"] * bool(sparse) + [f"{odd} with complex values"] * bool(odd)
        return f"{' and '.join(parts)} of {len(grads)} parameters" if parts else ""

    def _any_measurable(self) -> bool:
        """Whether a dense, real parameter has a gradient."""
        params = (p for group in self.base.param_groups for p in group["params"] if p.grad is not None)
        return any(p.requires_grad and p.is_floating_point() and not p.grad.is_sparse for p in params)

    def _captured_scale(self) -> float:
        """Sum of the weights that backward gave the captured losses: 1, or what a gradient scaler multiplied by."""
        weights = [r.weight for r in self._losses() if r.weight is not None]
        return float(torch.stack([w.float().sum() for w in weights]).sum()) if weights else 1.0

    def _losses(self) -> list[LossCall]:
        """The losses that this step's gradients are made of."""
        calls = self.capture.step_calls() if self.capture is not None else []
        return [r for c in calls for r in c.losses if r.weight is not None]

    def _loss_scale(self) -> float:
        return (self._captured_scale() * self.scaled_loss or 1.0) if self.scaled_loss else 1.0

    def _autocast(self) -> bool:
        calls = self.capture.calls if self.capture is not None else []
        device = device_of(self.model) if self.model is not None else torch.device("cpu")
        return any(c.ambient.autocast[1] for c in calls) or torch.is_autocast_enabled(device.type)

    def state_dict(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in STATE}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for name in STATE:
            setattr(self, name, state[name])


def _one_label_a_row(call: LossCall) -> bool:
    args, kwargs = call.args
    target = args[1] if len(args) > 1 else kwargs.get("target")
    return isinstance(target, Tensor) and target.dim() == 1 and not target.is_floating_point()


def _power_of_two(x: float) -> bool:
    return abs(math.log2(x) - round(math.log2(x))) < 1e-4

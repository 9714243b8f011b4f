"""Kronecker-factored preconditioning: the base optimizer takes its step in the factors' eigenbasis (SOAP: Vyas et al., 2024).

Elementwise bases (Adam's family, RMSprop, Adagrad) see rotated parameters and gradients and keep their own rule, state
and schedule; the rotated-back *difference* is added to the untouched parameters, so that no rotation ever rounds them.
SGD takes its own step first; that step is then preconditioned and given back its norm, layer by layer.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from adaptive_opt.family import ELEMENTWISE, family
from adaptive_opt.modes import kronecker as kron
from adaptive_opt.modes.base import StepContext, all_params, overridden
from adaptive_opt.sharded import is_sharded

FIRST_MOMENTS = ("exp_avg", "momentum_buffer", "grad_avg")  # rotate as vectors
SECOND_MOMENTS = ("exp_avg_sq", "square_avg", "sum", "max_exp_avg_sq")  # transform with the squared rotation


@dataclass
class _Factors:
    """Running factors of one matrix and the basis in use. A side larger than the limit has none."""

    L: Tensor | None
    R: Tensor | None
    QL: Tensor | None = None
    QR: Tensor | None = None
    left: Tensor | None = None  # eigenvalues
    right: Tensor | None = None
    age: int = 0

    @property
    def ready(self) -> bool:
        return self.QL is not None or self.QR is not None


class KFAC:
    """Gradient-factor preconditioning (L = E[G G'], R = E[G'G]) under the base optimizer's own rule.

    beta: forgetting of the factors (measured: docs/evidence.md, "modes"). beta2: Adam's second-moment forgetting while
    the mode is on (0.999 in a turning basis ruins it: docs/evidence.md). every: steps between changes of basis. max_dim: a side
    longer than that is not rotated. damping: relative to the mean of the second moment, SGD only. Parameters with fewer
    than two dimensions take the base's step as it is.
    """

    name = "kfac"
    needs_replay = False
    steps_as_base = False

    def __init__(self, beta: float = 0.99, beta2: float = 0.95, every: int = 10, max_dim: int = 1024, damping: float = 1e-8):
        if not 0 < beta < 1 or not 0 < beta2 < 1 or every < 1 or max_dim < 1 or damping < 0:
            raise ValueError(
                f"KFAC(beta={beta}, beta2={beta2}, every={every}, max_dim={max_dim}, damping={damping}): out of range"
            )
        self.beta, self.beta2, self.every, self.max_dim, self.damping = beta, beta2, every, max_dim, damping
        self._factors: dict[int, _Factors] = {}

    def refuses(self, base: Optimizer) -> str | None:
        if any(map(is_sharded, all_params(base))):
            return "kfac needs whole matrices and their eigenvectors, and these parameters are shards of them (FSDP2)"
        if family(base) in (*ELEMENTWISE, "SGD"):
            return None
        return f"kfac knows the rules of {', '.join(ELEMENTWISE)} and SGD, and {type(base).__name__} is none of them"

    def enter(self, ctx: StepContext) -> None:
        self._factors = {}
        self._forget_faster(ctx, entering=True)

    def exit(self, ctx: StepContext) -> None:
        for index, p in enumerate(all_params(ctx.base)):  # also what has no gradient in this very step
            f = self._factors.get(index)
            if f is not None and f.ready and self._elementwise(ctx):
                self._carry(ctx.base.state.get(p, {}), p, f, None, None)
        self._forget_faster(ctx, entering=False)
        self._factors = {}

    @torch.no_grad()
    def step(self, ctx: StepContext) -> None:
        for index, p in zip(ctx.indices, ctx.params, strict=True):
            if p.dim() >= 2 and min(p.shape[0], p[0].numel()) > 1:
                self._observe(index, p, ctx)
        if self._elementwise(ctx):
            self._step_in_basis(ctx)
        else:
            self._precondition_step(ctx)

    def coverage(self) -> dict[int, str]:
        """Which parameters (by their position) are preconditioned, and on which sides."""
        return {
            i: "both sides" if f.QL is not None and f.QR is not None else "left" if f.QL is not None else "right"
            for i, f in self._factors.items()
            if f.ready
        }

    def _elementwise(self, ctx: StepContext) -> bool:
        return family(ctx.base) in ELEMENTWISE

    def _observe(self, index: int, p: Tensor, ctx: StepContext) -> None:
        """Running factors, and a new basis when it is due."""
        assert p.grad is not None
        G = self._matrix(p.grad)
        f = self._factors.get(index)
        if f is None:
            m, n = (G.new_zeros(size, size) if size <= self.max_dim else None for size in G.shape)
            f = self._factors[index] = _Factors(m, n)
        if f.L is not None:
            f.L.lerp_(G @ G.T, 1 - self.beta)
        if f.R is not None:
            f.R.lerp_(G.T @ G, 1 - self.beta)
        f.age += 1
        if f.age % self.every == 0:  # the first basis waits for that many gradients: one alone has no spectrum
            self._turn(p, f, ctx)

    def _turn(self, p: Tensor, f: _Factors, ctx: StepContext) -> None:
        correction = 1 - self.beta**f.age
        try:
            left = None if f.L is None else kron.eigenbasis(f.L / correction)
            right = None if f.R is None else kron.eigenbasis(f.R / correction)
        except RuntimeError:
            return  # keep the last basis
        QL, QR = (None if side is None else side[1] for side in (left, right))
        if self._elementwise(ctx):
            self._carry(ctx.base.state.get(p, {}), p, f, QL, QR)
        first = not f.ready
        f.QL, f.QR = QL, QR
        f.left, f.right = (None if side is None else side[0] for side in (left, right))
        if first and self._elementwise(ctx):
            self._seed_second_moment(ctx, p, f)

    def _carry(self, state: dict[str, Any], p: Tensor, f: _Factors, QL: Tensor | None, QR: Tensor | None) -> None:
        """The base's moments from the present basis into (QL, QR); None is the parameters' own basis."""
        TL = kron.change(f.QL, QL) if QL is not None else (None if f.QL is None else f.QL.T)
        TR = kron.change(f.QR, QR) if QR is not None else (None if f.QR is None else f.QR.T)
        for names, left, right in (
            (FIRST_MOMENTS, TL, TR),
            (SECOND_MOMENTS, None if TL is None else TL * TL, None if TR is None else TR * TR),
        ):
            for name in names:
                moment = state.get(name)
                if isinstance(moment, Tensor) and moment.shape == p.shape:
                    moment.copy_(kron.rotate(self._matrix(moment), left, right).view(p.shape))

    def _seed_second_moment(self, ctx: StepContext, p: Tensor, f: _Factors) -> None:
        """At entry the eigenvalues know the second moment in the new basis better than the carried one does."""
        state = ctx.base.state.get(p, {})
        moment = state.get("exp_avg_sq", state.get("square_avg"))
        if moment is None or f.left is None or f.right is None:
            return
        v = kron.second_moment(f.left, f.right)
        t = float(state.get("step", 0))
        moment.copy_((v * (1 - self._forgetting(ctx, p) ** t)).view(p.shape))

    def _forgetting(self, ctx: StepContext, p: Tensor) -> float:
        betas = ctx.group_of(p).get("betas")
        return min(self.beta2, float(betas[1])) if betas is not None else 0.0

    def _forget_faster(self, ctx: StepContext, entering: bool) -> None:
        """Rescale second moments so that their bias correction is right under the other beta2."""
        for p in all_params(ctx.base):
            betas = ctx.group_of(p).get("betas")
            state = ctx.base.state.get(p, {})
            t = float(state.get("step", 0))
            if betas is None or "exp_avg_sq" not in state or t < 1:
                continue
            ratio = (1 - min(self.beta2, float(betas[1])) ** t) / (1 - float(betas[1]) ** t)
            for name in ("exp_avg_sq", "max_exp_avg_sq"):
                if name in state:
                    state[name].mul_(ratio if entering else 1 / ratio)

    def _step_in_basis(self, ctx: StepContext) -> None:
        """Rotate, let the base step, add the rotated-back difference to what was there."""
        turned = [(p, f) for i, p in zip(ctx.indices, ctx.params, strict=True) if (f := self._factors.get(i)) and f.ready]
        kept = [(p.detach().clone(), p.grad) for p, _ in turned]
        try:
            for p, f in turned:
                assert p.grad is not None
                grad = kron.rotate(self._matrix(p.grad), f.QL, f.QR).to(p.dtype).view(p.shape)
                p.copy_(kron.rotate(self._matrix(p), f.QL, f.QR).view(p.shape))
                p.grad = grad
            before = [p.clone() for p, _ in turned]
            with overridden(ctx.base.param_groups, betas=lambda b: (b[0], min(self.beta2, float(b[1])))):
                ctx.base.step()
            steps = [p - b for (p, _), b in zip(turned, before, strict=True)]
        except BaseException:
            for (p, _), (old, grad) in zip(turned, kept, strict=True):
                p.copy_(old)
                p.grad = grad
            raise
        for (p, f), (old, grad), step in zip(turned, kept, steps, strict=True):
            p.copy_(old)
            p.add_(kron.rotate_back(self._matrix(step), f.QL, f.QR).to(p.dtype).view(p.shape))
            p.grad = grad

    def _precondition_step(self, ctx: StepContext) -> None:
        """SGD's own step s, whitened on one side, with s's norm: s R^-1/2 |s| / |s R^-1/2|.

        One side, the inputs' (the outputs' where that is too long): E[G'G]^-1/2 undoes an ill-conditioned input covariance
        whole (as ASGO: An et al., 2025). Both sides at once undo it twice and never settle (docs/evidence.md, canyon).
        """
        turned = [(p, f) for i, p in zip(ctx.indices, ctx.params, strict=True) if (f := self._factors.get(i)) and f.ready]
        before = [p.detach().clone() for p, _ in turned]
        ctx.base.step()
        for (p, f), old in zip(turned, before, strict=True):
            s = self._matrix(p - old)
            QL, QR = (None, f.QR) if f.QR is not None else (f.QL, None)
            eigenvalues = f.right if f.QR is not None else f.left
            assert eigenvalues is not None
            v = eigenvalues / eigenvalues.mean().clamp_min(torch.finfo(eigenvalues.dtype).tiny) + self.damping
            D = kron.rotate(s, QL, QR)
            D = D / (v.sqrt() if QR is not None else v.sqrt().unsqueeze(1))
            D = kron.rotate_back(D, QL, QR)
            D = D * (s.norm() / D.norm().clamp_min(torch.finfo(D.dtype).tiny))
            p.copy_(old + D.to(p.dtype).view(p.shape))

    @staticmethod
    def _matrix(x: Tensor) -> Tensor:
        return kron.as_matrix(x.detach()).to(torch.promote_types(x.dtype, torch.float32))

    def state_dict(self) -> dict[str, Any]:
        return {"factors": {i: dict(vars(f)) for i, f in self._factors.items()}}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._factors = {i: _Factors(**f) for i, f in state["factors"].items()}

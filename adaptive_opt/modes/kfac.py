"""Kronecker-factored preconditioning: the base optimizer takes its step in the factors' eigenbasis (SOAP: Vyas et al., 2024).

Elementwise bases (Adam's family, RMSprop, Adagrad, Rprop) see rotated gradients and keep their own rule, state and
schedule; the rotated-back *difference* is added to the untouched parameters, so that no rotation ever rounds them. SGD
takes its own step first; that step is then preconditioned and given back its norm, layer by layer.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from adaptive_opt.family import ELEMENTWISE, LINEAR, family, own_step
from adaptive_opt.modes import kronecker as kron
from adaptive_opt.modes.base import StepContext, all_params
from adaptive_opt.modes.factors import Factors, interval, left_times, share_out, spectrum, times
from adaptive_opt.modes.moments import carry, jensen_factor, rescale_bias
from adaptive_opt.modes.taps import LayerTaps, samples
from adaptive_opt.parallel import ALONE
from adaptive_opt.sharded import is_sharded

SOURCES, SHARING, METHODS = ("gradient", "kfac"), ("expand", "reduce"), ("eigh", "qr")


class KFAC:
    """Kronecker-factored preconditioning under the base optimizer's own rule.

    source: "gradient" takes L = E[G G'] and R = E[G'G] of each weight's gradient, and works with any loss; "kfac" takes
    the layers' inputs and output gradients (Linear, Conv1d, Conv2d, Embedding; needs `model`), and falls back to the
    gradient where that is not possible; `coverage()` says where and why. sharing: what "kfac" does with weights that are
    used at many positions. beta: forgetting of the factors (measured: docs/evidence.md, "bench-modes"). beta2: Adam's
    second-moment forgetting for the preconditioned weights while the mode is on; 0.999 in a turning basis ruins it
    (docs/evidence.md); None leaves the base's own, as RMSprop's alpha is left. every: steps between changes of basis,
    update_every: between updates of the factors, both of small blocks; those of b > 64 rows change b / 64 times as rarely
    (layers' factors: all as often). max_dim, max_blocks: a longer side is cut into blocks, a side that would need more of
    them is not rotated. method: "eigh", or "qr" for one step of power iteration at each change after the first. damping,
    ekfac: bases of SGD's kind only, see `_direction`.

    Parameters with fewer than two dimensions take the base's step as it is. Held between steps: at most 2 (m^2 + n^2)
    numbers for a matrix of m rows and n columns, and their eigenvalues, m + n (with ekfac and such a base also m n);
    during a step two copies of the preconditioned weights.
    """

    name = "kfac"
    needs_replay = False
    steps_as_base = False

    def __init__(
        self,
        source: str = "gradient",
        *,
        beta: float = 0.95,
        beta2: float | None = 0.95,
        every: int = 10,
        update_every: int | None = None,
        max_dim: int = 256,
        max_blocks: int = 4,
        damping: float | None = None,
        method: str = "eigh",
        sharing: str = "expand",
        ekfac: bool = True,
    ):
        update_every = (1 if source == "gradient" else 5) if update_every is None else update_every
        damping = (1e-8 if source == "gradient" else 0.03) if damping is None else damping
        words = (source in SOURCES, method in METHODS, sharing in SHARING)
        counts = min(every, update_every, max_dim, max_blocks) >= 1
        if not all(words) or not counts or not 0 < beta < 1 or not (beta2 is None or 0 < beta2 < 1) or damping < 0:
            raise ValueError(
                f"KFAC(source={source!r}, beta={beta}, beta2={beta2}, every={every}, update_every={update_every}, "
                f"max_dim={max_dim}, max_blocks={max_blocks}, damping={damping}, method={method!r}, sharing={sharing!r}): "
                f"out of range; source of {SOURCES}, method of {METHODS}, sharing of {SHARING}"
            )
        self.source, self.beta, self.beta2, self.every, self.update_every = source, beta, beta2, every, update_every
        self.max_dim, self.max_blocks, self.damping, self.method, self.sharing = max_dim, max_blocks, damping, method, sharing
        self.ekfac = ekfac
        self._factors: dict[int, Factors] = {}
        self._count = 0
        self._taps: LayerTaps | None = None
        self._new_taps = False  # they have not heard a whole step yet
        self._names: dict[int, str] = {}
        self._linear = False  # the base is of SGD's kind

    def refuses(self, base: Optimizer) -> str | None:
        if any(map(is_sharded, all_params(base))):
            return "kfac needs whole matrices and their eigenvectors, and these parameters are shards of them (FSDP2)"
        if family(base) in (*ELEMENTWISE, *LINEAR):
            return None
        known = ", ".join((*ELEMENTWISE, *LINEAR))
        return f"kfac knows the rules of {known}, and {type(base).__name__} is none of them"

    def listen(self, model: nn.Module | None, base: Optimizer) -> None:
        """Hear the layers of this model from now on, if the factors are to come from there; None: no more."""
        if self._taps is not None:
            self._taps.close()
        self._taps, self._linear = None, family(base) in LINEAR
        if model is not None:
            positions = {id(p): i for i, p in enumerate(all_params(base))}
            self._names = {positions[id(p)]: name for name, p in model.named_parameters() if id(p) in positions}
            if self.source == "kfac" and not _several():  # each would hear its own batches, and step in a basis of its own
                self._taps, self._new_taps = LayerTaps(model, positions, self._hear), True

    def enter(self, ctx: StepContext) -> None:
        self._factors, self._count = {}, 0

    def exit(self, ctx: StepContext) -> None:
        with _full_precision(ctx.base):
            self._leave(ctx)

    def _leave(self, ctx: StepContext) -> None:
        for index, p in enumerate(all_params(ctx.base)):  # also what has no gradient in this very step
            f = self._factors.get(index)
            if f is None or not f.turned or self._linear:
                continue
            state = ctx.base.state.get(p, {})
            for block in f.blocks:
                if (left := block.leave()) is not None:
                    jensen = self._jensen(ctx, p, inside=True)
                    carry(state, p.shape, slice(block.start, block.stop), block in f.left, *left, jensen)
            self._rescale(ctx, p, entering=False)
        self._factors, self._count = {}, 0

    @torch.no_grad()
    def step(self, ctx: StepContext) -> None:
        self._count += 1
        self._linear = family(ctx.base) in LINEAR
        with _full_precision(ctx.base):
            self._observe(ctx)
            self._turn(ctx)
            if self._linear:
                self._precondition_step(ctx)
            else:
                self._step_in_basis(ctx)
        if self._taps is not None:
            self._taps.armed, self._new_taps = self._count % self.update_every == 0, False

    def coverage(self) -> dict[int, str]:
        """How each parameter that the mode has met is preconditioned, by its position among the base's parameters."""
        return {index: _described(f) for index, f in sorted(self._factors.items())}

    def report(self) -> str:
        """`coverage` as text, one parameter a line, by name where the model was given."""
        lines = [f"{self._names.get(i, f'parameter {i}')}: {how}" for i, how in self.coverage().items()]
        return "\n".join(lines) + "\nall others: the base's own step"

    # ---- factors ----------------------------------------------------------------------------------------------------

    def _hear(self, index: int, module: nn.Module, x: Tensor, grad: Tensor) -> None:
        """A layer's input and output gradient, in backward: A = E[a a'], G = E[g g'] where the loss is a mean over samples."""
        f = self._factors.get(index)
        if f is None:
            weight = module.weight
            assert isinstance(weight, Tensor)
            f = self._factors[index] = self._made(weight)
            f.tapped = True
            if isinstance(module, nn.Embedding):
                f.left = []
        if f.note or not f.blocks:
            return
        a, g = (None if t is None else t.to(f.blocks[0].factor.dtype) for t in samples(module, x, grad, self.sharing))
        assert g is not None
        f.heard = True
        for b in f.right if a is None else f.left:
            b.add(g[:, b.start : b.stop], len(g), self.beta)
        if a is None:
            return
        for b in f.right:
            b.add(a[:, b.start : b.stop], 1 / len(a), self.beta)
        if self.ekfac and self._linear and len(a) == len(g) and f.complete:
            squares = times(g, f.left).square().T @ times(a, f.right).square()
            f.S = squares * len(g) if f.S is None else f.S.mul_(self.beta).add_(squares, alpha=(1 - self.beta) * len(g))

    def _observe(self, ctx: StepContext) -> None:
        """The gradients into the factors that come from them; first dates for the bases of what is new."""
        due = (self._count - 1) % self.update_every == 0
        for index, p in zip(ctx.indices, ctx.params, strict=True):
            if p.dim() < 2:
                continue
            if index not in self._factors:
                self._factors[index] = self._made(p)
            f = self._factors[index]
            self._choose_source(index, f, due)
            if due and not f.tapped and p.grad is not None and f.blocks:
                f.observe(_matrix(p.grad), self.beta, self._count)
            f.heard = False
        new = [b for f in self._factors.values() for b in f.blocks if not b.due]
        if new:
            share_out(new, self._count, self.every)

    def _choose_source(self, index: int, f: Factors, due: bool) -> None:
        """From the layer where it was heard; where it never is, from the gradient, and why is kept."""
        if self.source == "gradient" or f.note or f.heard or any(b.weight for b in f.blocks if f.tapped):
            return
        f.tapped = True  # is to be
        taps = self._taps
        if taps is None:
            f.note = "several processes train" if _several() else "no model was given"
        elif index not in taps.tapped:
            f.note = taps.reasons.get(index, "it joined later")
        elif due and not self._new_taps:
            f.note = "its layer's hooks did not fire"
        f.tapped = not f.note

    def _turn(self, ctx: StepContext) -> None:
        """New bases where they are due, and the base's moments into them. Several processes solve a share of them each."""
        met = [(p, f) for i, p in zip(ctx.indices, ctx.params, strict=True) if (f := self._factors.get(i)) is not None]
        due = [(p, f, block) for p, f in met for block in f.blocks if block.due <= self._count and block.weight]
        jobs = [partial(block.solve, refine=self.method == "qr") for _, _, block in due]
        team = ctx.team if len(due) > 1 else ALONE  # what is due alone is solved by each as fast as it is sent
        solved = team.dealt(jobs, [(block.factor[0], block.factor) for _, _, block in due])
        for (p, f, block), basis in zip(due, solved, strict=True):
            first = not f.turned
            turned = block.turn(basis)
            block.due = self._count + interval(block, self.every)
            if turned is None:
                continue
            rows, left = slice(block.start, block.stop), block in f.left
            if self._linear:
                if f.S is not None:
                    carry({"square_avg": f.S}, f.S.shape, rows, left, *turned)
                continue
            carry(ctx.base.state.get(p, {}), p.shape, rows, left, *turned, self._jensen(ctx, p, inside=not first))
            if first:
                self._rescale(ctx, p, entering=True)

    def _made(self, p: Tensor) -> Factors:
        return Factors.of(_matrix(p), self.max_dim, self.max_blocks)

    # ---- steps ------------------------------------------------------------------------------------------------------

    def _turned(self, ctx: StepContext) -> list[tuple[Tensor, Factors]]:
        pairs = ((p, self._factors.get(i)) for i, p in zip(ctx.indices, ctx.params, strict=True))
        return [(p, f) for p, f in pairs if f is not None and f.turned]

    def _step_in_basis(self, ctx: StepContext) -> None:
        """Rotate the gradients, let the base step from zero, add the rotated-back step to what was there.

        torch's rules read the parameters for weight decay only, which is taken out of the base's hands. A subclass with a
        step of its own may read more: it gets the rotated parameters, and keeps its decay. Meanwhile the parameters' own
        storage is out of reach (`.data` is another tensor), so that it need not be copied.
        """
        turned = self._turned(ctx)
        if not turned:
            ctx.base.step()
            return
        reads = not own_step(ctx.base)
        kept = [(p.data, p.grad) for p, _ in turned]
        values = [f.rotate(_matrix(p)).to(p.dtype).reshape(p.shape) if reads else None for p, f in turned]
        try:
            self._rotate_gradients(ctx, turned, coupled=not reads)
            for (p, _), value in zip(turned, values, strict=True):
                p.data = torch.zeros_like(p) if value is None else value.clone()
            with self._regrouped(ctx.base, {id(p) for p, _ in turned}, own_decay=reads):
                ctx.base.step()
            steps = [p.data if value is None else p.data.sub_(value) for (p, _), value in zip(turned, values, strict=True)]
        finally:
            for (p, _), (data, grad) in zip(turned, kept, strict=True):
                p.data, p.grad = data, grad
        if not reads:
            self._decay(ctx, [p for p, _ in turned])
        for (p, f), step in zip(turned, steps, strict=True):
            f.add_back(p.detach(), _matrix(step))

    def _rotate_gradients(self, ctx: StepContext, turned: list[tuple[Tensor, Factors]], coupled: bool) -> None:
        """coupled: with the weight decay that the base would have added to them."""
        for p, f in turned:
            assert p.grad is not None
            G = _matrix(p.grad)
            group = ctx.group_of(p)
            if coupled and group.get("weight_decay") and not _decoupled(ctx.base, group):
                decay = float(group["weight_decay"])
                G = G.add(_matrix(p), alpha=-decay if group.get("maximize") else decay)
            p.grad = f.rotate(G).to(p.dtype).reshape(p.shape)

    def _decay(self, ctx: StepContext, params: list[Tensor]) -> None:
        """The weight decay that shrinks parameters directly."""
        turned = {id(p) for p in params}
        for group in ctx.base.param_groups:
            if _decoupled(ctx.base, group):
                for p in (p for p in group["params"] if id(p) in turned):
                    p.mul_(1 - float(group["lr"]) * float(group["weight_decay"]))

    @contextmanager
    def _regrouped(self, base: Optimizer, turned: set[int], own_decay: bool) -> Iterator[None]:
        """Inside, the turned weights are groups of their own, which forget faster; the user's very groups outside."""
        groups = list(base.param_groups)
        inside: list[dict[str, Any]] = []
        for g in groups:
            mine = [p for p in g["params"] if id(p) in turned]
            rest = [p for p in g["params"] if id(p) not in turned]
            inside += [{**g, **self._forgetting(g, own_decay), "params": mine}] * bool(mine) + [{**g, "params": rest}] * bool(
                rest
            )
        base.param_groups[:] = inside
        try:
            yield
        finally:
            base.param_groups[:] = groups

    def _forgetting(self, group: dict[str, Any], own_decay: bool) -> dict[str, Any]:
        values: dict[str, Any] = {}
        if self.beta2 is not None and "betas" in group:
            values["betas"] = (group["betas"][0], min(self.beta2, float(group["betas"][1])))
        if "weight_decay" in group and not own_decay:
            values["weight_decay"] = 0.0
        return values

    def _rescale(self, ctx: StepContext, p: Tensor, entering: bool) -> None:
        """Second moments whose bias correction is right under the other beta2."""
        group = ctx.group_of(p)
        if self.beta2 is None or "betas" not in group:
            return
        own = float(group["betas"][1])
        other = min(self.beta2, own)
        rescale_bias(ctx.base.state.get(p, {}), *((own, other) if entering else (other, own)))

    def _jensen(self, ctx: StepContext, p: Tensor, inside: bool) -> float:
        betas = ctx.group_of(p).get("betas")
        if betas is None:
            return 1.0
        beta1, beta2 = float(betas[0]), float(betas[1])
        return jensen_factor(ctx.base.state.get(p, {}), (beta1, min(self.beta2 or 1.0, beta2) if inside else beta2))

    def _precondition_step(self, ctx: StepContext) -> None:
        """SGD's own step s becomes the direction D at the length of s."""
        turned = self._turned(ctx)
        before = [p.detach().clone() for p, _ in turned]
        averaging = [float(ctx.base.state.get(p, {}).get("mu", 1.0)) for p, _ in turned]  # ASGD's
        ctx.base.step()
        for (p, f), old, mu in zip(turned, before, averaging, strict=True):
            s = _matrix(p - old)
            own = p.clone()
            p.copy_(old + kron.with_norm_of(self._direction(s, f), s).to(p.dtype).view(p.shape))
            if "ax" in ctx.base.state.get(p, {}):  # the average is of where the steps really led
                ctx.base.state[p]["ax"].add_(p - own, alpha=mu)

    def _direction(self, s: Tensor, f: Factors) -> Tensor:
        """The step s, preconditioned; `damping` is relative to the mean eigenvalue, and without bound it gives s back.

        Layer factors: K-FAC's damped inverse, by EKFAC's measured eigenvalues where there are some and else the factors' with
        the pi-split. Gradient factors: one side is whitened, the inputs' (the outputs' where that is too long):
        E[G'G]^-1/2 undoes an ill-conditioned input covariance whole (as ASGO: An et al., 2025). Both sides at once undo it
        twice and never settle (docs/evidence.md, canyon).
        """
        left, right = spectrum(f.left), spectrum(f.right)
        if f.tapped and left is not None and right is not None:
            scale = kron.damped_inverse(left, right, self.damping)
            if f.S is not None:
                scale = kron.damped_rescaling(f.S, self.damping)
            return f.rotate_back(f.rotate(s) * scale)
        if right is not None:
            return times(times(s, f.right) * kron.whitening(right, self.damping), f.right, back=True)
        if left is not None:
            return left_times(left_times(s, f.left) * kron.whitening(left, self.damping).unsqueeze(1), f.left, back=True)
        return s

    # ---- checkpoint -------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        return {"factors": {i: f.state_dict() for i, f in self._factors.items()}, "count": self._count}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._factors = {i: Factors.from_state_dict(f) for i, f in state["factors"].items()}
        self._count = state["count"]
        if self._taps is not None:
            self._taps.armed, self._new_taps = self._count % self.update_every == 0, False

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_taps": None}  # the hooks stay with the model they are on


def _matrix(x: Tensor) -> Tensor:
    """(m, n), a view where it can be, in float32 at least."""
    M = x.detach() if x.dim() == 2 else kron.as_matrix(x.detach())
    return M if M.dtype in (torch.float32, torch.float64) else M.float()


def _full_precision(base: Optimizer) -> AbstractContextManager[Any]:
    """Products in the tensors' own precision, also where the user's autocast is on around the step."""
    kind = all_params(base)[0].device.type
    return torch.autocast(kind, enabled=False) if torch.is_autocast_enabled(kind) else nullcontext()


def _several() -> bool:
    return torch.distributed.is_available() and torch.distributed.is_initialized() and torch.distributed.get_world_size() > 1


def _decoupled(base: Optimizer, group: dict[str, Any]) -> bool:
    """Weight decay shrinks the parameters directly, instead of joining the gradient."""
    return bool(group.get("weight_decay")) and bool(group.get("decoupled_weight_decay", family(base) == "AdamW"))


def _described(f: Factors) -> str:
    sides = {"left": f.left, "right": f.right}
    parts = [
        f"{name} in {len(bs)} blocks" if len(bs) > 1 else name for name, bs in sides.items() if any(b.Q is not None for b in bs)
    ]
    how = "both sides" if parts == ["left", "right"] else " and ".join(parts) or "the base's own step so far"
    if not f.blocks:
        how = "the base's own step (a side of one, or too long)"
    origin = "its layer" if f.tapped else "its gradient"
    return f"{how}, from {origin}" + (f" ({f.note})" if f.note else "")

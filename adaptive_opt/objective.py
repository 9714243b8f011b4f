"""Objective: the loss of the present batch as a function of the parameters, replayed as often as needed without a trace."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import cached_property
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.parallel import DistributedDataParallel
from torch.overrides import TorchFunctionMode

from adaptive_opt import capture as cap
from adaptive_opt.capture import Ambient, Capture, ModelCall
from adaptive_opt.curvature import whole
from adaptive_opt.parallel import ALONE, Team, without_ddp
from adaptive_opt.sharded import lent_whole, placed


class Source(Protocol):
    """Where the loss comes from."""

    cause: str  # the likely cause when a replay does not reproduce the gradient
    modules: list[nn.Module]

    def evaluate(self) -> Tensor: ...


class CapturedBatch:
    """The batch that hooks on model and loss_fn remembered."""

    cause = (
        "the loss that went backward is not loss_fn(model(batch)) alone (an added penalty, a batch changed in place, "
        "gradients clipped by value), or the model draws random numbers of its own"
    )

    def __init__(self, capture: Capture, calls: list[ModelCall]):
        self.capture, self.calls, self.modules = capture, calls, capture.modules

    def evaluate(self) -> Tensor:
        return cap.evaluate(self.capture.model, self.capture.loss_fn, self.calls, self._enter)

    @contextmanager
    def _enter(self, ambient: Ambient) -> Iterator[None]:
        ambient.meet(self.modules)
        kind, enabled, dtype = ambient.autocast
        with torch.autocast(kind, dtype=dtype, enabled=enabled):  # also off where `step` is called under it
            yield


class GivenLoss:
    """The user's `objective=`: a callable that returns the loss and does no backward."""

    cause = "objective() is not the loss that went backward: it draws other random numbers or reads another batch"

    def __init__(
        self,
        loss: Callable[[], Tensor],
        modules: list[nn.Module],
        ambient: Ambient | None,
        ddp: DistributedDataParallel | None = None,
    ):
        self.loss, self.modules, self._ambient, self._ddp = loss, modules, ambient, ddp

    def evaluate(self) -> Tensor:
        if self._ambient is not None:
            self._ambient.meet(self.modules)
        with without_ddp(self._ddp):
            return self.loss()


class Closure(GivenLoss):
    """The closure given to `step`: it clears gradients and runs backward, both of which a replay does without."""

    cause = "the closure gives another loss each time it is called (it reads the next batch, or draws random numbers)"

    def evaluate(self) -> Tensor:
        with _WithoutBackward():
            return super().evaluate()


class _WithoutBackward(TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return None if func is torch.Tensor.backward else func(*args, **(kwargs or {}))


class Objective:
    """The loss over `params`, which stay the caller's: a replay moves nothing that it does not put back bit for bit.

    Untouched by any replay, also when it raises: parameters, `.grad`, buffers (lent as clones), RNG states, train/eval
    modes, the autocast state. `loss_scale` is what a gradient scaler multiplied the captured loss by; `clip_norm` is the
    norm that the user's clipping let through when it was last compared (None: nothing was clipped). Of a `team` each process
    has its own batch: `loss`, `loss_with` and `gradient` are means over them all and must be called on every one; `replay` is
    of this process's batch alone.
    """

    def __init__(self, source: Source, params: Sequence[Tensor], bystanders: Sequence[Tensor] = (), team: Team = ALONE):
        self.source, self.team = source, team
        self.bystanders = bystanders  # other parameters whose gradients a closure may clear
        self.params = list(params)
        self.leaves = self.params  # inside of `replay` what the loss hangs on: whole, where the parameters are shards
        self.loss_scale = 1.0
        self.clip_norm: float | None = None

    @cached_property
    def batch_size(self) -> int | None:
        """Samples, those of all processes if each has as many as this one."""
        calls = getattr(self.source, "calls", None)
        sizes = [cap.batch_size(call) for call in calls or ()]
        return sum(s or 0 for s in sizes) * self.team.size or None

    def part(self, fraction: float, least: int = 16) -> tuple[Objective, float] | None:
        """The same loss on the first samples of the batch (at least `least`), with the true fraction; None: not possible."""
        true_fraction = self.share(fraction, least)
        if true_fraction is None or not isinstance(self.source, CapturedBatch):
            return None
        calls = cap.subset(self.source.calls, self.source.capture.loss_fn, self._at_least(fraction, least))
        smaller = Objective(CapturedBatch(self.source.capture, calls), self.params, self.bystanders, self.team)
        smaller.loss_scale = self.loss_scale
        return smaller, true_fraction

    def share(self, fraction: float, least: int = 16) -> float | None:
        """The true fraction that `part` would have; None where it would cut nothing."""
        asked = self._at_least(fraction, least)
        if asked >= 1 or not isinstance(self.source, CapturedBatch):
            return None
        return cap.share(self.source.calls, asked)

    def _at_least(self, fraction: float, least: int) -> float:
        return 1.0 if fraction >= 1 or self.batch_size is None else max(fraction, least / self.batch_size)

    def seen_loss(self) -> float | None:
        """The loss as the user's own forward pass gave it, without a replay; None where no hook saw it."""
        calls = getattr(self.source, "calls", None) or ()
        parts = [(r.value * r.weight).sum().float() for c in calls for r in c.losses if r.weight is not None]
        return self.team.mean(float(torch.stack(parts).sum()) / self.loss_scale) if parts else None

    @contextmanager
    def replay(self, twice: bool = True) -> Iterator[Callable[[], Tensor]]:
        """Inside, call the yielded function for the loss with a fresh graph, as often as needed; outside, no trace.

        twice: the graph has a second derivative.
        """
        with ExitStack() as stack:
            stack.enter_context(_put_back([*self.params, *self.bystanders], self.source.modules))
            stack.enter_context(_unheard())
            self.leaves = stack.enter_context(lent_whole(self.params, self.source.modules))
            stack.callback(setattr, self, "leaves", self.params)
            stack.enter_context(torch.enable_grad())
            # the fused kernels have no second derivative on the CPU; a replay uses the one that has
            if twice:
                stack.enter_context(sdpa_kernel(SDPBackend.MATH))
            if "torch._dynamo" in sys.modules:  # neither have compiled graphs: run what they were compiled from
                stack.enter_context(torch.compiler.set_stance("force_eager"))
            yield self._evaluate

    def parts(self, evaluate: Callable[[], Tensor]) -> list[Callable[[], Tensor]]:
        """What adds up to the loss, inside of `replay`: one evaluation for each batch, or `evaluate` alone."""
        pieces: Sequence[Callable[[], Tensor]] = getattr(self.source, "pieces", ())
        return [lambda piece=piece: self._checked(piece) for piece in pieces] or [evaluate]

    def loss(self) -> float:
        """The loss at the parameters' present values; no backward of ours (a PINN's loss may need its own)."""
        like = torch.zeros((), dtype=torch.float64, device=self.params[0].device) if self.team.size > 1 else self.params[0]
        return float(self.team.mean_of(lambda: [self._loss()], [like])[0])

    def _loss(self) -> Tensor:
        with self.replay() as evaluate:
            return evaluate().detach()

    @torch.no_grad()
    def loss_with(self, values: Mapping[int, Tensor]) -> float:
        """The loss with other values of the parameters, by id(p); those that are missing stay. Put back bit for bit."""
        with _same_bits(self.params):
            for p in self.params:
                p.copy_(placed(values.get(id(p), p), p))
            return self.loss()

    def gradient(self) -> list[Tensor]:
        """The gradient at the parameters' present values, one tensor a parameter (zeros where the loss does not reach)."""
        return [placed(g, p) for g, p in zip(self.team.mean_of(self._gradient, self.params), self.params, strict=True)]

    def _gradient(self) -> list[Tensor]:
        with self.replay(twice=False) as evaluate:
            leaves = self.leaves
            grads = torch.autograd.grad(evaluate(), leaves, allow_unused=True)
        return [torch.zeros_like(p) if g is None else g.detach() for g, p in zip(grads, leaves, strict=True)]

    def _evaluate(self) -> Tensor:
        return self._checked(self.source.evaluate)

    def _checked(self, evaluate: Callable[[], Any]) -> Tensor:
        torch.clear_autocast_cache()  # where `step` is called under autocast it holds casts of other parameters
        loss = evaluate()
        if not isinstance(loss, Tensor):
            raise ReplayError(f"the loss is {type(loss).__name__}, not a tensor: return the loss tensor itself")
        if loss.numel() != 1:
            raise ReplayError(f"the loss has shape {tuple(loss.shape)}, not a scalar: return its mean or sum")
        if torch.is_grad_enabled() and not loss.requires_grad:
            raise ReplayError("the loss has no graph: return it before .item() or .detach(), and require gradients")
        return loss.reshape(()) / self.loss_scale


class ReplayError(RuntimeError):
    """The loss cannot be evaluated again; the message says why and what to do."""


@contextmanager
def without_trace(params: Sequence[Tensor], modules: Sequence[nn.Module]) -> Iterator[None]:
    """RNG, `.grad`, modes and buffers as they were, and no hook of ours hears what happens inside."""
    with _put_back(params, modules), _unheard():
        yield


@contextmanager
def _put_back(params: Sequence[Tensor], modules: Sequence[nn.Module]) -> Iterator[None]:
    """RNG, `.grad`, modes and buffers as they were, whatever happens inside. Modules met on the way are covered too."""
    device = params[0].device
    rng = cap.rng_state(device)
    known = {id(p): p for p in (*params, *(p for m in modules for p in m.parameters(recurse=False)))}
    grads = [(p, p.grad) for p in known.values()]
    modes = [(m, m.training) for m in modules]
    lent: dict[nn.Module, dict[str, Tensor | None]] = {}

    def lend(module: nn.Module, _args: Any = None) -> None:
        # Clones, not old values written back: that would bump version counters and break the user's graph.
        if module not in lent and module._buffers:
            lent[module] = dict(module._buffers)
            module._buffers.update({k: None if b is None else b.clone() for k, b in module._buffers.items()})

    for p in known.values():
        p.grad = None  # a closure's zero_grad and clipping find nothing to touch
    for module in modules:
        lend(module)
    hook = nn.modules.module.register_module_forward_pre_hook(lend)
    try:
        yield
    finally:
        hook.remove()
        for module, buffers in lent.items():
            module._buffers.update(buffers)
        for module, mode in modes:
            module.training = mode
        for p, g in grads:
            p.grad = g
        cap.set_rng_state(rng)


@contextmanager
def _unheard() -> Iterator[None]:
    """No capture takes what happens inside for the user's doing."""
    Capture.replaying += 1
    try:
        yield
    finally:
        Capture.replaying -= 1


@contextmanager
def moved(params: Sequence[Tensor], direction: Sequence[Tensor], length: float) -> Iterator[None]:
    """Parameters at w + length * direction inside; the very same bits outside (copies, not subtraction)."""
    with _same_bits(params):
        with torch.no_grad():
            for p, d in zip(params, direction, strict=True):
                p.add_(placed(d, p).to(p.dtype), alpha=length)
        yield


@contextmanager
def _same_bits(params: Sequence[Tensor]) -> Iterator[None]:
    """Whatever happens to the parameters inside, outside they are what they were."""
    kept = [p.detach().clone() for p in params]
    try:
        yield
    finally:
        with torch.no_grad():
            for p, k in zip(params, kept, strict=True):
                p.copy_(k)


def agreement(replayed: Sequence[Tensor], seen: Sequence[Tensor | None]) -> tuple[float, float]:
    """(cosine, |replayed| / |seen|) of two gradients; (1, 1) when both vanish, NaN when either is not finite."""
    pairs = [(whole(r), whole(torch.zeros_like(r) if s is None else s)) for r, s in zip(replayed, seen, strict=True)]
    wide = torch.float32 if replayed[0].device.type == "mps" else torch.float64
    dot, rr, ss = torch.stack(
        [
            torch.stack([(a.to(wide) * b.to(wide)).sum() for a, b in group]).sum()
            for group in (pairs, [(r, r) for r, _ in pairs], [(s, s) for _, s in pairs])
        ]
    ).tolist()
    if rr == 0 and ss == 0:
        return 1.0, 1.0
    if rr == 0 or ss == 0:
        return 0.0, 0.0 if rr == 0 else float("inf")
    return dot / (rr * ss) ** 0.5, (rr / ss) ** 0.5

"""The base's own step in the coordinates of standardised inputs: what a user who standardises the data would see."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from adaptive_opt.curvature import flatten
from adaptive_opt.modes.base import Moved, StepContext, all_params
from adaptive_opt.parallel import ProcessLost
from adaptive_opt.records import RAW
from adaptive_opt.sharded import is_sharded

WIDE = (torch.float32, torch.float64)  # an offset would take the digits of a shorter type
KINDS = (nn.Linear, nn.Conv1d, nn.Conv2d)
FEWEST = 32  # rows of a layer's input from which a spread is worth the name
UNITS = 30.0  # times the median spread that the largest of features in one unit is, at most (docs/evidence.md, "raw features")
WORTH = 0.5  # of the loss, at most, must be left at the other start (docs/evidence.md, "raw features")
ALIKE = 10.0  # times, by which the sizes of two batches of the same data differ at most
FORWARD = 0.35  # of a gradient's cost
CONSTANT = 1e-6  # of a feature's root mean square: a spread that is less is rounding


@dataclass
class Inputs:
    """The inputs a of a layer W a + b, as a = mean + spread * z: W~ = W spread and b~ = b + W mean act on z."""

    bias: int | None  # its position among the base's parameters; None: there is none, and z is not centred
    mean: Tensor  # (n,) n inputs (of a convolution: channels)
    spread: Tensor  # (n,)
    name: str = ""  # of the layer

    @property
    def size(self) -> float:
        """Root mean square of the largest feature."""
        return float((self.mean.square() + self.spread.square()).max().sqrt())

    def into(self, W: Tensor, b: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """(W~, b~)"""
        return W * _along(self.spread, W), None if b is None else b + _summed(W, self.mean)

    def back(self, W: Tensor, b: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """(W, b) out of (W~, b~)."""
        W = W / _along(self.spread, W)
        return W, None if b is None else b - _summed(W, self.mean)

    def gradients(self, G: Tensor, g: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """With respect to (W~, b~), by the chain rule."""
        if g is not None:
            G = G - g.reshape(-1, *[1] * (G.dim() - 1)) * _along(self.mean, G)
        return G / _along(self.spread, G), g


class Standardised:
    """Layers that are fed with the data take their steps as if each of its features had mean 0 and spread 1.

    Means and spreads are those of the batch at which the mode begins. With a = mean + spread * z the layer W a + b is
    W~ z + b~. The base steps with W~, b~ and their gradients, its averages are of those, and the difference goes back to W
    and b: the model stays what it is, and learns what it would learn from standardised data.

    Where it lowers the loss of the batch clearly (`helps`), the weights first become what they would have been at the start
    there, W <- W / spread and b <- b - W mean / spread; `ctx.moved` then says that the gradients are of another place.
    Elsewhere, as where something was learned, the function stays. Weight decay shrinks W~. Without a bias that is trained
    nothing is centred.

    The next batch must be of about the same size (`holds`): a first batch that is broken looks like data that nobody scaled.

    Linear layers and convolutions without groups, of weights that no other layer has, in 32 bits and more, that are trained:
    with a gradient in this step, in a group whose learning rate is not 0. Of several processes all must feed the same layers.

    raw: root mean square of a layer's largest feature, beyond which it counts (docs/evidence.md, "raw features").
    """

    name = "standardised"
    needs_replay = False
    steps_as_base = False

    def __init__(self, raw: float = RAW):
        if not raw > 0:
            raise ValueError(f"Standardised(raw={raw}): a root mean square, above 0")
        self.raw = raw
        self._model: nn.Module | None = None
        self._layers: dict[int, Inputs] = {}  # by the position of the weight
        self.sure = False  # another batch was of that size

    def refuses(self, base: Optimizer) -> str | None:
        if any(map(is_sharded, all_params(base))):
            return "standardised needs whole weights, and these parameters are shards of them (FSDP2)"
        return None

    def listen(self, model: nn.Module | None, base: Optimizer) -> None:
        self._model = model

    @torch.no_grad()
    def helps(self, ctx: StepContext) -> bool:
        """Whether the loss of this batch is clearly lower at the other start, which is only looked at."""
        return self._begun(ctx, stay=False)[1] is not None

    @torch.no_grad()
    def enter(self, ctx: StepContext) -> None:
        self.sure = False
        self._layers, ctx.moved = self._begun(ctx)
        self._forget(ctx)

    @torch.no_grad()
    def holds(self, ctx: StepContext) -> bool:
        """Whether the data of this batch is of the size that it was taken for; asked until one batch has shown that it is."""
        if self.sure:
            return True
        now = self._measured(ctx, 0.0)
        alike = [1 / ALIKE < now[i].size / x.size < ALIKE for i, x in self._layers.items() if i in now]
        self.sure = len(alike) == len(self._layers)
        return all(alike)

    @torch.no_grad()
    def exit(self, ctx: StepContext) -> None:
        self._forget(ctx)
        self._layers = {}

    @torch.no_grad()
    def step(self, ctx: StepContext) -> None:
        params = all_params(ctx.base)
        there = [(params[i], x, None if x.bias is None else params[x.bias]) for i, x in self._layers.items()]
        there = [(W, x, b) for W, x, b in there if W.grad is not None and (b is None or b.grad is not None)]
        kept = [(p, p.data, p.grad) for W, _, b in there for p in (W, b) if p is not None]
        steps: list[tuple[Tensor, Tensor | None]] = []
        try:
            given = []
            for W, x, b in there:
                values, grads = x.into(W, b), x.gradients(_sure(W.grad), None if b is None else b.grad)
                for p, value, grad in zip((W, b), values, grads, strict=True):
                    if p is not None:
                        p.data, p.grad = _sure(value).clone(), grad
                given.append(values)
            ctx.base.step()
            for (W, _, b), (old, old_b) in zip(there, given, strict=True):
                steps.append((W.data - old, None if b is None else b.data - _sure(old_b)))
        finally:
            for p, data, grad in kept:
                p.data, p.grad = data, grad
        for (W, x, b), step in zip(there, steps, strict=True):
            dW, db = x.back(*step)
            W.add_(dW)
            if b is not None and db is not None:
                b.add_(db)

    def _begun(self, ctx: StepContext, stay: bool = True) -> tuple[dict[int, Inputs], Moved | None]:
        """The layers, and what was gained by the other start; neither where the batch cannot be had again."""
        try:
            layers = self._measured(ctx, self.raw)
            return layers, self._start_over(ctx, layers, stay)
        except ProcessLost:
            raise
        except Exception as error:
            ctx.failure = error
            return {}, None

    def _measured(self, ctx: StepContext, least: float) -> dict[int, Inputs]:
        """Means and spreads of what the batch feeds to the layers at the front, over all processes."""
        model, objective = self._model, ctx.objective
        if model is None or objective is None:
            return {}
        team, params = objective.team, all_params(ctx.base)
        ctx.cost += FORWARD
        with objective.replay() as evaluate, _fed(model) as sums:
            team.together(evaluate)
        uses = Counter(id(p) for module in model.modules() for p in module.parameters(recurse=False))
        moving = [i for i in ctx.indices if float(ctx.group_of(params[i])["lr"]) != 0]
        trained = {id(params[i]): i for i in moving if uses[id(params[i])] == 1}
        met: list[tuple[str, int, int | None]] = []
        parts: list[Tensor] = []
        for name, module in model.named_modules():
            seen, index = sums.get(module), trained.get(id(getattr(module, "weight", None)))
            if seen is not None and index is not None and params[index].dtype in WIDE:
                met.append((name, index, trained.get(id(module.bias))))
                parts.append(flatten(seen))
        if not team.same(met):
            return {}
        found: dict[int, Inputs] = {}
        for (name, index, bias), total in zip(met, map(team.total, parts), strict=True):
            count, first, second = total[0], *total[1:].chunk(2)
            if not float(count) >= FEWEST:
                continue
            first, second = first / count, second / count
            if not float(second.max().sqrt()) > least:
                continue
            mean = torch.zeros_like(first) if bias is None else first
            spread = (second - mean * mean).clamp_min(0).sqrt()
            real = spread[spread > CONSTANT * second.sqrt()]
            if len(real) and float(real.max()) < UNITS * float(real.median()):  # of one kind
                spread = spread.square().mean().sqrt().expand_as(spread)
            spread = torch.where(spread > CONSTANT * second.sqrt(), spread, torch.ones_like(spread))
            like = params[index]
            found[index] = Inputs(bias, mean.to(like), spread.to(like), name)
        return found

    def _start_over(self, ctx: StepContext, layers: dict[int, Inputs], stay: bool) -> Moved | None:
        """The weights that the start would have drawn for standardised features, where the loss is lower there."""
        if not layers:
            return None
        params, moved = all_params(ctx.base), None
        before = self._loss(ctx)
        kept = [(params[k], params[k].clone()) for i, x in layers.items() for k in (i, x.bias) if k is not None]
        try:
            for i, x in layers.items():
                b = None if x.bias is None else params[x.bias]
                W, shifted = x.back(params[i], b)
                params[i].copy_(W)
                if b is not None and shifted is not None:
                    b.copy_(shifted)
            after = self._loss(ctx)
            if before > 0 and after < WORTH * before:
                names = ", ".join(x.name for x in layers.values())
                who = f"layer {names} starts" if len(layers) == 1 else f"layers {names} start"
                moved = Moved(f"{who} as for standardised features", before, after)
        finally:
            if moved is None or not stay:
                for p, value in kept:
                    p.copy_(value)
        return moved

    @staticmethod
    def _loss(ctx: StepContext) -> float:
        assert ctx.objective is not None
        ctx.cost += FORWARD
        return ctx.objective.loss()

    def _forget(self, ctx: StepContext) -> None:
        """The base's averages of these layers are of other coordinates: they begin anew."""
        params = all_params(ctx.base)
        for i, x in self._layers.items():
            for position in (i, x.bias):
                if position is not None:
                    ctx.base.state.pop(params[position], None)

    def state_dict(self) -> dict[str, Any]:
        return {"layers": {i: dict(vars(x)) for i, x in self._layers.items()}, "sure": self.sure}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.sure = state.get("sure", False)
        self._layers = {i: Inputs(**x) for i, x in state["layers"].items()}

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_model": None}


@contextmanager
def _fed(model: nn.Module) -> Iterator[dict[nn.Module, list[Tensor] | None]]:
    """Count, sums and sums of squares of the features that layers are fed with; None for a layer that hears of other layers."""
    sums: dict[nn.Module, list[Tensor] | None] = {}

    def see(module: nn.Module, args: tuple[Any, ...]) -> None:
        x = args[0] if args else None
        known = sums.get(module, [])
        if not isinstance(x, Tensor) or known is None or x.requires_grad or not x.is_floating_point():
            sums[module] = None
            return
        x = x.cpu().double() if x.device.type == "mps" else x.double()  # an offset takes the digits of the spread
        if isinstance(module, nn.Linear):
            a = x.reshape(-1, x.shape[-1])
        else:
            space = 1 if isinstance(module, nn.Conv1d) else 2
            a = x.reshape(-1, *x.shape[-space - 1 :]).transpose(0, 1).flatten(1).T
        new = [a.new_full((1,), len(a)), a.sum(0), (a * a).sum(0)]
        sums[module] = [old + more for old, more in zip(known, new, strict=True)] if known else new

    with ExitStack() as stack:
        for module in model.modules():
            if isinstance(module, KINDS) and getattr(module, "groups", 1) == 1:
                stack.callback(module.register_forward_pre_hook(see).remove)
        yield sums


def _along(x: Tensor, W: Tensor) -> Tensor:
    """(n,) beside a weight (outputs, n, ...)."""
    return x.reshape(1, -1, *[1] * (W.dim() - 2))


def _summed(W: Tensor, x: Tensor) -> Tensor:
    """(outputs,): W times x."""
    return (W * _along(x, W)).flatten(1).sum(1)


def _sure(x: Tensor | None) -> Tensor:
    assert x is not None
    return x

"""Curvature as products with flat vectors: Hessian (Pearlmutter, 1994) and generalised Gauss-Newton (Schraudolph, 2002).

An operator belongs to the `params` it was given: those of one layer give that layer's diagonal block. It has `gradient`, the
(n,) gradient of the same loss; `backend`, how its products are made; `products`, how many there were; and is called with an
(n,) vector of `gradient`'s dtype.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Protocol

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from adaptive_opt.curvature.vectors import flatten, norm, unflatten

_ONCE = once_differentiable(lambda ctx: None).__code__  # of every backward with that mark
EMPTY = "an operator over no batch at all: the data is empty"


class Operator(Protocol):
    """A symmetric (n, n) matrix that is only ever multiplied with."""

    backend: str
    gradient: Tensor  # (n,)
    products: int

    def __call__(self, v: Tensor) -> Tensor: ...


class Hessian:
    """Exact Hessian of a scalar loss over `params`.

    The double-backward graph is built once and kept until the object dies. A parameter that the loss does not use, or
    uses only linearly, contributes zero rows. Raises RuntimeError (torch's, or ours for a custom function marked
    once_differentiable) where an operation has no second derivative.
    """

    backend = "exact"

    def __init__(self, loss: Tensor, params: Sequence[Tensor]):
        self.params = list(params)
        _refuse_once_only(loss)
        grads = torch.autograd.grad(loss, self.params, create_graph=True, allow_unused=True)
        self.gradient = _filled(grads, self.params)
        self._curved = [(i, g) for i, g in enumerate(grads) if g is not None and g.requires_grad]
        self.products = 0

    def __call__(self, v: Tensor) -> Tensor:
        self.products += 1
        if not self._curved:
            return torch.zeros_like(v)
        pieces = unflatten(v, self.params)
        return _filled(_pulled([g for _, g in self._curved], self.params, [pieces[i] for i, _ in self._curved]), self.params)


class GaussNewton:
    """Generalised Gauss-Newton matrix J' H_L J of loss L(z(params)), exact; positive semi-definite where L is convex in z.

    `outputs` are the tensors z (the model's output), `loss` the scalar that hangs on them. J is their Jacobian over `params`,
    H_L the loss's Hessian over z: what `loss` takes from the parameters past z is left out. A product costs one with J (by
    double backward), one with H_L and one with J'. Raises RuntimeError as `Hessian` does.
    """

    backend = "exact"

    def __init__(self, outputs: Sequence[Tensor], loss: Tensor, params: Sequence[Tensor]):
        self.params = list(params)
        self.outputs = [z for z in outputs if z.requires_grad]
        if not self.outputs:
            raise ValueError("GaussNewton(outputs, loss, params): no output hangs on a parameter by a graph")
        _refuse_once_only(loss)
        self.gradient = _filled(_pulled([loss], self.params, None), self.params)
        slopes = torch.autograd.grad(loss, self.outputs, create_graph=True, allow_unused=True)
        self._curved = [(i, s) for i, s in enumerate(slopes) if s is not None and s.requires_grad]
        self._at = [torch.zeros_like(z, requires_grad=True) for z in self.outputs]
        back = torch.autograd.grad(self.outputs, self.params, self._at, create_graph=True, allow_unused=True)
        self._back = [(i, b) for i, b in enumerate(back) if b is not None]  # J'u as a function of u, linear
        self.products = 0

    def __call__(self, v: Tensor) -> Tensor:
        self.products += 1
        if not self._curved:
            return torch.zeros_like(v)
        pieces = unflatten(v, self.params)
        jv = _pulled([b for _, b in self._back], self._at, [pieces[i] for i, _ in self._back])
        jv = [torch.zeros_like(z) if t is None else t for t, z in zip(jv, self.outputs, strict=True)]
        hjv = _pulled([s for _, s in self._curved], self.outputs, [jv[i] for i, _ in self._curved])
        reached = [(z, t) for z, t in zip(self.outputs, hjv, strict=True) if t is not None]
        if not reached:
            return torch.zeros_like(v)
        return _filled(_pulled([z for z, _ in reached], self.params, [t for _, t in reached]), self.params)


class FiniteDifferenceHessian:
    """Central differences of the gradient: for models without a second derivative. Approximate, and wrong on ReLU nets.

    `gradient()` returns the (n,) gradient at the parameters' present values, which are moved and put back bit for bit.
    """

    backend = "finite_difference"

    def __init__(self, gradient: Callable[[], Tensor], params: Sequence[Tensor]):
        self.params = list(params)
        self._gradient = gradient
        self.gradient = gradient()
        self.products = 0

    @torch.no_grad()
    def __call__(self, v: Tensor) -> Tensor:
        self.products += 1
        kept = [p.detach().clone() for p in self.params]
        # step ~ eps^(1/3) relative to the weights balances truncation against rounding; weights in half precision must move by
        # more than they round (a tenth of their own eps^(1/3), measured: 2 % error in float16, 8 % in bfloat16)
        of_weights = max(torch.finfo(k.dtype).eps for k in kept)
        step = max(torch.finfo(v.dtype).eps ** (1 / 3), 0.1 * of_weights ** (1 / 3))
        h = step * (1 + norm(flatten(kept))) / norm(v).clamp_min(1e-30)
        h = h.to(v.dtype)
        try:
            ahead = self._at(kept, v, h)
            behind = self._at(kept, v, -h)
        finally:
            for p, k in zip(self.params, kept, strict=True):
                p.copy_(k)
        return (ahead - behind) / (2 * h)

    def _at(self, kept: list[Tensor], v: Tensor, h: Tensor) -> Tensor:
        for p, k, d in zip(self.params, kept, v.split([k.numel() for k in kept]), strict=True):
            p.copy_(k + h * d.view(k.shape))  # in v's precision: in half precision h may overflow, and d vanish
        return self._gradient()


class Sum:
    """Sum of operators over the same parameters: of the batches of a data set, each loss weighted by its samples."""

    def __init__(self, parts: Sequence[Operator]):
        self.parts = list(parts)
        if not self.parts:
            raise ValueError(EMPTY)
        self.backend = self.parts[0].backend
        self.gradient = torch.stack([part.gradient for part in self.parts]).sum(0)
        self.products = 0

    def __call__(self, v: Tensor) -> Tensor:
        self.products += 1
        return _total(part(v) for part in self.parts)


class Rebuilt:
    """A sum of operators that are built anew, one after the other, for every product: the memory of one graph at a time.

    `build()` yields the parts, the same ones each time; about 1.5 to 2 times slower than keeping their graphs.
    """

    backend = "exact_rebuilt"

    def __init__(self, build: Callable[[], Iterable[Operator]]):
        self._build = build
        self.gradient = _total(map(_gradient_of, build()))
        self.products = 0

    def __call__(self, v: Tensor) -> Tensor:
        self.products += 1

        def product(part: Operator) -> Tensor:
            return part(v)

        return _total(map(product, self._build()))  # a loop's variable would keep one graph more than the present one


def scaled(matvec: Callable[[Tensor], Tensor], root: Tensor) -> Callable[[Tensor], Tensor]:
    """D H D for the diagonal D = diag(root): the Hessian in the metric in which the optimizer steps."""
    return lambda v: root * matvec(root * v)


def _pulled(outputs: Sequence[Tensor], inputs: Sequence[Tensor], vectors: Sequence[Tensor] | None) -> tuple[Tensor | None, ...]:
    return torch.autograd.grad(outputs, inputs, vectors, retain_graph=True, allow_unused=True)


def _filled(grads: Sequence[Tensor | None], params: Sequence[Tensor]) -> Tensor:
    """(n,), with zeros where a parameter is not reached."""
    return flatten([torch.zeros_like(p) if g is None else g for g, p in zip(grads, params, strict=True)])


def _gradient_of(part: Operator) -> Tensor:
    return part.gradient


def _total(vectors: Iterable[Tensor]) -> Tensor:
    total: Tensor | None = None
    for v in vectors:
        total = v if total is None else total + v
    if total is None:
        raise ValueError(EMPTY)
    return total


def _refuse_once_only(loss: Tensor) -> None:
    """A custom function behind `loss` marked once_differentiable: autograd would drop it without a word."""
    seen, stack = set(), [loss.grad_fn]
    while stack:
        node = stack.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        function = getattr(node, "_forward_cls", None)
        if function is not None and getattr(function.backward, "__code__", None) is _ONCE:
            raise RuntimeError(f"{function.__name__} is once_differentiable: it has no second derivative")
        stack.extend(following for following, _ in node.next_functions)

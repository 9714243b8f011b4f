"""Hessian-vector products with flat vectors (Pearlmutter, 1994), exact on a retained graph or by finite differences."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

_ONCE = once_differentiable(lambda ctx: None).__code__  # of every backward with that mark


def flatten(tensors: Sequence[Tensor]) -> Tensor:
    """One (n,) vector out of tensors of any shapes; float32 at least, so that half-precision models can be measured."""
    dtype = torch.promote_types(tensors[0].dtype, torch.float32)
    return torch.cat([t.detach().reshape(-1).to(dtype) for t in tensors])


def unflatten(vector: Tensor, like: Sequence[Tensor]) -> list[Tensor]:
    """The (n,) vector cut into tensors of the shapes and dtypes of `like`."""
    pieces = vector.split([t.numel() for t in like])
    return [piece.view(t.shape).to(t.dtype) for piece, t in zip(pieces, like, strict=True)]


class Hessian:
    """Exact Hessian of a scalar loss over `params`, as products with (n,) vectors.

    The double-backward graph is built once and kept until the object dies. A parameter that the loss does not use, or
    uses only linearly, contributes zero rows. Raises RuntimeError (torch's, or ours for a custom function marked
    once_differentiable) where an operation has no second derivative.
    """

    backend = "exact"

    def __init__(self, loss: Tensor, params: Sequence[Tensor]):
        self.params = list(params)
        once = _once_only(loss)
        if once is not None:
            raise RuntimeError(f"{once} is once_differentiable: it has no second derivative")
        grads = torch.autograd.grad(loss, self.params, create_graph=True, allow_unused=True)
        self.gradient = flatten([torch.zeros_like(p) if g is None else g for g, p in zip(grads, self.params, strict=True)])
        self._curved = [(i, g) for i, g in enumerate(grads) if g is not None and g.requires_grad]
        self.products = 0

    def __call__(self, v: Tensor) -> Tensor:
        self.products += 1
        if not self._curved:
            return torch.zeros_like(v)
        pieces = unflatten(v, self.params)
        rows = torch.autograd.grad(
            [g for _, g in self._curved],
            self.params,
            [pieces[i] for i, _ in self._curved],
            retain_graph=True,
            allow_unused=True,
        )
        return flatten([torch.zeros_like(p) if r is None else r for r, p in zip(rows, self.params, strict=True)])


def _once_only(loss: Tensor) -> str | None:
    """The first custom function behind `loss` marked once_differentiable: autograd would drop it without a word."""
    seen, stack = set(), [loss.grad_fn]
    while stack:
        node = stack.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        function = getattr(node, "_forward_cls", None)
        if function is not None and getattr(function.backward, "__code__", None) is _ONCE:
            return function.__name__
        stack.extend(following for following, _ in node.next_functions)
    return None


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
        size = torch.linalg.vector_norm(flatten(kept))
        # step ~ eps^(1/3) relative to the weights balances truncation against rounding
        h = torch.finfo(v.dtype).eps ** (1 / 3) * (1 + size) / torch.linalg.vector_norm(v).clamp_min(1e-30)
        try:
            ahead = self._at(kept, v, h)
            behind = self._at(kept, v, -h)
        finally:
            for p, k in zip(self.params, kept, strict=True):
                p.copy_(k)
        return (ahead - behind) / (2 * h)

    def _at(self, kept: list[Tensor], v: Tensor, h: Tensor) -> Tensor:
        for p, k, d in zip(self.params, kept, unflatten(v, kept), strict=True):
            p.copy_(k + h.to(k.dtype) * d)
        return self._gradient()


def scaled(matvec: Callable[[Tensor], Tensor], root: Tensor) -> Callable[[Tensor], Tensor]:
    """D H D for the diagonal D = diag(root): the Hessian in the metric in which the optimizer steps."""
    return lambda v: root * matvec(root * v)

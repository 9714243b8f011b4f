"""Which way of making Hessian products can run here: exact on a kept graph, exact on rebuilt ones, finite differences."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from adaptive_opt.curvature.operators import EMPTY, FiniteDifferenceHessian, GaussNewton, Hessian, Operator, Rebuilt, Sum
from adaptive_opt.curvature.vectors import flatten

BACKENDS = ("exact", "exact_rebuilt", "finite_difference")
CURVATURES = ("hessian", "gauss_newton")
GRAPHS = 2**30  # bytes: kept graphs of several batches may take as much together, unless a memory budget says otherwise


class CannotMeasure(ValueError):
    """What was asked for cannot be had here; the message says why and what would help."""


@dataclass(frozen=True)
class Part:
    """One batch's share of the loss, evaluated with a fresh graph."""

    loss: Tensor
    outputs: tuple[Tensor, ...] = ()  # of the model; the Gauss-Newton matrix needs them


Parts = Sequence[Callable[[], Part]]


def operator_on(
    parts: Parts, params: Sequence[Tensor], curvature: str = "hessian", backend: str | None = None, memory: int | None = None
) -> tuple[Operator, str | None]:
    """The operator of the summed loss over `params`, and why it is not the first choice (None when it is).

    `parts` evaluate one batch's loss each, as often as called. With `backend=None`: exact on kept graphs; exact on rebuilt
    ones when the graphs of several batches take more than 1 GiB together, when they would exceed `memory` bytes, or when
    keeping them ran out of memory; finite differences of the gradient when an operation has no second derivative. Raises
    ValueError on names that are none, and torch's RuntimeError when what was asked for by name, or a Gauss-Newton matrix,
    cannot be had.
    """
    if backend not in (None, *BACKENDS) or curvature not in CURVATURES:
        raise ValueError(f"backend={backend!r}, curvature={curvature!r}: one of {BACKENDS} or None, one of {CURVATURES}")
    if not parts:
        raise ValueError(EMPTY)

    def build() -> Iterator[Operator]:
        for part in parts:
            yield _exact(part(), params, curvature)

    def differences() -> Operator:
        if curvature != "hessian":
            raise CannotMeasure("backend='finite_difference' has no Gauss-Newton matrix: take curvature='hessian'")
        return FiniteDifferenceHessian(lambda: _gradient(parts, params), params)

    if backend == "finite_difference":
        return differences(), None
    if backend == "exact_rebuilt":
        return Rebuilt(build), None
    try:
        if backend is None and (len(parts) > 1 or memory is not None):
            needed, limit = len(parts) * graph_bytes(parts[0], params), GRAPHS if memory is None else memory
            if needed > limit:
                return Rebuilt(build), f"the kept graphs would take {needed / 2**20:.0f} MiB of {limit / 2**20:.0f}"
        kept = list(build())
        return kept[0] if len(kept) == 1 else Sum(kept), None
    except RuntimeError as error:
        first = str(error).splitlines()[0]
        out_of_memory = isinstance(error, torch.OutOfMemoryError) or "allocate memory" in first
        if backend is not None or (curvature != "hessian" and not out_of_memory):
            raise
    if out_of_memory:
        return Rebuilt(build), f"keeping the graph ran out of memory ({first})"
    return differences(), f"an exact product failed ({first})"


def graph_bytes(part: Callable[[], Part], params: Sequence[Tensor]) -> int:
    """What autograd keeps for second derivatives of this part, without the parameters themselves. Costs two gradients."""
    seen = {p.untyped_storage().data_ptr() for p in params}
    size = 0

    def count(t: Tensor) -> Tensor:
        nonlocal size
        storage = t.untyped_storage()
        if storage.data_ptr() not in seen:
            seen.add(storage.data_ptr())
            size += storage.nbytes()
        return t.detach()

    with torch.autograd.graph.saved_tensors_hooks(count, lambda t: t):
        torch.autograd.grad(part().loss, list(params), create_graph=True, allow_unused=True)
    return size


def _exact(part: Part, params: Sequence[Tensor], curvature: str) -> Operator:
    if curvature == "hessian":
        return Hessian(part.loss, params)
    if not part.outputs:
        raise CannotMeasure(
            "curvature='gauss_newton' needs the model's output; an objective() or a closure shows only the loss"
        )
    return GaussNewton(part.outputs, part.loss, params)


def _gradient(parts: Parts, params: Sequence[Tensor]) -> Tensor:
    total: Tensor | None = None
    for part in parts:
        with torch.enable_grad():
            grads = torch.autograd.grad(part().loss, list(params), allow_unused=True)
        g = flatten([torch.zeros_like(p) if d is None else d for d, p in zip(grads, params, strict=True)])
        total = g if total is None else total + g
    if total is None:
        raise ValueError(EMPTY)
    return total

"""The largest eigenvalues and their vectors, by Lanczos until each is known."""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from adaptive_opt.curvature.budget import lanczos_within
from adaptive_opt.curvature.lanczos import Matvec
from adaptive_opt.curvature.questions import largest


@dataclass(frozen=True)
class Eigenpairs:
    """Approximate eigenpairs, largest eigenvalue first."""

    values: np.ndarray  # (k,)
    residuals: np.ndarray  # (k,): an eigenvalue lies within this of values[i]
    vectors: Tensor  # (k, n), rows of unit length
    products: int  # those that a run without a basis repeats for the vectors among them
    converged: bool  # every residual is within the tolerance asked for


def top_eigenpairs(
    matvec: Matvec, start: Tensor, count: int, tol: float = 1e-3, max_steps: int = 100, memory: int | None = None
) -> Eigenpairs:
    """The `count` largest eigenvalues of a symmetric operator, each to `tol` of itself, and their vectors.

    Of an eigenvalue that occurs several times one copy is found (`block_lanczos` finds the others). An eigenvalue 0 among the
    largest is never known to a share of itself, and `converged` is False. `memory` as in `lanczos_within`. Raises ValueError
    on a count that does not fit into the space.
    """
    n = start.numel()
    if not 1 <= count <= n:
        raise ValueError(f"top_eigenpairs(count={count}) of an operator of size {n}: from 1 to {n}")
    question = largest(count, tol)
    products = 0

    def counted(v: Tensor) -> Tensor:
        nonlocal products
        products += 1
        return matvec(v)

    s = lanczos_within(memory, counted, start, max(max_steps, count), until=question)
    found = range(len(s.ritz_values) - 1, max(len(s.ritz_values) - count, 0) - 1, -1)
    vectors = torch.stack([s.ritz_vector(i) for i in found])
    return Eigenpairs(
        values=s.ritz_values[list(found)],
        residuals=s.residuals[list(found)],
        vectors=vectors,
        products=products,
        converged=question(s) <= 1,
    )

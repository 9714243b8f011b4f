"""Lanczos whose basis is dealt out over processes: each holds its own entries of every vector (ScaLAPACK's 1-D layout)."""

from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor

from adaptive_opt.curvature.lanczos import Matvec, Spectrum, Vectors, lanczos
from adaptive_opt.curvature.questions import Question


class Shares(Protocol):
    """How (n,) vectors are dealt out over the processes; `whole` and `total` are collective calls."""

    size: int  # processes

    def mine(self, vector: Tensor) -> Tensor:
        """(n,), equal on all processes -> this process's entries."""
        ...

    def whole(self, share: Tensor) -> Tensor:
        """The entries of all processes in their order, (n,)."""
        ...

    def total(self, x: Tensor) -> Tensor:
        """The sum over the processes, the same bits on each."""
        ...


def shared_lanczos(matvec: Matvec, start: Tensor, num_steps: int, shares: Shares, *, until: Question | None = None) -> Spectrum:
    """`lanczos` with 1/P of its basis and of its vector work on each of P processes; all must call it, with the same start.

    `matvec` maps whole (n,) vectors and gives every process the same product. A step costs one gathering of a vector beside
    the product, and three to five sums of at most `num_steps` numbers. Ritz vectors are whole, and made by all together.
    """

    def product(q: Tensor) -> Tensor:
        return shares.mine(matvec(shares.whole(q)))

    s = lanczos(product, shares.mine(start).clone(), num_steps, until=until, total=shares.total)
    return replace(s, vectors=_Whole(s.vectors, shares), method="shared")


@dataclass(frozen=True)
class _Whole:
    """The shares of a basis as a basis of whole vectors."""

    inner: Vectors
    shares: Shares

    def combine(self, coefficients: Tensor) -> Tensor:
        return self.shares.whole(self.inner.combine(coefficients))

    def orthogonality(self) -> Tensor:
        return torch.as_tensor(self.inner.orthogonality())

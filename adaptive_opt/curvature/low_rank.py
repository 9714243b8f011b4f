"""Randomised eigendecomposition of a symmetric operator (Halko, Martinsson and Tropp, 2011)."""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from adaptive_opt.curvature.basis import Basis
from adaptive_opt.curvature.lanczos import Matvec
from adaptive_opt.curvature.subspace import between, extend
from adaptive_opt.curvature.vectors import norm


@dataclass(frozen=True)
class LowRank:
    """A near Q B Q' with few rows of Q: eigenvalues of the largest magnitude first."""

    values: np.ndarray  # (rank,), by descending magnitude
    residuals: np.ndarray  # (rank,): an eigenvalue of A lies within residuals[i] of values[i]
    vectors: Tensor  # (rank, n), orthonormal rows
    products: int
    missed: float  # |A - Q Q'A|_2 of the whole subspace is no larger, but with probability 10^-probes; inf without probes


def randomized_eigh(
    matvec: Matvec,
    like: Tensor,
    rank: int,
    generator: torch.Generator,
    oversampling: int = 10,  # Halko, Martinsson and Tropp, 2011
    power_iterations: int = 1,
    probes: int = 2,
) -> LowRank:
    """The `rank` eigenvalues of the largest magnitude, from a random subspace of `rank + oversampling` dimensions.

    Costs (2 + power_iterations) (rank + oversampling) + probes products and keeps two vectors for each dimension. The products
    do not depend on each other within a pass; where they can only be made one by one, Lanczos finds the same ends with fewer.
    `missed` is the a-posteriori bound (their eq. 4.3) on how much of A the subspace left out. `like` is an (n,) tensor of
    the dtype and on the device of the products. The host is synchronised once. Raises ValueError on a rank that does not fit
    into the space, FloatingPointError when a product is not finite.
    """
    n = like.numel()
    if not 1 <= rank <= n or oversampling < 0 or power_iterations < 0 or probes < 0:
        raise ValueError(
            f"randomized_eigh(rank={rank}, oversampling={oversampling}, power_iterations={power_iterations}, probes={probes}) "
            f"of an operator of size {n}: a rank from 1 to {n}, and nothing negative"
        )
    l = min(rank + oversampling, n)  # noqa: E741, the paper's letter

    def normal() -> Tensor:
        return torch.randn(n, generator=generator, device=generator.device, dtype=torch.float32).to(like)

    q = Basis(l, like)
    for _ in range(l):
        extend(q, matvec(normal()))
    z = like.new_empty(l, n)  # A Q
    for _ in range(power_iterations):
        for i in range(l):
            z[i] = matvec(q.rows[i])
        q.size = 0
        for i in range(l):
            extend(q, z[i])
    for i in range(l):
        z[i] = matvec(q.rows[i])
    checks = [_outside(q, matvec(normal())) for _ in range(probes)]
    b = between(q.rows, z)
    for i in range(l):
        q.remove(b[:, i], z[i])
        q.remove(q.dots(z[i]), z[i])  # (I - Q Q') A Q, clean to its own rounding
    known = torch.cat([b.flatten(), between(z, z).flatten(), *(c[None] for c in checks)]).cpu().double().numpy()
    if not np.isfinite(known).all():
        raise FloatingPointError("randomized_eigh: a matrix-vector product is not finite")
    B, E, outside = known[: l * l].reshape(l, l), known[l * l : 2 * l * l].reshape(l, l), known[2 * l * l :]
    theta, s = np.linalg.eigh((B + B.T) / 2)
    largest = np.argsort(-np.abs(theta), kind="stable")[:rank]
    theta, s = theta[largest], s[:, largest]
    rounding = 8 * float(torch.finfo(like.dtype).eps) * np.abs(theta).max()
    residuals = np.sqrt(np.maximum(((E @ s) * s).sum(0), 0.0)) + np.linalg.norm(B - B.T) / 2 + rounding
    c = torch.as_tensor(s.T).to(like)
    vectors = like.new_empty(rank, n)
    torch.mm(c, q.rows, out=vectors)
    missed = 10 * np.sqrt(2 / np.pi) * outside.max() if probes else np.inf
    return LowRank(theta, residuals, vectors, (2 + power_iterations) * l + probes, float(missed))


def _outside(q: Basis, w: Tensor) -> Tensor:
    """|(I - Q Q') w|."""
    w = torch.clone(w)
    for _ in range(2):
        q.remove(q.dots(w), w)
    return norm(w)

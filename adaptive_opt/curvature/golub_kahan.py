"""Golub-Kahan-Lanczos bidiagonalisation with full reorthogonalisation (Golub and Kahan, 1965; Matrix Computations, 10.4)."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from adaptive_opt.curvature.basis import Basis
from adaptive_opt.curvature.vectors import Total, accumulator, entries, negligible, norm


@dataclass(frozen=True)
class Bidiagonal:
    """What k steps know about the singular values of an (m, n) operator J from one start vector of n entries.

    The values are the square roots of the Ritz values of J'J: none is above the largest singular value, and where n <= m none
    is below the smallest. Where n > m the n - m zeros of J'J count as singular values too.
    """

    sigma: np.ndarray  # (k,), ascending
    residuals: np.ndarray  # (k,): a singular value lies within residuals[i] of sigma[i]
    weights: np.ndarray  # (k,), sum 1: weight of each sigma^2 in the start vector's quadrature of J'J
    exhausted: bool  # the Krylov space is invariant: every sigma is a singular value
    shape: tuple[int, int]  # (m, n)
    products: int  # with J, and as many with J'

    def frobenius(self) -> tuple[float, float]:
        """|J|_F^2 and its standard error over start vectors uniform on the sphere, estimated from this one."""
        n, theta = self.shape[1], self.sigma**2
        mean, mean_square = float(self.weights @ theta), float(self.weights @ theta**2)
        return n * mean, n * float(np.sqrt(2 * max(mean_square - mean**2, 0.0) / (n + 2)))  # of v'J'Jv


def golub_kahan(
    product: Callable[[Tensor], Tensor],
    transposed: Callable[[Tensor], Tensor],
    start: Tensor,
    num_steps: int,
    *,
    eps: float | None = None,
    total: Total | None = None,
) -> Bidiagonal:
    """Run at most `num_steps` products with J and with J' from `start` and solve the bidiagonal problem.

    `product` maps an (n,) tensor to an (m,) tensor, `transposed` back. Norms are accumulated in float64 and stay on the device;
    the host is synchronised once, at the end. `eps` is the rounding of the products where it is coarser than `start`'s. `total`
    where each process has some entries of the vectors: the products are its own, dots and norms are everyone's. Raises
    ValueError on a step count that cannot be used, and FloatingPointError when the start vector or the first product is not
    finite.
    """
    m, n = 0, entries(start, total)
    k = min(num_steps, n)
    if k < 1:
        raise ValueError(f"golub_kahan(num_steps={num_steps}) on an operator with {n} columns: at least one step is needed")
    steps = torch.zeros(4, k, dtype=accumulator(start), device=start.device)
    alpha, beta, defect_u, defect_v = steps
    right = Basis(k, start, total=total)  # V, (k, n)
    left: Basis | None = None  # U, (k, m): m is known after the first product
    u, v = start, start / norm(start, total).to(start.dtype)
    for j in range(k):
        right.append(v)
        p = product(v).to(start.dtype)
        if left is None:
            m = entries(p, total)
            left = Basis(min(k, m), p, total=total)
        if j == m:  # U is full: alpha_j = 0
            break
        p = p if j == 0 else torch.add(p, u * beta[j - 1].to(p.dtype), alpha=-1)  # J v_j = beta_j-1 u_j-1 + alpha_j u_j
        u, alpha[j], defect_u[j] = _orthonormal(p, left)
        left.append(u)
        r = torch.add(transposed(u).to(start.dtype), v * alpha[j].to(v.dtype), alpha=-1)  # J'u_j = alpha_j v_j + beta_j v_j+1
        v, beta[j], defect_v[j] = _orthonormal(r, right)
    assert left is not None
    known = steps.cpu().double().numpy()  # the one synchronisation
    return _solve(known, (m, n), float(torch.finfo(start.dtype).eps), eps or 0.0)


def _orthonormal(w: Tensor, basis: Basis) -> tuple[Tensor, Tensor, Tensor]:
    """w without the basis as a unit vector, its length, and the length of what a true J and J' would not have put there.

    The second pass is over the unit vector: it is orthogonal also where w was all but inside of the basis, and then a step
    after the space ended does no harm.
    """
    tiny = torch.finfo(w.dtype).tiny  # 0 / 0 would make NaN
    defect = torch.zeros((), dtype=accumulator(w), device=w.device)
    if basis.size:
        taken = basis.dots(w)
        basis.remove(taken, w)
        defect = taken.norm()
    length = norm(w, basis.total)
    q = w / length.to(w.dtype).clamp_min(tiny)
    if basis.size:
        basis.remove(basis.dots(q), q)  # twice is enough (Parlett)
    rest = norm(q, basis.total)
    return q / rest.to(q.dtype).clamp_min(tiny), length * rest, defect


def _solve(steps: np.ndarray, shape: tuple[int, int], eps: float, eps_products: float) -> Bidiagonal:
    alpha, beta, defect_u, defect_v = steps
    n = shape[1]
    finite = np.isfinite(alpha) & np.isfinite(beta)
    k = len(alpha) if finite.all() else int(np.argmin(finite))
    if k == 0:
        raise FloatingPointError("golub_kahan: the first matrix-vector product (or the start vector) is not finite")
    # The Krylov space is invariant where alpha or beta vanishes beside what came before: what follows is rounding noise.
    scale = np.maximum.accumulate(alpha[:k] + beta[:k])
    before = np.concatenate([[0.0], scale[:-1]])
    least = negligible(max(shape), eps)
    no_alpha, no_beta = alpha[:k] <= least * before, beta[:k] <= least * scale
    ends = no_alpha | no_beta
    exhausted = bool(ends.any()) or k == n
    k = int(np.argmax(ends)) + 1 if ends.any() else k
    tail = dropped = 0.0
    if no_alpha[k - 1]:
        dropped = alpha[k - 1]
    elif exhausted:
        dropped = min(beta[k - 1], least * scale[k - 1])  # after n steps beta is noise of any size
    else:
        tail = beta[k - 1]
    B = np.diag(np.where(no_alpha[:k], 0.0, alpha[:k])) + np.diag(beta[: k - 1], 1)  # J V = U B, J'U = V B' + tail v e_k'
    P, sigma, Qt = np.linalg.svd(B)
    # By Weyl: sigma is a singular value of J + E, |E| = tail |p_k| for the pair (U p, V q), and what orthogonalisation took.
    known = (defect_u[:k], defect_v[: k - 1 if no_alpha[k - 1] else k])  # where alpha vanished u was no direction
    defect = float(np.linalg.norm(np.concatenate(known)))
    rounding = 8 * max(eps, eps_products) * sigma.max()  # the products are rounded: no bound is better than this
    residuals = tail * np.abs(P[-1]) + defect + dropped + rounding
    return Bidiagonal(
        sigma=sigma[::-1],
        residuals=residuals[::-1],
        weights=(Qt[:, 0] ** 2)[::-1],
        exhausted=exhausted,
        shape=shape,
        products=len(alpha),
    )

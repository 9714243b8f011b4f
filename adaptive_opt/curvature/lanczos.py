"""The Lanczos iteration with full reorthogonalisation (Lanczos, 1950; Golub and Van Loan, Matrix Computations, ch. 10)."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import scipy.linalg
import torch
from torch import Tensor

Matvec = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Spectrum:
    """What k Lanczos steps know about a symmetric (n, n) operator A from one start vector."""

    ritz_values: np.ndarray  # (k,), ascending: eigenvalues of A restricted to the Krylov space
    residuals: np.ndarray  # (k,): some eigenvalue of A lies within residuals[i] of ritz_values[i]
    weights: np.ndarray  # (k,), sum 1: weight of each Ritz value in the Gauss quadrature of the start vector
    basis: Tensor  # (k, n), rows orthonormal, on A's device
    coefficients: np.ndarray  # (k, k): column i holds Ritz vector i in the basis
    exhausted: bool  # the Krylov space is invariant: every Ritz value is an eigenvalue
    dim: int  # n

    @property
    def epsilon(self) -> float:
        """Largest Ritz magnitude: a lower bound on A's largest eigenvalue magnitude."""
        return float(np.abs(self.ritz_values).max())

    def ritz_vector(self, index: int) -> Tensor:
        """The Ritz vector of `ritz_values[index]`, shape (n,), unit length up to rounding."""
        y = torch.as_tensor(self.coefficients[:, index], dtype=self.basis.dtype, device=self.basis.device)
        return y @ self.basis


def lanczos(matvec: Matvec, start: Tensor, num_steps: int, tol: float | None = None, check_every: int = 4) -> Spectrum:
    """Run `num_steps` products of a symmetric operator from `start` and solve the tridiagonal problem.

    `matvec` maps an (n,) tensor to an (n,) tensor on the same device. Alpha and beta stay on the device; the host is
    synchronised once, at the end. With `tol` it is synchronised every `check_every` steps too, and the run ends early
    when the residuals of both ends are below tol * epsilon. Raises ValueError on a step count that cannot be used, and
    FloatingPointError when the start vector or the first product is not finite.
    """
    n = start.numel()
    m = min(num_steps, n)
    if m < 1:
        raise ValueError(f"lanczos(num_steps={num_steps}) on an operator of size {n}: at least one step is needed")
    wide = accumulator(start)
    basis = torch.empty(m, n, dtype=start.dtype, device=start.device)  # (m, n), rows orthonormal
    alpha = torch.zeros(m, dtype=wide, device=start.device)
    beta = torch.zeros(m + 1, dtype=wide, device=start.device)
    beta[m] = norm(start)
    q = start / beta[m].to(start.dtype)
    for j in range(m):
        basis[j] = q
        w = matvec(q)
        alpha[j] = torch.sum(q * w, dtype=wide)
        known = basis[: j + 1]
        w = w - (known @ w) @ known
        w = w - (known @ w) @ known  # twice is enough (Parlett); once loses all orthogonality at n = 270k
        beta[j] = norm(w)
        q = w / beta[j].to(w.dtype).clamp_min(torch.finfo(w.dtype).tiny)  # 0 / 0 would make products of NaN
        if tol is not None and j + 1 < m and (j + 1) % check_every == 0:
            so_far = _solve(alpha[: j + 1], beta[: j + 1], basis[: j + 1], n)
            if so_far.exhausted or max(so_far.residuals[0], so_far.residuals[-1]) <= tol * so_far.epsilon:
                return so_far
    return _solve(alpha, beta[:m], basis, n)


def accumulator(like: Tensor) -> torch.dtype:
    """The dtype for norms and dots: float32 sums lose digits at n >= 1e7. MPS has no float64."""
    return torch.float32 if like.device.type == "mps" else torch.float64


def norm(x: Tensor) -> Tensor:
    """Euclidean norm, accumulated wide, left on the device."""
    return torch.linalg.vector_norm(x, dtype=accumulator(x))


def _solve(alpha_: Tensor, beta_: Tensor, basis: Tensor, n: int) -> Spectrum:
    eps = float(torch.finfo(basis.dtype).eps)
    alpha, beta = torch.stack([alpha_, beta_]).cpu().double().numpy()  # the one synchronisation
    finite = np.isfinite(alpha) & np.isfinite(beta)
    k = len(alpha) if finite.all() else int(np.argmin(finite))
    if k == 0:
        raise FloatingPointError("lanczos: the first matrix-vector product (or the start vector) is not finite")
    # An invariant subspace was found where beta vanishes beside what came before: what follows is rounding noise.
    scale = np.maximum.accumulate(np.abs(alpha[:k]) + beta[:k])
    small = beta[:k] <= np.sqrt(n) * eps * scale
    exhausted = bool(small.any()) or k == n
    if small.any():
        k = int(np.argmax(small)) + 1
    theta, s = scipy.linalg.eigh_tridiagonal(alpha[:k], beta[: k - 1])
    epsilon = np.abs(theta).max()
    rounding = 8 * eps * epsilon  # the products themselves are rounded: no bound is better than this
    tail = 0.0 if exhausted and k == n else beta[k - 1]
    return Spectrum(
        ritz_values=theta,
        residuals=np.abs(tail * s[-1]) + rounding,
        weights=s[0] ** 2,
        basis=basis[:k],
        coefficients=s,
        exhausted=exhausted,
        dim=n,
    )

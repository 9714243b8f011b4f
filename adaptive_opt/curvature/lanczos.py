"""The Lanczos iteration with full reorthogonalisation (Lanczos, 1950; Golub and Van Loan, Matrix Computations, ch. 10)."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from scipy.linalg import get_lapack_funcs
from torch import Tensor

from adaptive_opt.curvature.basis import Basis
from adaptive_opt.curvature.questions import Question, next_look
from adaptive_opt.curvature.vectors import Total, accumulator, dot, entries, negligible, norm, waits

Matvec = Callable[[Tensor], Tensor]
SETTLED = 4.0  # roundings of a unit vector: an overlap with the basis below is none
(_stevd,) = get_lapack_funcs(("stevd",), dtype=np.float64)


class Vectors(Protocol):
    """The Krylov basis, wherever and however it is kept."""

    def combine(self, coefficients: Tensor) -> Tensor:
        """(k,) coefficients -> (n,) vector."""
        ...

    def orthogonality(self) -> Tensor:
        """Largest |q_i'q_j - (i = j)| known of."""
        ...


@dataclass(frozen=True)
class Spectrum:
    """What k Lanczos steps know about a symmetric (n, n) operator A from one start vector."""

    ritz_values: np.ndarray  # (k,), ascending: eigenvalues of A restricted to the Krylov space
    residuals: np.ndarray  # (k,): some eigenvalue of A lies within residuals[i] of ritz_values[i]
    weights: np.ndarray  # (k,), sum 1: weight of each Ritz value in the start vector's quadrature; (0,) after a restart
    coefficients: np.ndarray  # (j, k): column i holds Ritz vector i in the basis of j vectors
    vectors: Vectors  # that basis
    exhausted: bool  # the Krylov space is invariant: every Ritz value is an eigenvalue
    dim: int  # n
    products: int  # with A
    asymmetry: float = 0.0  # norm of what A did that no symmetric operator does; already within the residuals
    method: str = "full"  # how the basis was kept: "full", "half", "host", "restarted", "two-pass", "block", "shared"
    block: int = 1  # start vectors

    @property
    def epsilon(self) -> float:
        """Largest Ritz magnitude: a lower bound on A's largest eigenvalue magnitude."""
        return float(np.abs(self.ritz_values).max())

    @property
    def orthogonality(self) -> float:
        """Largest entry of |Q Q' - I|: how far the basis, as it was kept, is from orthonormal. Costs a pass over it."""
        return float(self.vectors.orthogonality())

    def ritz_vector(self, index: int) -> Tensor:
        """The Ritz vector of `ritz_values[index]`, shape (n,), unit length up to rounding.

        After a two-pass run this is the second pass: it costs as many products as the first.
        """
        return self.vectors.combine(torch.as_tensor(self.coefficients[:, index]))


def lanczos(
    matvec: Matvec,
    start: Tensor,
    num_steps: int,
    *,
    until: Question | None = None,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
    total: Total | None = None,
) -> Spectrum:
    """Run at most `num_steps` products of a symmetric operator from `start` and solve the tridiagonal problem.

    `matvec` maps an (n,) tensor to an (n,) tensor on the same device. Alpha and beta stay on the device; the host is
    synchronised once, at the end. With `until` (see questions.py) the run ends when the question is answered: it is asked
    after every step on the CPU, where nothing waits, and every two to four steps elsewhere, a synchronisation each. `dtype`
    and `device` say how the basis is kept where that is not as `start` is: in half precision, on the host. `total`: this
    process has some entries of every vector (shared_lanczos.py). Raises ValueError on a step count that cannot be used, and
    FloatingPointError when the start vector or the first product is not finite.
    """
    n = entries(start, total)
    m = min(num_steps, n)
    if m < 1:
        raise ValueError(f"lanczos(num_steps={num_steps}) on an operator of size {n}: at least one step is needed")
    basis = Basis(m + 1, start, dtype, device, total)  # the last row is room to work in
    steps = torch.zeros(3, m, dtype=accumulator(start), device=start.device)
    alpha, beta, defect = steps
    look, before = next_look(0) if until is not None else m, None
    q = torch.div(start, norm(start, total).to(start.dtype), out=basis.room())
    for j in range(m):
        basis.append(q)
        p = matvec(q)
        alpha[j] = dot(q, p) if total is None else total(dot(q, p))
        # not in place: matvec may have returned q itself
        w = torch.addcmul(p, q, alpha[j].to(q.dtype), value=-1, out=basis.room())
        del p
        if before is not None:
            w.addcmul_(before, beta[j - 1].to(w.dtype), value=-1)
        defect[j], beta[j] = orthogonalise(w, basis)
        before, q = q, w.div_(beta[j].to(w.dtype).clamp_min(torch.finfo(w.dtype).tiny))  # 0 / 0 would make NaN
        if until is not None and j + 1 == look < m:
            known = steps[:, : j + 1].cpu().double().numpy()
            so_far = _spectrum(known, basis, n)
            excess = until(so_far)
            if so_far.exhausted or excess <= 1 or len(so_far.ritz_values) <= j:  # the last: no longer finite
                break
            look = next_look(j + 1, excess, until(_spectrum(known[:, :-1], basis, n))) if waits(start) else j + 2
    else:
        so_far = _spectrum(steps.cpu().double().numpy(), basis, n)  # the one synchronisation
    basis.size = len(so_far.ritz_values)  # what follows an exhausted space is noise
    return so_far


def orthogonalise(w: Tensor, basis: Basis) -> tuple[Tensor, Tensor]:
    """Take the basis out of w, in place; returns the norm of what a symmetric operator would not have put there, and w's."""
    first = basis.dots(w)
    left = basis.remove_then_dots(first, w)
    size = norm(w, basis.total)
    # twice is enough (Parlett), and often once: where looking is free, the second time is spared when nothing was left
    if waits(w) or float(left.norm()) > SETTLED * torch.finfo(w.dtype).eps * float(size):
        basis.remove(left, w)
        size = norm(w, basis.total)
    return first.norm(), size


def _spectrum(steps: np.ndarray, basis: Basis, n: int) -> Spectrum:
    alpha, beta, defect = steps
    eps = float(torch.finfo(basis.like.dtype).eps)
    k, exhausted = usable(alpha, beta, n, eps)
    same = basis.rows.dtype == basis.like.dtype
    theta, s, residuals = ritz(alpha[:k], beta[:k], n if same else 0, eps)  # rounded rows leave something of any space
    asymmetry = float(np.linalg.norm(defect[:k]))
    return Spectrum(
        ritz_values=theta,
        residuals=residuals + asymmetry,
        weights=s[0] ** 2,
        coefficients=s,
        vectors=basis,
        exhausted=exhausted,
        dim=n,
        products=len(alpha),
        asymmetry=asymmetry,
        method="full" if basis.as_made else "half" if basis.rows.dtype != basis.like.dtype else "host",
    )


def usable(alpha: np.ndarray, beta: np.ndarray, n: int, eps: float) -> tuple[int, bool]:
    """How many steps mean something, and whether they end in an invariant subspace."""
    finite = np.isfinite(alpha) & np.isfinite(beta)
    k = len(alpha) if finite.all() else int(np.argmin(finite))
    if k == 0:
        raise FloatingPointError("lanczos: the first matrix-vector product (or the start vector) is not finite")
    # An invariant subspace was found where beta vanishes beside what came before: what follows is rounding noise.
    scale = np.maximum.accumulate(np.abs(alpha[:k]) + beta[:k])
    small = beta[:k] <= negligible(n, eps) * scale
    return (int(np.argmax(small)) + 1, True) if small.any() else (k, k == n)


def ritz(alpha: np.ndarray, beta: np.ndarray, n: int, eps: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Values (k,), coefficients (k, k) and residual bounds |beta_k s_ki| (k,) of a tridiagonal matrix."""
    theta, s, failed = _stevd(alpha, beta[: max(len(alpha) - 1, 1)])  # as eigh_tridiagonal, without its checks
    if failed:
        raise np.linalg.LinAlgError(f"stevd failed on a tridiagonal matrix of size {len(alpha)} ({failed})")
    rounding = 8 * eps * np.abs(theta).max()  # the products themselves are rounded: no bound is better than this
    tail = 0.0 if len(alpha) == n else beta[-1]
    return theta, s, np.abs(tail * s[-1]) + rounding

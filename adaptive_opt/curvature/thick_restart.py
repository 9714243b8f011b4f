"""Thick-restart Lanczos: many steps in a small basis (Wu and Simon, 2000)."""

import numpy as np
import torch
from torch import Tensor

from adaptive_opt.curvature.basis import Basis
from adaptive_opt.curvature.lanczos import Matvec, Spectrum
from adaptive_opt.curvature.questions import Question
from adaptive_opt.curvature.vectors import accumulator, dot, negligible, norm


def thick_restart_lanczos(
    matvec: Matvec,
    start: Tensor,
    num_steps: int,
    basis_size: int,
    *,
    until: Question | None = None,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
) -> Spectrum:
    """At most `num_steps` products with never more than `basis_size` vectors: full ones are compressed to their end Ritz pairs.

    The host is synchronised once a restart, and `until` is asked then. Of the Spectrum, both ends, their residuals and the
    count below a threshold hold as in `lanczos`; there is no quadrature any more after a restart (`weights` is empty). Raises
    ValueError on a basis of fewer than four vectors, and as `lanczos` does.
    """
    n = start.numel()
    if min(num_steps, n) < 1:
        raise ValueError(
            f"thick_restart_lanczos(num_steps={num_steps}) on an operator of size {n}: at least one step is needed"
        )
    b = min(basis_size, n)
    if b < min(4, n):
        raise ValueError(f"thick_restart_lanczos(basis_size={basis_size}): four vectors at least, or nothing can be kept")
    basis = Basis(b, start, dtype, device)
    wide = accumulator(start)
    q = start / norm(start).to(start.dtype)
    kept, coupling = np.zeros(0), np.zeros(0)
    products, asymmetry = 0, 0.0
    while True:
        k, last = len(kept), min(b, len(kept) + num_steps - products)
        steps = torch.zeros(3, last, dtype=wide, device=start.device)
        alpha, beta, defect = steps
        tie = torch.as_tensor(coupling, dtype=wide, device=start.device)  # (k,): A q against the kept Ritz vectors
        for j in range(k, last):
            basis.append(q)
            w = torch.clone(matvec(q))
            alpha[j] = dot(q, w)
            found = basis.dots(w)
            unexpected = found[:j].clone()  # w holds what couples the first new vector to the kept, and the others to the last
            if j == k:
                unexpected -= tie
            else:
                unexpected[-1] -= beta[j - 1]
            defect[j] = unexpected.norm()
            basis.remove(found, w)
            basis.remove(basis.dots(w), w)
            beta[j] = norm(w)
            q = w.div_(beta[j].to(w.dtype).clamp_min(torch.finfo(w.dtype).tiny))
        products += last - k
        known = steps.cpu().double().numpy()  # the one synchronisation of this restart
        spectrum = _spectrum(known, kept, coupling, basis, products, asymmetry)
        asymmetry = spectrum.asymmetry
        answered = until is not None and until(spectrum) <= 1
        if spectrum.exhausted or answered or products >= num_steps or len(spectrum.ritz_values) < last:
            basis.size = len(spectrum.ritz_values)  # fewer than `last`: a product was not finite
            return spectrum
        # the pairs nearest to both ends, at most half of the basis: the rest is room to grow
        few = max(b // 2, 1)
        ends = sorted({*range((few + 1) // 2), *range(last - few // 2, last)})
        kept = spectrum.ritz_values[ends]
        coupling = known[1, last - 1] * spectrum.coefficients[-1, ends]
        basis.replace(torch.as_tensor(spectrum.coefficients[:, ends].T))


def _spectrum(
    steps: np.ndarray, kept: np.ndarray, coupling: np.ndarray, basis: Basis, products: int, asymmetry: float
) -> Spectrum:
    alpha, beta, defect = steps
    n, eps, k = basis.rows.shape[1], float(torch.finfo(basis.like.dtype).eps), len(kept)
    finite = np.isfinite(alpha) & np.isfinite(beta)
    size = len(alpha) if finite.all() else int(np.argmin(finite))
    if size == 0:
        raise FloatingPointError("thick_restart_lanczos: a matrix-vector product (or the start vector) is not finite")
    scale = max(np.abs(alpha[:size]).max(), np.abs(kept).max(initial=0.0)) + beta[k:size].max(initial=0.0)
    small = np.flatnonzero(beta[k:size] <= negligible(n, eps) * scale)
    exhausted = len(small) > 0 or size == n
    size = k + int(small[0]) + 1 if len(small) else size
    t = np.diag(np.concatenate([kept, alpha[k:size]]))
    if size > k:  # else the first product after a restart was not finite, and the kept pairs are what is known
        t[:k, k] = t[k, :k] = coupling
    for j in range(k, size - 1):
        t[j, j + 1] = t[j + 1, j] = beta[j]
    theta, s = np.linalg.eigh(t)
    same = basis.rows.dtype == basis.like.dtype
    # rows that are kept rounded are Ritz vectors only up to that, twice on the way through A and theta
    of_rows = 0.0 if same or k == 0 else float(torch.finfo(basis.rows.dtype).eps) * np.sqrt(k)
    rounding = (8 * eps + of_rows) * np.abs(theta).max()
    tail = coupling if size == k else s[-1] * (0.0 if size == n and same else beta[size - 1])
    asymmetry = float(np.hypot(asymmetry, np.linalg.norm(defect[k:size])))
    return Spectrum(
        ritz_values=theta,
        residuals=np.abs(tail) + rounding + asymmetry,
        weights=s[0] ** 2 if k == 0 else np.zeros(0),
        coefficients=s,
        vectors=basis,
        exhausted=exhausted,
        dim=n,
        products=products,
        asymmetry=asymmetry,
        method="full" if k == 0 else "restarted",
    )

"""Block Lanczos with full reorthogonalisation: for ends whose eigenvalues come in clusters (Golub and Underwood, 1977)."""

import numpy as np
import torch
from torch import Tensor

from adaptive_opt.curvature.basis import Basis
from adaptive_opt.curvature.lanczos import Matvec, Spectrum
from adaptive_opt.curvature.vectors import accumulator


def block_lanczos(matvec: Matvec, start: Tensor, num_blocks: int) -> Spectrum:
    """`num_blocks` times as many products as `start`, (b, n), has rows; finds eigenvalues of multiplicity up to b.

    One vector sees each eigenvalue once, however often it occurs; b vectors see up to b copies, and part eigenvalues that lie
    close together earlier. The weights are those of the mean quadrature of the b orthonormalised start vectors. The host is
    synchronised once, at the end. Raises ValueError when the blocks do not fit into the space, FloatingPointError when a
    product is not finite.
    """
    b, n = start.shape
    m = min(num_blocks, n // b)
    if m < 1:
        raise ValueError(f"block_lanczos(start of shape {(b, n)}, num_blocks={num_blocks}): one block must fit into the space")
    wide = accumulator(start)
    basis = Basis(m * b, start[0])
    t = torch.zeros(m * b, m * b, dtype=wide, device=start.device)  # Q A Q'
    q, _ = _orthonormal(start, basis)
    r = torch.zeros(b, b, dtype=wide, device=start.device)
    for j in range(m):
        for row in q:
            basis.append(row)
        w = torch.stack([matvec(row) for row in q])  # (b, n)
        for i, row in enumerate(w):
            t[: basis.size, j * b + i] = basis.dots(row)
        q, r = _orthonormal(w, basis)
    return _spectrum(t.cpu().double().numpy(), r.cpu().double().numpy(), b, basis)


def _orthonormal(w: Tensor, basis: Basis) -> tuple[Tensor, Tensor]:
    """Orthonormal rows q, orthogonal to the basis too, with w = r q + what lies in the basis; a missing rank is filled up."""
    w = w.clone()
    r = torch.eye(len(w), dtype=w.dtype, device=w.device)
    for _ in range(2):  # what fills up a missing rank is orthogonal to nothing before the second time
        if basis.size:
            for row in w:
                basis.remove(basis.dots(row), row)
                basis.remove(basis.dots(row), row)
        q, upper = torch.linalg.qr(w.T)
        w, r = q.T.contiguous(), r @ upper.T
    return w, r.to(accumulator(w))


def _spectrum(t: np.ndarray, r: np.ndarray, b: int, basis: Basis) -> Spectrum:
    n, eps, m = basis.rows.shape[1], float(torch.finfo(basis.like.dtype).eps), len(t) // b
    if not (np.isfinite(t).all() and np.isfinite(r).all()):
        raise FloatingPointError("block_lanczos: a matrix-vector product (or the start block) is not finite")
    upper = np.triu(t)
    symmetric = upper + np.triu(t, 1).T
    band = np.abs(np.subtract.outer(np.arange(m * b) // b, np.arange(m * b) // b)) <= 1
    defect = np.linalg.norm(np.where(band, 0.0, symmetric))  # a symmetric operator couples neighbouring blocks alone
    projected = np.where(band, symmetric, 0.0)
    theta, s = np.linalg.eigh(projected)
    rounding = 8 * eps * np.abs(theta).max()
    tail = np.linalg.norm(r.T @ s[-b:], axis=0) if m * b < n else np.zeros(len(theta))
    scale = max(np.abs(theta).max(), np.finfo(float).tiny)
    return Spectrum(
        ritz_values=theta,
        residuals=tail + rounding + defect,
        weights=(s[:b] ** 2).sum(0) / b,
        coefficients=s,
        vectors=basis,
        exhausted=bool(np.linalg.norm(r) <= np.sqrt(n) * eps * scale) or m * b == n,
        dim=n,
        products=m * b,
        asymmetry=float(defect),
        method="block",
    )

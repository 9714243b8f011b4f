"""Block Lanczos with full reorthogonalisation: for ends whose eigenvalues come in clusters (Golub and Underwood, 1977).

The blocks are built a row at a time (Ruhe, 1979): a row that is missing to a block's rank is replaced, and the run goes on.
"""

import numpy as np
import torch
from torch import Tensor

from adaptive_opt.curvature.basis import Basis
from adaptive_opt.curvature.lanczos import Matvec, Spectrum
from adaptive_opt.curvature.subspace import extend
from adaptive_opt.curvature.vectors import accumulator, negligible, norm


def block_lanczos(matvec: Matvec, start: Tensor, num_blocks: int) -> Spectrum:
    """`num_blocks` times as many products as `start`, (b, n), has rows; finds eigenvalues of multiplicity up to b.

    One vector sees each eigenvalue once, however often it occurs; b vectors see up to b copies, and part eigenvalues that lie
    close together earlier. The weights are those of the mean quadrature of the b orthonormalised start vectors; start vectors
    that depend on the others are replaced by random ones. Keeps (num_blocks + 1) b + 4 vectors. The host is synchronised once,
    at the end. Raises ValueError when no block fits into the space, FloatingPointError when the start block vanishes, or it or
    the first product is not finite; a later one that is not finite shortens the run.
    """
    b, n = start.shape
    m = min(num_blocks, n // b) * b if b else 0  # products
    if m < 1:
        raise ValueError(f"block_lanczos(start of shape {(b, n)}, num_blocks={num_blocks}): one block must fit into the space")
    basis = Basis(min(m + b, n), start[0])
    sizes = torch.stack([norm(row) for row in start])
    for row in start:
        extend(basis, row)
    t = torch.zeros(m + b, m, dtype=accumulator(start), device=start.device)  # A Q_m = Q_(m+b) t
    for j in range(m):
        w = matvec(basis.rows[j])
        k = basis.size
        if k < n:
            t[:k, j], t[k, j] = extend(basis, w)
        else:
            t[:k, j] = basis.dots(w)
    known = torch.cat([sizes, t.flatten()]).cpu().double().numpy()  # the one synchronisation
    return _spectrum(known[b:].reshape(m + b, m), known[:b], basis)


def _spectrum(t: np.ndarray, sizes: np.ndarray, basis: Basis) -> Spectrum:
    n, eps, b = basis.rows.shape[1], float(torch.finfo(basis.like.dtype).eps), len(sizes)
    finite = np.isfinite(t).all(0)
    k = t.shape[1] if finite.all() else int(np.argmin(finite))
    if k == 0 or not np.isfinite(sizes).all() or not sizes.any():
        raise FloatingPointError(
            "block_lanczos: the first matrix-vector product is not finite, or the start block is not or is 0"
        )
    projected, below = t[:k, :k], t[k:, :k]  # A Q_k = Q_k projected + rows beyond
    theta, s = np.linalg.eigh((projected + projected.T) / 2)
    asymmetry = float(np.linalg.norm(projected - projected.T)) / 2
    rounding = 8 * eps * np.abs(theta).max()
    tail = np.linalg.norm(below @ s, axis=0) if k < n else np.zeros(k)
    basis.size = k
    return Spectrum(
        ritz_values=theta,
        residuals=tail + rounding + asymmetry,
        weights=(s[:b] ** 2).sum(0) / min(b, k),
        coefficients=s,
        vectors=basis,
        exhausted=k == n or bool(np.linalg.norm(below) <= negligible(n, eps) * np.abs(theta).max()),
        dim=n,
        products=t.shape[1],
        asymmetry=asymmetry,
        method="block",
        block=b,
    )

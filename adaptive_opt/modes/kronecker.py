"""Pure maths of Kronecker-factored preconditioning (Martens and Grosse, 2015; George et al., 2018; Vyas et al., 2024)."""

from __future__ import annotations

import torch
from torch import Tensor


def as_matrix(x: Tensor) -> Tensor:
    """A weight as (out, fan_in): convolution kernels are flattened behind their first dimension."""
    return x.reshape(x.shape[0], -1)


def eigenbasis(factor: Tensor) -> tuple[Tensor, Tensor]:
    """(eigenvalues ascending, orthonormal columns Q) of a symmetric factor, by eigh in the factor's own precision.

    When that fails it is tried again in float64, and then with 1e-6 of the mean eigenvalue added to the diagonal. Raises
    RuntimeError (torch.linalg.LinAlgError is one) when that fails too: the caller keeps the basis it had.
    """
    try:
        values, Q = torch.linalg.eigh(factor)
    except RuntimeError:
        wide = factor.double()
        try:
            values, Q = torch.linalg.eigh(wide)
        except RuntimeError:
            values, Q = torch.linalg.eigh(wide + 1e-6 * wide.diagonal().mean() * torch.eye(len(wide)).to(wide))
    return values.clamp_min(0).to(factor.dtype), Q.to(factor.dtype)


def orthogonal_iteration(factor: Tensor, Q: Tensor) -> tuple[Tensor, Tensor]:
    """(Rayleigh quotients, Q): one step of QR power iteration from the basis Q (Vyas et al., 2024, algorithm 4).

    Raises RuntimeError when the outcome is not finite.
    """
    power = factor @ Q
    largest_first = (Q * power).sum(0).argsort(descending=True)  # Gram-Schmidt keeps the first column's direction best
    Q = torch.linalg.qr(power[:, largest_first])[0]
    values = (Q * (factor @ Q)).sum(0)
    if not bool(torch.isfinite(values).all()):
        raise RuntimeError("orthogonal_iteration: the factor is not finite")
    return values.clamp_min(0), Q


def rotate(X: Tensor, QL: Tensor | None, QR: Tensor | None) -> Tensor:
    """QL' X QR: into the eigenbasis. A side that is None stays."""
    X = X if QL is None else QL.T @ X
    return X if QR is None else X @ QR


def rotate_back(X: Tensor, QL: Tensor | None, QR: Tensor | None) -> Tensor:
    """QL X QR': out of the eigenbasis."""
    X = X if QL is None else QL @ X
    return X if QR is None else X @ QR.T


def change(old: Tensor | None, new: Tensor | None) -> Tensor | None:
    """T with x_new = T' x_old for coordinates in the two bases; None is the parameters' own basis."""
    if new is None:
        return None if old is None else old.T
    return new if old is None else old.T @ new


def variances(factor: Tensor, Q: Tensor | None) -> Tensor:
    """diag(Q' F Q): what the factor says of the second moment along each vector of the basis."""
    return factor.diagonal() if Q is None else (Q * (factor @ Q)).sum(0).clamp_min(0)


def correction(T: Tensor, before: Tensor, after: Tensor) -> Tensor:
    """What the squared rotation (T*T)' gets wrong in a second moment, by what the factor knows of both bases.

    (T*T)'v takes the entries of a gradient for uncorrelated. The factor has their correlations: it says `before` along the
    old basis and `after` along the new one, where the squared rotation of `before` would say otherwise. 1 where the factor
    is diagonal, where nothing turns, and where all it has is rounding (units that are dead): a quotient of two roundings,
    once a change of basis, grows without bound. Never above the number of rows (Cauchy-Schwarz).
    """
    implied = (T * T).T @ before
    rounding = len(T) * torch.finfo(after.dtype).eps * after.max() + torch.finfo(after.dtype).tiny
    return ((after + rounding) / (implied + rounding)).clamp_max(len(T))


def damped_inverse(left: Tensor, right: Tensor, damping: float) -> Tensor:
    """1 / ((l + gamma_l) (r + gamma_r)'), the inverse that the factors' eigenvalues imply, damped with the pi-split.

    lambda = damping * mean(l) * mean(r) is shared out by pi = sqrt(mean(r) / mean(l)) (Martens and Grosse, 2015, section
    6.3): gamma_l = sqrt(lambda) / pi = sqrt(damping) * mean(l), gamma_r = sqrt(lambda) * pi = sqrt(damping) * mean(r).
    Relative, so that 1 is what is returned where all eigenvalues are equal and damping is 0.
    """
    return 1 / torch.outer(_relative(left) + damping**0.5, _relative(right) + damping**0.5)


def damped_rescaling(second_moment: Tensor, damping: float) -> Tensor:
    """1 / (S + damping * mean(S)) * mean(S): EKFAC's inverse, its eigenvalues measured in the basis (George et al., 2018)."""
    return 1 / (_relative(second_moment) + damping)


def whitening(values: Tensor, damping: float) -> Tensor:
    """(l / mean(l) + damping)^-1/2, for one side alone (ASGO: An et al., 2025)."""
    return (_relative(values) + damping).rsqrt()


def with_norm_of(D: Tensor, s: Tensor) -> Tensor:
    """D at the length of s (grafting: Agarwal et al., 2020)."""
    return D * (s.norm() / D.norm().clamp_min(torch.finfo(D.dtype).tiny))


def _relative(values: Tensor) -> Tensor:
    return values / values.mean().clamp_min(torch.finfo(values.dtype).tiny)

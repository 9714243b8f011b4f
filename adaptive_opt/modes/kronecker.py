"""Pure maths of Kronecker-factored preconditioning (Martens and Grosse, 2015; George et al., 2018; Vyas et al., 2024)."""

from __future__ import annotations

import torch
from torch import Tensor


def as_matrix(x: Tensor) -> Tensor:
    """A weight as (out, fan_in): convolution kernels are flattened behind their first dimension."""
    return x.reshape(x.shape[0], -1)


def eigenbasis(factor: Tensor) -> tuple[Tensor, Tensor]:
    """(eigenvalues ascending, orthonormal columns Q) of a symmetric factor; retried in float64 when float32 fails.

    Raises torch.linalg.LinAlgError (a RuntimeError) when that fails too: the caller keeps the basis it had.
    """
    try:
        values, Q = torch.linalg.eigh(factor)
    except RuntimeError:  # torch.linalg.LinAlgError is one
        values, Q = torch.linalg.eigh(factor.double())
    return values.clamp_min(0).to(factor.dtype), Q.to(factor.dtype)


def rotate(X: Tensor, QL: Tensor | None, QR: Tensor | None) -> Tensor:
    """QL' X QR: into the eigenbasis. A side that is None stays."""
    X = X if QL is None else QL.T @ X
    return X if QR is None else X @ QR


def rotate_back(X: Tensor, QL: Tensor | None, QR: Tensor | None) -> Tensor:
    """QL X QR': out of the eigenbasis."""
    X = X if QL is None else QL @ X
    return X if QR is None else X @ QR.T


def change(old: Tensor | None, new: Tensor | None) -> Tensor | None:
    """T with x_new = T' x_old for coordinates in the two bases."""
    if new is None:
        return None
    return new if old is None else old.T @ new


def second_moment(left: Tensor, right: Tensor) -> Tensor:
    """v = l r' / trace: the elementwise second moment that the factors' eigenvalues imply (as Adafactor's, in the basis)."""
    return torch.outer(left, right) / left.sum().clamp_min(torch.finfo(left.dtype).tiny)

"""Rayleigh-Ritz: the most that a few products, whatever they were made for, say of the largest eigenvalue (Parlett, ch. 11)."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from adaptive_opt.curvature.vectors import PIECE, accumulator, norm, pieces, waits

SUMMED = 1 << 13  # entries that float32 adds up to a millionth


@dataclass(frozen=True)
class RitzPair:
    """An approximate eigenpair: some eigenvalue lies within `residual` of `value`."""

    value: float
    residual: float
    vector: Tensor  # (n,), unit length


def top_ritz_pair(vectors: Sequence[Tensor], images: Sequence[Tensor]) -> RitzPair | None:
    """The largest Ritz value on the span of `vectors`, (n,) each, whose products with A are `images`; None if all vanish.

    A lower bound on A's largest eigenvalue, and the best one on that span. Directions that the others all but contain are left
    out: their products are known to few digits. Two host synchronisations.
    """
    s, m = _gram(vectors, images).cpu().double()
    length = s.diagonal().sqrt()
    scale = torch.where((length > 0) & length.isfinite(), 1 / length, 0.0)
    sizes, q = torch.linalg.eigh(torch.nan_to_num(scale[:, None] * s * scale))
    kept = sizes > 100 * torch.finfo(vectors[0].dtype).eps  # below that, more digits are lost than the products have
    if not bool(kept.any()) or not bool(m.isfinite().all()):
        return None
    w = scale[:, None] * q[:, kept] / sizes[kept].sqrt()  # (k, rank): w' X is orthonormal
    projected = w.T @ m @ w
    theta, c = torch.linalg.eigh((projected + projected.T) / 2)
    combination = (w @ c[:, -1]).tolist()
    y, Ay = _combined(vectors, combination), _combined(images, combination)
    value = float(theta[-1])
    rounding = 8 * torch.finfo(y.dtype).eps * float(theta.abs().max())
    return RitzPair(value, float(norm(Ay.sub_(y, alpha=value))) + rounding, y)


def _gram(vectors: Sequence[Tensor], images: Sequence[Tensor]) -> Tensor:
    """X X' and X (A X)', (2, k, k), accumulated wide.

    On the host in pieces that are short enough to be summed as they are: widening the vectors first took five times as
    long (1.9 for 10.6 ms of one core at k = 7, n = 2e5; the same to 5e-8). Elsewhere every piece is a launch.
    """
    k, like = len(vectors), vectors[0]
    wide = accumulator(like)
    gram = torch.zeros(k, 2 * k, dtype=wide, device=like.device)
    short = not waits(like) and like.dtype in (torch.float32, torch.float64)
    for piece in pieces(like.numel(), SUMMED if short else PIECE):
        X = torch.stack([v[piece] for v in (*vectors, *images)])
        X = X if short else X.to(wide)
        gram += X[:k] @ X.T
    return gram.unflatten(1, (2, k)).transpose(0, 1)


def _combined(vectors: Sequence[Tensor], coefficients: Sequence[float]) -> Tensor:
    total = coefficients[0] * vectors[0]
    for c, v in zip(coefficients[1:], vectors[1:], strict=True):
        total.add_(v, alpha=c)
    return total

"""Growing an orthonormal set by any vectors, and all products between two sets."""

import torch
from torch import Tensor

from adaptive_opt.curvature.basis import Basis
from adaptive_opt.curvature.vectors import PIECE, accumulator, norm, pieces


def extend(basis: Basis, y: Tensor) -> tuple[Tensor, Tensor]:
    """Append the direction in which y, (n,), leaves the basis. Returns (c, length) with y = rows'c + length * the new row.

    A y inside of the basis appends a direction drawn from a fixed seed, with length 0; the space must have room for it.
    """
    wide, tiny = accumulator(y), torch.finfo(y.dtype).tiny
    known = norm(y)
    y = y.clone()
    c = basis.dots(y) if basis.size else torch.zeros(0, dtype=wide, device=y.device)
    if basis.size:
        basis.remove(c, y)
    length = norm(y)
    inside = length <= 4 * torch.finfo(y.dtype).eps * known  # the rounding of the subtraction
    spare = torch.randn(y.shape, generator=torch.Generator(y.device).manual_seed(basis.size), dtype=y.dtype, device=y.device)
    spare.div_(norm(spare).to(y.dtype))
    q = torch.where(inside, spare, y.div_(length.to(y.dtype).clamp_min(tiny)), out=y)
    length = torch.where(inside, torch.zeros_like(length), length)
    if basis.size:
        for _ in range(2):  # what the first time left is large beside a y that was all but inside
            more = basis.dots(q)
            basis.remove(more, q)
            c = c + length * more
    rest = norm(q)
    basis.append(q.div_(rest.to(q.dtype)))
    return c, length * rest


def between(x: Tensor, y: Tensor) -> Tensor:
    """x y' for x (j, n) and y (k, n), accumulated wide, left on the device."""
    wide = accumulator(x)
    total = torch.zeros(len(x), len(y), dtype=wide, device=x.device)
    for s in pieces(x.shape[1], max(PIECE // (len(x) + len(y)), 1)):  # entries at a time, of all rows together
        total += x[:, s].to(wide) @ y[:, s].to(wide).T
    return total

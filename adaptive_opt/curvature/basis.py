"""Rows of an orthonormal set, kept as they are, in half precision, or on another device."""

from collections.abc import Iterator

import torch
from torch import Tensor

from adaptive_opt.curvature.vectors import PIECE, Total, accumulator, pieces


class Basis:
    """Up to `capacity` orthonormal (n,) vectors. Rows of another dtype or device are widened piece by piece when used.

    `dtype=torch.float16` or `torch.bfloat16` halves the memory of a float32 run; `device="cpu"` keeps the rows on the host.
    `total` where each process has some columns of the rows.
    """

    def __init__(
        self,
        capacity: int,
        like: Tensor,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
        total: Total | None = None,
    ):
        self.like, self.size, self.total = like.new_empty(0), 0, total
        shape = (capacity, like.numel())
        self.rows = torch.empty(shape, dtype=dtype or like.dtype, device=device or like.device)
        self.as_made = self.rows.dtype == like.dtype and self.rows.device == like.device  # the run's own
        # entries of a unit vector are of size 1 / sqrt(n), which float16 holds with few digits or none
        self.scale = like.numel() ** 0.5 if self.rows.dtype == torch.float16 else 1.0

    def room(self) -> Tensor:
        """(n,) to make the next row in: that row itself where rows are kept as they are made."""
        return self.rows[self.size] if self.as_made else self.like.new_empty(self.rows.shape[1])

    def append(self, q: Tensor) -> None:
        row = self.rows[self.size]
        if q.data_ptr() != row.data_ptr():
            row.copy_(q if self.scale == 1 else q * self.scale)
        self.size += 1

    def dots(self, w: Tensor) -> Tensor:
        """(size,): each row times w, accumulated wide over the pieces."""
        return self._sum([self._wide(s) @ w[s] for s in self._pieces()])

    def remove(self, coefficients: Tensor, w: Tensor) -> None:
        """w -= rows' coefficients, in place."""
        c = (coefficients / self.scale).to(w.dtype)
        for s in self._pieces():
            w[s].addmv_(self._wide(s).T, c, alpha=-1)

    def remove_then_dots(self, coefficients: Tensor, w: Tensor) -> Tensor:
        """`remove`, then `dots` of what is left, while the rows' pieces are still in the cache."""
        c = (coefficients / self.scale).to(w.dtype)
        parts = []
        for s in self._pieces():
            rows = self._wide(s)
            parts.append(rows @ w[s].addmv_(rows.T, c, alpha=-1))
        return self._sum(parts)

    def _sum(self, parts: list[Tensor]) -> Tensor:
        wide = accumulator(self.like)
        total = parts[0].to(wide) if len(parts) == 1 else torch.stack(parts).sum(0, dtype=wide)
        total = total if self.total is None else self.total(total)
        return total if self.scale == 1 else total / self.scale

    def combine(self, coefficients: Tensor) -> Tensor:
        """rows' coefficients, (n,), of the first rows."""
        padded = coefficients.new_zeros(self.size)
        padded[: len(coefficients)] = -coefficients
        w = self.like.new_zeros(self.rows.shape[1])
        self.remove(padded.to(w.device), w)
        return w

    def replace(self, coefficients: Tensor) -> None:
        """Rows of coefficients @ rows, (k, size), in the place of the rows; no second basis is needed."""
        k = len(coefficients)
        c = coefficients.to(device=self.like.device, dtype=self.like.dtype)
        for s in pieces(self.rows.shape[1], max(PIECE // max(self.size, 1), 1)):  # what is made of a piece is k pieces
            self.rows[:k, s] = (c @ self._wide(s)).to(self.rows)
        self.size = k

    def orthogonality(self) -> Tensor:
        """Largest entry of |Q Q' - I|, on the device."""
        wide = accumulator(self.like)
        gram = torch.zeros(self.size, self.size, dtype=wide, device=self.like.device)
        for s in self._pieces():
            block = self._wide(s)
            gram += (block @ block.T).to(wide)
        gram = gram if self.total is None else self.total(gram)
        return (gram / self.scale**2 - torch.eye(self.size, dtype=wide, device=gram.device)).abs().max()

    def _pieces(self) -> Iterator[slice]:
        """All rows of a piece are widened together: they must not take more than one vector's piece does."""
        return pieces(self.rows.shape[1], PIECE if self.as_made else max(PIECE // max(self.size, 1), 1))

    def _wide(self, s: slice) -> Tensor:
        """Rows in the run's own dtype and device; a view where they already are."""
        rows = self.rows[: self.size, s]
        return rows if self.as_made else rows.to(self.like)

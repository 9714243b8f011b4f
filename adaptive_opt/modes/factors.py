"""The running Kronecker factors of one matrix, in square blocks on their diagonals, and the bases in use."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from adaptive_opt.modes import kronecker as kron

COSTLY = 64  # rows; of a larger block factor and basis change more rarely, in proportion (docs/evidence.md, "bench-modes")


@dataclass(eq=False)
class Block:
    """Rows start to stop of one side: the factor's diagonal block, its basis, and when that changes."""

    start: int
    stop: int
    factor: Tensor  # (b, b): running sum; `estimate` is the mean
    weight: float = 0.0  # of what went into it: the bias correction of the running mean
    Q: Tensor | None = None  # (b, b), columns orthonormal
    values: Tensor | None = None  # (b,): the factor's eigenvalues in this basis
    due: int = 0  # the step of the next change of basis

    @property
    def size(self) -> int:
        return self.stop - self.start

    @property
    def estimate(self) -> Tensor:
        """(b, b): the running mean with its bias corrected."""
        return self.factor / self.weight if self.weight else self.factor

    def add(self, X: Tensor, scale: float, beta: float) -> None:
        """One more observation: scale * X'X, X with one row a sample."""
        self.factor.addmm_(X.T, X, beta=beta, alpha=(1 - beta) * scale)
        self.weight = beta * self.weight + 1 - beta

    def solve(self, refine: bool) -> tuple[Tensor, Tensor] | None:
        """(eigenvalues, basis) of the factor as it is now; None where it has none."""
        try:
            if refine and self.Q is not None:
                return kron.orthogonal_iteration(self.factor, self.Q)
            return kron.eigenbasis(self.factor)
        except RuntimeError:  # not finite
            return None

    def turn(self, solved: Sequence[Tensor] | None) -> tuple[Tensor, Tensor] | None:
        """Into the basis that `solve` gave: (T, the correction of second moments), or None: it starts again."""
        if solved is None:  # keep the last basis and forget what went in
            self.factor.zero_()
            self.weight = 0.0
            return None
        old = self.Q
        before = kron.variances(self.factor, old)
        values, Q = solved
        self.values, self.Q = values, Q
        T = kron.change(old, Q)
        assert T is not None
        return T, kron.correction(T, before, values)

    def leave(self) -> tuple[Tensor, Tensor] | None:
        """Back to the parameters' own basis: (T, correction), or None when it never left."""
        if self.Q is None:
            return None
        T = self.Q.T
        out = T, kron.correction(T, kron.variances(self.factor, self.Q), self.factor.diagonal())
        self.Q = self.values = None
        return out


@dataclass(eq=False)
class Factors:
    """Both sides of a matrix of m rows and n columns. A side without blocks is not rotated."""

    left: list[Block]
    right: list[Block]
    tapped: bool = False  # from the layer's inputs and output gradients, not from the gradient
    note: str = ""  # why not from where they were wanted
    S: Tensor | None = None  # (m, n): second moment of samples' gradients in the basis (EKFAC)
    heard: bool = False  # the layer's hooks fired since the last step

    @classmethod
    def of(cls, matrix: Tensor, max_dim: int, max_blocks: int) -> Factors:
        """Empty factors for a matrix; a side of more than max_blocks * max_dim rows, or of one, is left alone."""
        m, n = matrix.shape

        def side(size: int) -> list[Block]:
            count = -(-size // max_dim)
            if size < 2 or count > max_blocks or min(m, n) < 2:
                return []
            edges = [size * i // count for i in range(count + 1)]
            return [Block(a, b, matrix.new_zeros(b - a, b - a)) for a, b in itertools.pairwise(edges)]

        return cls(side(m), side(n))

    @property
    def blocks(self) -> list[Block]:
        return [*self.left, *self.right]

    @property
    def turned(self) -> bool:
        return any(b.Q is not None for b in self.blocks)

    def observe(self, G: Tensor, beta: float, now: int) -> None:
        """One more gradient (m, n): L = E[G G'], R = E[G'G]. Large blocks see fewer of them, which weigh more."""
        for side, X in ((self.left, G.T), (self.right, G)):
            for b in side:
                k = seldom(b)
                if (now - b.due) % k == 0 or not b.weight:  # also where its basis is due
                    b.add(X if len(side) == 1 else X[:, b.start : b.stop], 1.0, beta**k)

    @property
    def complete(self) -> bool:
        """Every block has a basis."""
        return bool(self.left) and bool(self.right) and all(b.Q is not None for b in self.blocks)

    def rotate(self, X: Tensor) -> Tensor:
        """(m, n) into the basis."""
        return times(left_times(X, self.left), self.right)

    def rotate_back(self, X: Tensor) -> Tensor:
        """(m, n) out of the basis."""
        return times(left_times(X, self.left, back=True), self.right, back=True)

    def add_back(self, weight: Tensor, step: Tensor) -> None:
        """weight += the step (m, n) out of the basis; the last product adds itself to the weight where it can."""
        X = left_times(step, self.left, back=True)
        W = kron.as_matrix(weight) if weight.is_contiguous() and weight.dtype == X.dtype else None
        if W is None:
            weight.add_(times(X, self.right, back=True).to(weight.dtype).view(weight.shape))
        elif not self.right:
            W.add_(X)
        else:
            for b in self.right:
                into, part = W[:, b.start : b.stop], X[:, b.start : b.stop]
                into.add_(part) if b.Q is None else into.addmm_(part, b.Q.T)

    def state_dict(self) -> dict[str, Any]:
        return {**vars(self), "left": [dict(vars(b)) for b in self.left], "right": [dict(vars(b)) for b in self.right]}

    @classmethod
    def from_state_dict(cls, d: dict[str, Any]) -> Factors:
        return cls(**{**d, "left": [Block(**b) for b in d["left"]], "right": [Block(**b) for b in d["right"]]})


def spectrum(side: Sequence[Block]) -> Tensor | None:
    """(rows,): eigenvalues of a whole side; None until every block has a basis, and for a side that has no blocks."""
    parts = [b.values for b in side]
    return torch.cat([v for v in parts if v is not None]) if parts and all(v is not None for v in parts) else None


def share_out(blocks: Sequence[Block], now: int, every: int) -> None:
    """First changes of basis spread over the steps now + every - 1 to now + 2 every - 2, the costliest first.

    So no step has to bear them all; a basis of b rows costs b^3.
    """
    load = [0.0] * every
    for b in sorted(blocks, key=lambda b: -b.size):
        slot = load.index(min(load))
        load[slot] += float(b.size) ** 3
        b.due = now + every - 1 + slot


def seldom(block: Block) -> int:
    """How many times as rarely as a small block's this one's factor is updated, and its basis changes."""
    return max(1, round(block.size / COSTLY))


def interval(block: Block, every: int) -> int:
    """Steps between changes of one block's basis."""
    return every * seldom(block)


def left_times(X: Tensor, side: Sequence[Block], back: bool = False) -> Tensor:
    """Q' X for the block-diagonal Q of a side, or Q X."""
    if all(b.Q is None for b in side):
        return X
    if len(side) == 1 and (Q := side[0].Q) is not None:
        return torch.mm(Q if back else Q.T, X)
    out = torch.empty_like(X, memory_format=torch.contiguous_format)
    for b in side:
        part, into = X[b.start : b.stop], out[b.start : b.stop]
        into.copy_(part) if b.Q is None else torch.mm(b.Q if back else b.Q.T, part, out=into)
    return out


def times(X: Tensor, side: Sequence[Block], back: bool = False) -> Tensor:
    """X Q for the block-diagonal Q of a side, or X Q'."""
    if all(b.Q is None for b in side):
        return X
    if len(side) == 1 and (Q := side[0].Q) is not None:
        return torch.mm(X, Q.T if back else Q)
    out = torch.empty_like(X, memory_format=torch.contiguous_format)
    for b in side:
        part, into = X[:, b.start : b.stop], out[:, b.start : b.stop]
        into.copy_(part) if b.Q is None else torch.mm(part, b.Q.T if back else b.Q, out=into)
    return out

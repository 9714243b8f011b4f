"""Flat vectors: many tensors as one, and sums that keep their digits at any length."""

from collections.abc import Callable, Iterator, Sequence
from itertools import accumulate, pairwise

import torch
from torch import Tensor

Total = Callable[[Tensor], Tensor]  # the sum over the processes of which each holds some entries of a vector; None: one has all
PIECE = 1 << 17  # entries that several passes over a basis take at a time: their rows stay in the cache
WIDENED = 1 << 15  # entries that are widened at a time; 1 << 20 was 20 times slower (fresh memory at each: docs/evidence.md)


def whole(x: Tensor) -> Tensor:
    """The tensor that the processes hold shards of (DTensor), gathered on each; any other is whole already."""
    if type(x) is Tensor:
        return x
    gather = getattr(x, "full_tensor", None)
    return x if gather is None else gather()


def flatten(tensors: Sequence[Tensor]) -> Tensor:
    """One (n,) vector out of tensors of any shapes; float32 at least, so that half-precision models can be measured."""
    dtype = torch.promote_types(tensors[0].dtype, torch.float32)
    return torch.cat([whole(t.detach()).reshape(-1).to(dtype) for t in tensors])


def unflatten(vector: Tensor, like: Sequence[Tensor]) -> list[Tensor]:
    """The (n,) vector cut into tensors of the shapes and dtypes of `like`."""
    pieces = vector.split([t.numel() for t in like])
    return [piece.view(t.shape).to(t.dtype) for piece, t in zip(pieces, like, strict=True)]


def accumulator(like: Tensor) -> torch.dtype:
    """The dtype for norms and dots: float32 sums lose digits at n >= 1e7. MPS has no float64."""
    return torch.float32 if like.device.type == "mps" else torch.float64


def waits(x: Tensor) -> bool:
    """Whether the host has to wait for x's device to look at a number: there, nothing is looked at on the way."""
    return x.device.type != "cpu"


def dot(x: Tensor, y: Tensor) -> Tensor:
    """x'y, accumulated wide, left on the device."""
    wide, n = accumulator(x), x.numel()
    width = 1 << 22 if waits(x) else WIDENED  # elsewhere every piece is a launch
    if x.dtype == wide or n <= WIDENED:
        a = x.to(wide)
        return torch.dot(a, a if x is y else y.to(wide))
    return torch.stack([torch.dot(x[s].to(wide), y[s].to(wide)) for s in pieces(n, width)]).sum()


def norm(x: Tensor, total: Total | None = None) -> Tensor:
    """Euclidean norm, accumulated wide, left on the device."""
    if waits(x):
        size = torch.linalg.vector_norm(x, dtype=accumulator(x))
        return size if total is None else total(size * size).sqrt()
    square = dot(x, x)  # vector_norm widens one entry at a time there, which takes three times as long
    return (square if total is None else total(square)).sqrt()


def total_norm(tensors: Sequence[Tensor]) -> Tensor:
    """(1,) Euclidean norm of all of them together, in their own precision, left on the device; sparse and sharded ones too."""
    if tensors and all(type(t) is Tensor and t.is_cpu and not t.is_sparse for t in tensors):
        norms = torch.stack([torch.linalg.vector_norm(t) for t in tensors])  # torch's own sorts them by device first
        return torch.linalg.vector_norm(norms).reshape(1)
    values = [t.coalesce().values() if t.is_sparse else t for t in tensors]
    return whole(torch.nn.utils.get_total_norm(values)).reshape(1)


def on_host(tensors: Sequence[Tensor]) -> list[list[float]]:
    """The entries of each, in float32, with one synchronisation; all come by the device of the first."""
    if all(t.is_cpu for t in tensors):
        return [t.float().reshape(-1).tolist() for t in tensors]
    flat = torch.cat([t.reshape(-1).to(tensors[0].device, torch.float32) for t in tensors]).tolist()
    ends = [0, *accumulate(t.numel() for t in tensors)]
    return [flat[a:b] for a, b in pairwise(ends)]


def entries(x: Tensor, total: Total | None = None) -> int:
    """How many entries the vector has, on all processes."""
    return x.numel() if total is None else int(total(torch.tensor(x.numel(), dtype=accumulator(x), device=x.device)))


def pieces(n: int, size: int = PIECE) -> Iterator[slice]:
    """Consecutive slices of range(n)."""
    return (slice(a, min(a + size, n)) for a in range(0, n, size))


def negligible(n: int, eps: float) -> float:
    """Below this share of its scale a number that came out of products of n entries is rounding.

    Errors add up at random; with sqrt(n) at any n a true 1e-4 beside an outlier would be noise at a million parameters.
    """
    return min(n**0.5, 32) * eps

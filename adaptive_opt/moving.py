"""Buffers that a forward pass changes and its output hangs on: spectral norm's power iteration, a codebook's averages."""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

Kept = list[tuple[nn.Module, str, Tensor]]  # module, name of the buffer, a copy


class MovingBuffers:
    """Learns which buffers a pass moves, once for each combination of training modes, and copies these before a pass.

    Running statistics of normalisation layers are left out: in training nothing but they themselves hangs on them. A buffer
    that begins to move later, in the same modes, is not noticed; then the trust gate refuses the replay.
    """

    def __init__(self, modules: Iterable[nn.Module]):
        self.watched = [(m, name) for m in modules if not isinstance(m, _NormBase) for name in m._buffers]
        self.known: dict[tuple[bool, ...], list[tuple[nn.Module, str]]] = {}
        self.learning: list[tuple[nn.Module, str, Tensor, int]] = []  # with the buffer itself and its version before the pass

    def before(self, training: tuple[bool, ...]) -> Kept:
        """Copies of what the coming pass may move."""
        if not self.watched:
            return []
        known = self.known.get(training)
        found = [(m, name, m._buffers.get(name)) for m, name in (self.watched if known is None else known)]
        there = [(m, name, b) for m, name, b in found if b is not None and not b.is_inference()]
        self.learning = [(m, name, b, b._version) for m, name, b in there] if known is None else []
        return [(m, name, b.detach().clone()) for m, name, b in there]

    def after(self, training: tuple[bool, ...], kept: Kept) -> None:
        """Learn from a first pass, and keep the copies of what it moved only."""
        if not self.watched or training in self.known:
            return
        moved = [(m, name) for m, name, b, version in self.learning if m._buffers.get(name) is not b or b._version != version]
        self.known[training], self.learning = moved, []
        kept[:] = [(m, name, b) for m, name, b in kept if (m, name) in moved]

"""Running statistics of normalisation layers: a broken batch poisons them in its forward pass, before any step."""

from __future__ import annotations

import math
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn

from adaptive_opt.records import Outlier
from adaptive_opt.signals import LEARNED

STANDS_OUT = 25.0  # times the largest second moment so far; docs/evidence.md, "running statistics"
FADE = 0.98  # what is left of that largest after a batch
IN_A_ROW = 3  # so many batches that stand out are the data's own; rollback's patience
FORWARDS = 64  # of accumulation, at most: more batches than these before the first step, and a checkpoint was loaded
TINY = 1e-6  # a momentum of 0 never moves: nothing is divided by it
NAMES = ("running_mean", "running_var")


@dataclass
class Early:
    """One of the first batches."""

    step: int
    moments: list[float]  # a number a layer
    kept: Tensor  # what there was before it
    counts: Tensor


class RunningStatistics:
    """Running means and variances as they were after the last good batch, and whether a batch stands out in them.

    With batch statistics the loss does not see how large its input is, but later evaluation does. What a batch brought is
    solved for from running = (1 - m) kept + m batch: the second moment that it had about the running mean, summed over the
    channels of a layer. Until five batches were seen nothing can stand out; then the five are compared with one another.
    """

    def __init__(self) -> None:
        self.kept: Tensor | None = None  # (2 c,) means and variances of all c channels
        self.counts: Tensor | None = None  # (layers,) batches tracked by then
        self.early: list[Early] = []
        self.largest: list[float] = []  # moment a layer, fading; empty before five batches
        self.odd = 0  # batches in a row that stood out
        self.present: tuple[int, list[float]] | None = None  # this step's batch, not counted yet
        self._model: nn.Module | None = None
        self._layers: list[nn.Module] = []
        self._layer: Tensor | None = None  # (c,) which layer a channel is of
        self._seen: tuple[Tensor, Tensor] | None = None  # what `look` found in this step

    def attach(self, model: nn.Module | None) -> None:
        """Listen to this model from now on; its statistics of before the first batch are kept."""
        if model is self._model:
            return
        self._model = model
        self._layers = [] if model is None else [m for m in model.modules() if m._buffers.get("running_mean") is not None]
        if self._layers and self.kept is None:
            self.kept, self.counts = self._now()

    @torch.no_grad()
    def look(self) -> Tensor | None:
        """(layers,) the moments of the present batch, on the device; None where there is nothing to compare with."""
        if not self._layers or self.kept is None or self.counts is None:
            return None
        now, counts = self._seen = self._now()
        unseen = not self.largest and not self.early
        if now.shape != self.kept.shape or (unseen and float((counts - self.counts).max()) > FORWARDS):
            self.keep()
            return None
        if self._layer is None or 2 * len(self._layer) != len(now) or self._layer.device != now.device:
            sizes = torch.tensor([_buffer(layer, "running_mean").numel() for layer in self._layers], device=now.device)
            self._layer = torch.arange(len(sizes), device=now.device).repeat_interleave(sizes)
        m, moved = self._momenta(counts), now - self.kept
        if isinstance(m, Tensor):
            m, moved = 1.0, moved / m.to(now)[self._layer].repeat(2)
        shift, var_shift = moved.chunk(2)
        moments = self.kept.chunk(2)[1].add(var_shift, alpha=1 / m).addcmul_(shift, shift, value=1 / m**2)
        return now.new_zeros(len(self._layers)).index_add_(0, self._layer, moments)

    def judge(self, step: int, moments: list[float]) -> Outlier | None:
        """The batch that stands out: this step's or, once five are seen, one of those. Three in a row are the data's own."""
        self.present = (step, moments)
        if not all(map(math.isfinite, moments)):
            return Outlier(step, math.inf, STANDS_OUT)
        if self.largest:
            ratio = _ratio(moments, self.largest)
            return Outlier(step, ratio, STANDS_OUT) if ratio > STANDS_OUT and self.odd + 1 < IN_A_ROW else None
        rows = [*((early.step, early.moments) for early in self.early), self.present]
        if len(rows) < LEARNED:
            return None
        usual = [median(column) for column in zip(*(row for _, row in rows), strict=True)]
        found = (Outlier(at, _ratio(row, usual), STANDS_OUT) for at, row in rows)
        return next((o for o in found if o.factor > STANDS_OUT), None)

    def keep(self) -> None:
        """A step was taken: what is there now is good, and so are the moments of its batch."""
        if not self._layers:
            return
        if self.present is not None and self.kept is not None and self.counts is not None:
            step, moments = self.present
            if self.largest:
                self.largest = [max(new, FADE * most) for new, most in zip(moments, self.largest, strict=True)]
                self.odd = 0
            else:
                self.early.append(Early(step, moments, self.kept, self.counts))
            if len(self.early) == LEARNED:
                self.largest = [max(column) for column in zip(*(early.moments for early in self.early), strict=True)]
                self.early = []
        self.present = None
        self.kept, self.counts = self._now() if self._seen is None else self._seen
        self._seen = None

    def cleanse(self, step: int) -> None:
        """Back to what was before the batch of this step, which is the present one or one of the first five."""
        before = next((early for early in self.early if early.step == step), None)
        if before is None:
            self.odd += 1
        else:
            self.kept, self.counts = before.kept, before.counts
            self.early = []  # the moments of the batches after it are blurred by it
        self.restore()

    @torch.no_grad()
    def restore(self) -> None:
        """Back to what was kept; the present batch is not counted."""
        self.present = self._seen = None
        if not self._layers or self.kept is None or self.counts is None:
            return
        buffers = [_buffer(layer, name) for name in NAMES for layer in self._layers]
        if sum(b.numel() for b in buffers) != self.kept.numel():
            return
        for buffer, kept in zip(buffers, self.kept.split([b.numel() for b in buffers]), strict=True):
            buffer.copy_(kept)
        for layer, count in zip(self._layers, self.counts, strict=True):
            if layer._buffers.get("num_batches_tracked") is not None:
                _buffer(layer, "num_batches_tracked").copy_(count)

    def _now(self) -> tuple[Tensor, Tensor]:
        """New tensors, on the device of the first layer."""
        both = [_buffer(layer, name) for name in NAMES for layer in self._layers]
        counts = [layer._buffers.get("num_batches_tracked") for layer in self._layers]
        device = both[0].device
        if any(b is None or b.device != device for b in (*both, *counts)):
            both = [b.to(device) for b in both]
            counts = [torch.zeros((), dtype=torch.long, device=device) if c is None else c.to(device) for c in counts]
        return torch.cat(both), torch.stack([c for c in counts if c is not None])

    def _momenta(self, counts: Tensor) -> Tensor | float:
        """Weight of the batch in the running average, (layers,) or one for all; without momentum all batches count alike."""
        given = [getattr(layer, "momentum", None) for layer in self._layers]
        if given[0] is not None and given.count(given[0]) == len(given):
            return max(float(given[0]), TINY)
        m = torch.tensor([0.0 if g is None else float(g) for g in given], device=counts.device)
        alone = torch.tensor([g is None for g in given], device=counts.device)
        return torch.where(alone, 1 / counts.clamp_min(1), m).clamp_min(TINY)

    def state_dict(self) -> dict[str, Any]:
        early = [{**vars(early), "moments": list(early.moments)} for early in self.early]
        return {"kept": self.kept, "counts": self.counts, "early": early, "largest": list(self.largest), "odd": self.odd}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.kept, self.counts, self.largest, self.odd = state["kept"], state["counts"], state["largest"], state["odd"]
        self.early = [Early(**early) for early in state["early"]]
        self.present = self._seen = None


def _ratio(moments: list[float], usual: list[float]) -> float:
    return max((m / u if u > 0 else 0.0 for m, u in zip(moments, usual, strict=True)), default=0.0)


def _buffer(layer: nn.Module, name: str) -> Tensor:
    buffer = layer._buffers[name]
    assert buffer is not None
    return buffer

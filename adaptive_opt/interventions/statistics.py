"""Running statistics of normalisation layers: a broken batch poisons them in its forward pass, before any step."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn


class RunningStatistics:
    """A copy of every running mean and variance as it was after the last good batch."""

    def __init__(self) -> None:
        self.kept: dict[str, Tensor] = {}

    def keep(self, model: nn.Module | None) -> None:
        for name, buffer in _statistics(model):
            if name in self.kept:
                self.kept[name].copy_(buffer)
            else:
                self.kept[name] = buffer.detach().clone()

    @torch.no_grad()
    def restore(self, model: nn.Module | None) -> None:
        for name, buffer in _statistics(model):
            if name in self.kept:
                buffer.copy_(self.kept[name])

    def state_dict(self) -> dict[str, Any]:
        return dict(self.kept)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.kept = dict(state)


def _statistics(model: nn.Module | None) -> Iterator[tuple[str, Tensor]]:
    for name, module in model.named_modules() if model is not None else ():
        if module._buffers.get("running_mean") is not None:
            yield from ((f"{name}.{k}", b) for k, b in module._buffers.items() if b is not None)

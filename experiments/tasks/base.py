"""What a task is: everything that the loop needs and nothing about optimizers."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor, nn


class Task(Protocol):
    """A learning problem from a seed."""

    model: nn.Module
    loss_fn: nn.Module
    steps: int

    def batch(self, step: int) -> tuple[Tensor, Tensor]: ...
    def evaluate(self) -> dict[str, float]: ...


class Classification:
    """Shuffled mini-batches of a labelled set; test accuracy and loss."""

    def __init__(
        self,
        model: nn.Module,
        train: tuple[Tensor, Tensor],
        test: tuple[Tensor, Tensor],
        batch_size: int,
        steps: int,
        seed: int,
    ):
        self.model, self.loss_fn, self.steps = model, nn.CrossEntropyLoss(), steps
        self.train, self.test, self.batch_size = train, test, batch_size
        self._order = torch.Generator().manual_seed(seed)
        self._queue: list[Tensor] = []

    def batch(self, step: int) -> tuple[Tensor, Tensor]:
        if not self._queue:
            shuffled = torch.randperm(len(self.train[0]), generator=self._order)
            self._queue = [part for part in shuffled.split(self.batch_size) if len(part) == self.batch_size][::-1]
        rows = self._queue.pop()
        return self.train[0][rows], self.train[1][rows]

    @torch.no_grad()
    def evaluate(self) -> dict[str, float]:
        self.model.eval()
        logits = torch.cat([self.model(x) for x in self.test[0].split(500)])
        self.model.train()
        return {
            "test_accuracy": 100 * float((logits.argmax(1) == self.test[1]).float().mean()),
            "test_loss": float(self.loss_fn(logits, self.test[1])),
        }

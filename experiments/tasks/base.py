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
    """Shuffled mini-batches of a labelled set; test accuracy and loss.

    The last `validation` training samples are held out for `validation_loss`.
    """

    def __init__(
        self,
        model: nn.Module,
        train: tuple[Tensor, Tensor],
        test: tuple[Tensor, Tensor],
        batch_size: int,
        steps: int,
        seed: int,
        validation: int = 0,
    ):
        count = len(train[0]) - validation
        if validation < 0 or count < batch_size:
            raise ValueError(
                f"validation={validation}: 0 or more, with {batch_size} of {len(train[0])} samples left to train on"
            )
        self.model, self.loss_fn, self.steps = model, nn.CrossEntropyLoss(), steps
        self.train, self.test, self.batch_size = (train[0][:count], train[1][:count]), test, batch_size
        self.validation = (train[0][count:], train[1][count:]) if validation else None
        self._order = torch.Generator().manual_seed(seed)
        self._queue: list[Tensor] = []

    def batch(self, step: int) -> tuple[Tensor, Tensor]:
        if not self._queue:
            shuffled = torch.randperm(len(self.train[0]), generator=self._order)
            self._queue = [part for part in shuffled.split(self.batch_size) if len(part) == self.batch_size][::-1]
        rows = self._queue.pop()
        return self.train[0][rows], self.train[1][rows]

    def evaluate(self) -> dict[str, float]:
        logits = self._logits(self.test[0])
        return {
            "test_accuracy": 100 * float((logits.argmax(1) == self.test[1]).float().mean()),
            "test_loss": float(self.loss_fn(logits, self.test[1])),
        }

    def validation_loss(self) -> float:
        """Of the samples held out: what `AdaptiveOptimizer(validate=)` asks."""
        if self.validation is None:
            raise ValueError(f"{type(self).__name__}(validation=0): give a number of samples to hold out")
        return float(nn.functional.cross_entropy(self._logits(self.validation[0]), self.validation[1]))

    @torch.no_grad()
    def _logits(self, x: Tensor) -> Tensor:
        training = self.model.training
        self.model.eval()
        try:
            return torch.cat([self.model(part) for part in x.split(500)])
        finally:
            self.model.train(training)

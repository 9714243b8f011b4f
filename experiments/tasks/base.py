"""What a task is: everything that the loop needs and nothing about optimizers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor, nn


class Task(Protocol):
    """A learning problem from a seed."""

    model: nn.Module
    loss_fn: nn.Module
    steps: int

    def batch(self, step: int) -> tuple[Tensor, Tensor]: ...
    def evaluate(self) -> dict[str, float]: ...


def loss_of(task: Task, x: Tensor, y: Tensor) -> Tensor:
    """The task's `objective` where it has one (a physics-informed net), else `loss_fn(model(x), y)`."""
    objective: Callable[[], Tensor] | None = getattr(task, "objective", None)
    return objective() if objective is not None else task.loss_fn(task.model(x), y)


def source_of(task: Task) -> dict[str, Any]:
    """What AdaptiveOptimizer has to be told so that it sees that loss."""
    objective = getattr(task, "objective", None)
    return {"objective": objective} if objective is not None else {"loss_fn": task.loss_fn}


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

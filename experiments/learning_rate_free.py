"""Optimizers that need no learning rate, each as its authors say to use it: the peers of scripts/bench_step_size.py.

They come with extra "bench"; each takes a task and a number of steps and gives what the loop needs.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import SGD, AdamW, Optimizer
from torch.optim.lr_scheduler import CosineAnnealingLR

from .tasks.base import Task, loss_of


@dataclass
class Peer:
    """An optimizer beside what its authors want around it."""

    optimizer: Optimizer
    schedule: Any = None
    weights: Callable[[], AbstractContextManager[None]] = nullcontext  # the model's weights are those to be judged inside it
    extra: float = 0.0  # gradient-equivalents a step, beside the gradient


def prodigy(task: Task, steps: int) -> Peer:
    """Mishchenko and Defazio, 2024: lr 1, cosine annealing without restarts; decoupled decay as in AdamW."""
    from prodigyopt import Prodigy

    optimizer = Prodigy(task.model.parameters(), lr=1.0, weight_decay=0.01, decouple=True)
    return Peer(optimizer, CosineAnnealingLR(optimizer, steps))


def d_adapt_adam(task: Task, steps: int) -> Peer:
    """Defazio and Mishchenko, 2023: lr 1, the usual schedule."""
    from dadaptation import DAdaptAdam

    optimizer = DAdaptAdam(task.model.parameters(), lr=1.0, weight_decay=0.01, decouple=True)
    return Peer(optimizer, CosineAnnealingLR(optimizer, steps))


def d_adapt_sgd(task: Task, steps: int) -> Peer:
    """The same for SGD, with momentum."""
    from dadaptation import DAdaptSGD

    optimizer = DAdaptSGD(task.model.parameters(), lr=1.0, momentum=0.9)
    return Peer(optimizer, CosineAnnealingLR(optimizer, steps))


def dog(task: Task, steps: int) -> Peer:
    """Ivgi et al., 2023: no schedule, the average of the weights is judged; reps_rel 1e-4 with batch normalisation."""
    from dog import DoG, PolynomialDecayAverager

    normalised = any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in task.model.modules())
    optimizer = DoG(task.model.parameters(), reps_rel=1e-4 if normalised else 1e-6)
    averager = PolynomialDecayAverager(task.model)
    optimizer.register_step_post_hook(lambda *_: averager.step())

    @contextmanager
    def averaged() -> Iterator[None]:
        own = {k: v.clone() for k, v in task.model.state_dict().items()}
        task.model.load_state_dict(averager.av_model.state_dict())
        try:
            yield
        finally:
            task.model.load_state_dict(own)

    return Peer(optimizer, weights=averaged)


def schedule_free(task: Task, steps: int) -> Peer:
    """Defazio et al., 2024: AdamW with its default lr of 0.0025 and a warm-up of 5 %; the averaged point is judged."""
    from schedulefree import AdamWScheduleFree

    optimizer = AdamWScheduleFree(task.model.parameters(), weight_decay=0.01, warmup_steps=max(steps // 20, 1))
    optimizer.train()

    @contextmanager
    def averaged() -> Iterator[None]:
        optimizer.eval()
        try:
            yield
        finally:
            optimizer.train()

    return Peer(optimizer, weights=averaged)


class GeN(Optimizer):
    """Bu and Xu, 2025: every LAZY steps `lr_parabola` fits the loss along the update on another batch and sets the rate."""

    LAZY = 4  # the README's "lazy_freq >= 4"
    EXTRA = 3 / 3 / LAZY  # three forward passes, a third of a gradient each

    def __init__(self, base: Optimizer, task: Task, steps: int):
        super().__init__(base.param_groups, base.defaults)
        self.param_groups = base.param_groups
        self.base, self.task, self.steps, self.taken = base, task, steps, 0

    def step(self, closure: Any = None) -> None:
        import warnings

        from GeN import lr_parabola
        from scipy.optimize import OptimizeWarning

        self.taken += 1
        if self.taken % self.LAZY == 0:
            batch = self.task.batch(self.taken)
            scale = (1 + math.cos(math.pi * self.taken / self.steps)) / 2
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", OptimizeWarning)  # two numbers from two losses
                lr_parabola(
                    self.task.model,
                    self.base,
                    criterion=lambda out, y: self._criterion(batch[0], out, y),
                    tr_iter=iter([batch]),
                    device=str(batch[0].device),
                    task="image_cls",  # a batch of two: inputs and targets
                    scale=scale,
                    lr_factor=[-1, 0, 1],
                )
        self.base.step()

    def _criterion(self, x: Tensor, out: Tensor, y: Tensor) -> Tensor:
        if not hasattr(self.task, "objective"):
            return self.task.loss_fn(out, y)
        with torch.enable_grad():  # a physics-informed net differentiates its own outputs
            return loss_of(self.task, x, y).detach()


def gen_adamw(task: Task, steps: int) -> Peer:
    """GeN on AdamW from its README's first rate, 1e-4."""
    return Peer(GeN(AdamW(task.model.parameters(), lr=1e-4), task, fewer(steps)), extra=GeN.EXTRA)


def gen_sgd(task: Task, steps: int) -> Peer:
    """GeN on SGD with momentum from the same rate."""
    return Peer(GeN(SGD(task.model.parameters(), lr=1e-4, momentum=0.9), task, fewer(steps)), extra=GeN.EXTRA)


def fewer(steps: int) -> int:
    """Steps of GeN that cost what `steps` gradients do."""
    return round(steps / (1 + GeN.EXTRA))


PEERS: dict[str, Callable[[Task, int], Peer]] = {
    "Prodigy": prodigy,
    "D-Adaptation Adam": d_adapt_adam,
    "D-Adaptation SGD": d_adapt_sgd,
    "DoG": dog,
    "GeN AdamW": gen_adamw,
    "GeN SGD": gen_sgd,
    "schedule-free AdamW": schedule_free,
}


def judged(task: Task, batches: list[tuple[Tensor, Tensor]]) -> float:
    """Mean training loss of these batches, with the batch's own statistics; buffers are put back."""
    buffers = {name: b.clone() for name, b in task.model.named_buffers()}
    losses = [float(loss_of(task, x, y).detach()) for x, y in batches]
    with torch.no_grad():
        for name, b in task.model.named_buffers():
            b.copy_(buffers[name])
    return sum(losses) / len(losses)

"""Places where the gradient all but vanishes and the loss is high."""

from __future__ import annotations

import torch
from torch import nn

from ...tasks.base import Task
from ...tasks.digits import Digits
from ...tasks.factorisation import Factorisation
from ..records import Human, Workload


def identical(seed: int) -> Task:
    """One hidden layer in which every unit is the first one: they get the same gradient, and stay one unit."""
    task = tanh_net(seed, depth=1, width=512, batch_size=1024)
    first, last = (layer for layer in task.model if isinstance(layer, nn.Linear))
    with torch.no_grad():
        first.weight.copy_(first.weight[:1].expand_as(first.weight))
        last.weight.copy_(last.weight[:, :1].expand_as(last.weight) / 512**0.5)  # equal units add up, others would average out
    return task


def kicked(seed: int) -> Task:
    """Noise of a hundredth of the weights' own size."""
    task = identical(seed)
    with torch.no_grad():
        for p in task.model.parameters():
            p.add_(0.01 * p.norm() / p.numel() ** 0.5 * torch.randn_like(p))
    return task


def tanh_net(seed: int, gain: float = 1.0, depth: int = 4, width: int = 256, batch_size: int = 512) -> Digits:
    """He's start times the gain."""
    task = Digits(seed, batch_size=batch_size, width=width, depth=depth, steps=300, gain=gain)
    for i, module in enumerate(task.model):
        if isinstance(module, nn.ReLU):
            task.model[i] = nn.Tanh()
    return task


DIGITS = {"AdamW": 1e-3, "SGD": 0.05}
WORKLOADS = (
    Workload(
        "identical units", "saddle", identical, {"AdamW": 3e-3, "SGD": 0.1}, "test_accuracy", 10.0, True,
        human=Human("adds 1 % of noise to the weights", kicked),
    ),
    Workload(
        "tiny start", "saddle", lambda s: tanh_net(s, 0.1), DIGITS, "test_accuracy", 10.0, True,
        human=Human("starts at the usual size", lambda s: tanh_net(s, 1.0)),
    ),
    Workload(
        "factorisation", "saddle", lambda s: Factorisation(s, steps=300), {"AdamW": 1e-2, "SGD": 0.1}, "log10 loss", 2.5,
        human=Human("starts at entries of 0.1", lambda s: Factorisation(s, steps=300, start=0.1)),
    ),
)  # fmt: skip

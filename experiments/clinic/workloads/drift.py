"""Signals that grow or die on their way through the layers."""

from __future__ import annotations

import torch
from torch import nn

from ...tasks.digits import Digits
from ...tasks.sequence import Sequence
from ..records import Human, Workload

RATES = {"AdamW": 1e-3, "SGD": 0.02}


def deep(seed: int, gain: float = 1.0) -> Digits:
    """Thirteen layers, no normalisation."""
    return Digits(seed, batch_size=512, width=128, depth=12, steps=300, gain=gain)


def one_wild(seed: int) -> Digits:
    task = deep(seed)
    sixth = [layer for layer in task.model if isinstance(layer, nn.Linear)][5]
    with torch.no_grad():
        sixth.weight.mul_(30.0)
    return task


PROPER = Human("starts as He et al. do", deep)
WORKLOADS = (
    Workload("layers x3", "drift", lambda s: deep(s, 3.0), RATES, "test_accuracy", 10.0, True, human=PROPER),
    Workload("layers x0.4", "drift", lambda s: deep(s, 0.4), RATES, "test_accuracy", 10.0, True, human=PROPER),
    Workload("one layer x30", "drift", one_wild, RATES, "test_accuracy", 10.0, True, human=PROPER),
    Workload(
        "vanilla RNN", "drift", lambda s: Sequence(s, steps=300), {"AdamW": 1e-3, "SGD": 0.02}, "test_accuracy", 10.0, True,
        human=Human("orthogonal recurrent start, clips at 1", lambda s: Sequence(s, steps=300, gain=1.0), clip=1.0),
    ),
)  # fmt: skip

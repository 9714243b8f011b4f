"""Labels that can only be learned by heart: four in ten are drawn at random."""

from __future__ import annotations

from torch import nn

from ...tasks.digits import Digits
from ...tasks.mnist1d import MNIST1D
from ..records import Human, Workload


def digits(seed: int) -> Digits:
    return Digits(seed, batch_size=128, width=512, depth=2, steps=600, label_noise=0.4, validation=200)


def mnist1d(seed: int) -> MNIST1D:
    return MNIST1D(seed, width=512, steps=1000, label_noise=0.4, validation=200)


def with_dropout(seed: int) -> MNIST1D:
    task = mnist1d(seed)
    layers = [part for m in task.model for part in ([m, nn.Dropout(0.5)] if isinstance(m, nn.ReLU) else [m])]
    task.model = nn.Sequential(*layers)
    return task


WORKLOADS = (
    Workload(
        "noisy digits", "sharp", digits, {"AdamW": 2e-3, "SGD": 0.1}, "test_accuracy", 10.0, True,
        validate=True, human=Human("stops early, by 200 samples held out", best=True),
    ),
    Workload(
        "noisy mnist1d", "sharp", mnist1d, {"AdamW": 2e-3, "SGD": 0.1}, "test_accuracy", 10.0, True,
        validate=True, human=Human("puts a dropout of 0.5 behind each hidden layer", with_dropout),
    ),
)  # fmt: skip

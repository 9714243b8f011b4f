"""Nothing is wrong here: what a wrapper does to these runs is a side effect."""

from __future__ import annotations

from ...tasks.digits import Digits
from ...tasks.gpt import CharGPT
from ...tasks.mnist import MNIST
from ...tasks.tabular import Tabular
from ..records import Workload

DIGITS = {"AdamW": 1e-3, "SGD": 0.05}


def digits(seed: int) -> Digits:
    """Five layers."""
    return Digits(seed, batch_size=512, width=256, depth=4, steps=400)


WORKLOADS = (
    Workload("digits MLP", "healthy", digits, DIGITS, "test_accuracy", 10.0, True),
    Workload(
        "MNIST CNN", "healthy", lambda s: MNIST(s, width=4, steps=500), {"AdamW": 3e-3, "SGD": 0.05},
        "test_accuracy", 10.0, True,
    ),
    Workload(
        "char-GPT", "healthy", lambda s: CharGPT(s, width=32, depth=2, batch_size=12, steps=500),
        {"AdamW": 3e-3, "SGD": 0.1}, "validation_loss", 4.6,
    ),
    Workload(
        "scaled features", "healthy", lambda s: Tabular(s, scaled=True), {"AdamW": 1e-3, "SGD": 0.02},
        "test_loss", 0.66,
    ),
)  # fmt: skip

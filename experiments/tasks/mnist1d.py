"""mnist1d (Greydanus and Kobak, 2024): 4000 made-up signals of 40 numbers that need more than a linear model."""

from __future__ import annotations

import functools

import torch
from torch import Tensor, nn

from .base import Classification


class MNIST1D(Classification):
    """A ReLU MLP 40-width-width-10. label_noise: share of the training labels that are drawn at random."""

    def __init__(
        self,
        seed: int = 0,
        batch_size: int = 128,
        steps: int = 2000,
        width: int = 128,
        label_noise: float = 0.0,
        validation: int = 0,
    ):
        x, y, test_x, test_y = signals()
        torch.manual_seed(seed)
        wrong = torch.rand(len(y)) < label_noise
        y = torch.where(wrong, torch.randint(0, 10, (len(y),)), y)
        model = nn.Sequential(
            nn.Linear(40, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 10)
        )  # fmt: skip
        super().__init__(model, (x, y), (test_x, test_y), batch_size, steps, seed, validation)


@functools.cache
def signals() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(4000, 40), (4000,) to train on; (1000, 40), (1000,) to test. Made in 7 seconds, the same every time."""
    try:
        from mnist1d.data import get_dataset_args, make_dataset
    except ImportError as error:
        raise SystemExit('task=mnist1d needs the package mnist1d: pip install "adaptive-opt[bench]"') from error
    d = make_dataset(get_dataset_args())
    x, y, test_x, test_y = (torch.as_tensor(d[k]) for k in ("x", "y", "x_test", "y_test"))
    return x.float(), y.long(), test_x.float(), test_y.long()

"""1797 real digits of 8 x 8 pixels (scikit-learn): 1400 to train an MLP on, 397 to test it."""

from __future__ import annotations

import itertools

import torch
from torch import Tensor, nn

from .base import Classification


class Digits(Classification):
    """A ReLU MLP with `depth` hidden layers.

    gain: factor on its weights at the start. label_noise: share of the training labels that are drawn at random.
    """

    def __init__(
        self,
        seed: int = 0,
        batch_size: int = 64,
        steps: int = 400,
        width: int = 64,
        depth: int = 2,
        gain: float = 1.0,
        label_noise: float = 0.0,
        validation: int = 0,
    ):
        torch.manual_seed(seed)
        sizes = [64, *[width] * depth]
        layers: list[nn.Module] = []
        for n_in, n_out in itertools.pairwise(sizes):
            layers += [nn.Linear(n_in, n_out), nn.ReLU()]
        model = nn.Sequential(*layers, nn.Linear(width, 10))
        with torch.no_grad():
            for layer in model:
                if isinstance(layer, nn.Linear):
                    nn.init.kaiming_normal_(layer.weight, nonlinearity="relu").mul_(gain)
                    nn.init.zeros_(layer.bias)
        x, y = pixels(shuffled=True)
        g = torch.Generator().manual_seed(seed)
        wrong = (torch.rand(len(y), generator=g) < label_noise) & (torch.arange(len(y)) < 1400)
        y[wrong] = torch.randint(0, 10, (int(wrong.sum()),), generator=g)
        super().__init__(model, (x[:1400], y[:1400]), (x[1400:], y[1400:]), batch_size, steps, seed, validation)


def pixels(shuffled: bool = False) -> tuple[Tensor, Tensor]:
    """(1797, 64) in [0, 1] and (1797,) labels, in the order of the data set or in a fixed shuffled one."""
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise SystemExit('task=digits needs scikit-learn: pip install "adaptive-opt[experiments]"') from error
    data = load_digits()
    x, y = torch.tensor(data.data / 16.0, dtype=torch.float32), torch.tensor(data.target)
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0)) if shuffled else torch.arange(len(x))
    return x[order], y[order]

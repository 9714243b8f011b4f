"""ResNet-20 (He et al., 2016) with batch normalisation, on the digits' 8 x 8 pixels."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .base import Classification
from .digits import pixels


class Residual(nn.Module):
    """Two convolutions and a shortcut without parameters."""

    def __init__(self, before: int, width: int, stride: int):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(before, width, 3, stride, 1, bias=False), nn.BatchNorm2d(width)
        self.conv2, self.bn2 = nn.Conv2d(width, width, 3, 1, 1, bias=False), nn.BatchNorm2d(width)
        self.stride, self.grow = stride, width - before

    def forward(self, x: Tensor) -> Tensor:
        h = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        return F.relu(h + F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, 0, self.grow)))


def resnet20() -> nn.Sequential:
    """One input channel, ten classes, 0.27M parameters."""
    shapes = [(16, 16, 1)] * 3 + [(16, 32, 2)] + [(32, 32, 1)] * 2 + [(32, 64, 2)] + [(64, 64, 1)] * 2
    stem = [nn.Conv2d(1, 16, 3, 1, 1, bias=False), nn.BatchNorm2d(16), nn.ReLU()]
    return nn.Sequential(*stem, *(Residual(*s) for s in shapes), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10))


class ResNet(Classification):
    """The digits as images."""

    def __init__(self, seed: int = 0, batch_size: int = 64, steps: int = 200):
        torch.manual_seed(seed)
        model = nn.Sequential(nn.Unflatten(1, (1, 8, 8)), *resnet20())
        x, y = pixels(shuffled=True)
        super().__init__(model, (x[:1400], y[:1400]), (x[1400:], y[1400:]), batch_size, steps, seed)

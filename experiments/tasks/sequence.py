"""Digits read pixel by pixel by a recurrent net: what it saw first is what it forgets."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .base import Classification
from .digits import pixels


class Recurrent(nn.Module):
    """A tanh RNN or an LSTM over (batch, 64) pixels, `stride` at a time; its last state is what the digit is read from."""

    def __init__(self, hidden: int, stride: int, cell: str = "rnn"):
        super().__init__()
        kind = {"rnn": nn.RNN, "lstm": nn.LSTM}[cell]
        self.rnn, self.head, self.stride = kind(stride, hidden, batch_first=True), nn.Linear(hidden, 10), stride

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.rnn(x.unflatten(1, (-1, self.stride)))[0][:, -1])


class Sequence(Classification):
    """gain: the recurrent matrix is this times an orthogonal one; None leaves torch's own start, whose gain is about 0.6."""

    def __init__(
        self,
        seed: int = 0,
        batch_size: int = 64,
        steps: int = 400,
        hidden: int = 64,
        stride: int = 1,
        gain: float | None = None,
        cell: str = "rnn",
    ):
        torch.manual_seed(seed)
        model = Recurrent(hidden, stride, cell)
        if gain is not None:
            nn.init.orthogonal_(model.rnn.weight_hh_l0, gain)
        x, y = pixels(shuffled=True)
        super().__init__(model, (x[:1400], y[:1400]), (x[1400:], y[1400:]), batch_size, steps, seed)

"""Small training problems that the tests share: a model, a criterion and batches, from a seed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

CLASSES = 4


class MLP(nn.Sequential):
    def __init__(self) -> None:
        super().__init__(nn.Linear(12, 16), nn.ReLU(), nn.Linear(16, CLASSES))

    @staticmethod
    def inputs(n: int) -> Tensor:
        return torch.randn(n, 12)


class CNN(nn.Sequential):
    """BatchNorm and Dropout: running statistics and random masks that a replay must meet again."""

    def __init__(self) -> None:
        super().__init__(
            nn.Conv2d(1, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Dropout(0.3), nn.Flatten(), nn.Linear(6 * 36, CLASSES)
        )

    @staticmethod
    def inputs(n: int) -> Tensor:
        return torch.randn(n, 1, 8, 8)


class Transformer(nn.Module):
    """One block with scaled_dot_product_attention and dropout inside it."""

    def __init__(self, width: int = 16, heads: int = 2) -> None:
        super().__init__()
        self.embed, self.heads = nn.Embedding(20, width), heads
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.mlp = nn.Sequential(nn.Linear(width, 32), nn.GELU(), nn.Linear(32, width))
        self.head = nn.Linear(width, CLASSES)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens)
        q, k, v = self.qkv(self.norm1(x)).chunk(3, -1)
        q, k, v = (t.unflatten(-1, (self.heads, -1)).transpose(1, 2) for t in (q, k, v))
        a = F.scaled_dot_product_attention(q, k, v, dropout_p=0.1 if self.training else 0.0, is_causal=True)
        x = x + self.out(a.transpose(1, 2).flatten(2))
        x = x + self.mlp(self.norm2(x))
        return self.head(x.mean(1))

    @staticmethod
    def inputs(n: int) -> Tensor:
        return torch.randint(0, 20, (n, 6))


MODELS: dict[str, Callable[[], nn.Module]] = {"mlp": MLP, "cnn": CNN, "transformer": Transformer}
BASES: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, weight_decay=1e-3),
    "adamw": lambda p: torch.optim.AdamW(p, lr=3e-3),
    "rmsprop": lambda p: torch.optim.RMSprop(p, lr=1e-3, momentum=0.5),
}


@dataclass
class Problem:
    """A model with its criterion and a stream of batches, all from one seed."""

    model: nn.Module
    criterion: nn.Module
    batches: list[tuple[Tensor, Tensor]]


def make(name: str, steps: int, *, batch: int = 32, dtype: torch.dtype = torch.float32, seed: int = 0) -> Problem:
    torch.manual_seed(seed)
    model = MODELS[name]().to(dtype)
    data = []
    for _ in range(steps):
        x = MODELS[name].inputs(batch)  # type: ignore[attr-defined]
        flat = x.reshape(batch, -1).float()
        y = (flat[:, :CLASSES] + 0.3 * torch.randn(batch, CLASSES)).argmax(1)
        data.append((x.to(dtype) if x.is_floating_point() else x, y))
    return Problem(model, nn.CrossEntropyLoss(), data)

"""A small GPT on the characters of Python's own library, 64 at a time."""

from __future__ import annotations

import functools
import inspect

import torch
from torch import Tensor, nn
from torch.nn import functional as F

MODULES = ("argparse", "ast", "difflib", "textwrap", "inspect", "typing", "tarfile", "zipfile", "doctest", "pdb")
CONTEXT = 64


class Block(nn.Module):
    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (t.unflatten(-1, (self.heads, -1)).transpose(1, 2) for t in self.qkv(self.norm1(x)).chunk(3, -1))
        a = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(a.transpose(1, 2).flatten(2))
        return x + self.mlp(self.norm2(x))


class GPT(nn.Module):
    """Next characters' logits, (batch, context, vocabulary)."""

    def __init__(self, vocabulary: int, width: int = 128, depth: int = 4, context: int = CONTEXT):
        super().__init__()
        self.tokens, self.places = nn.Embedding(vocabulary, width), nn.Embedding(context, width)
        self.blocks = nn.Sequential(*(Block(width, 4) for _ in range(depth)))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, vocabulary)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(self.blocks(self.tokens(x) + self.places.weight)))


class CharGPT:
    """A tenth of the text is held out; batches are drawn by torch's global generator."""

    def __init__(self, seed: int = 0, batch_size: int = 16, steps: int = 400, width: int = 64, depth: int = 2):
        text, vocabulary = source()
        torch.manual_seed(seed)
        self.model = nn.Sequential(GPT(vocabulary, width, depth), nn.Flatten(0, 1))
        self.loss_fn: nn.Module = nn.CrossEntropyLoss()
        self.text, self.cut, self.batch_size, self.steps = text, len(text) * 9 // 10, batch_size, steps
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.held_out = self._draw(self.cut, len(text), 128)

    def _draw(self, low: int, high: int, count: int) -> tuple[Tensor, Tensor]:
        t = self.text[torch.randint(low, high - CONTEXT - 1, (count, 1)) + torch.arange(CONTEXT + 1)]
        return t[:, :-1], t[:, 1:].flatten()

    def batch(self, step: int) -> tuple[Tensor, Tensor]:
        return self._draw(0, self.cut, self.batch_size)

    @torch.no_grad()
    def evaluate(self) -> dict[str, float]:
        return {"validation_loss": float(self.loss_fn(self.model(self.held_out[0]), self.held_out[1]))}


@functools.cache
def source() -> tuple[Tensor, int]:
    """(characters,) numbers of the text's letters, and how many letters there are."""
    text = "".join(inspect.getsource(__import__(name)) for name in MODULES)
    letters = {c: i for i, c in enumerate(sorted(set(text)))}
    return torch.tensor([letters[c] for c in text]), len(letters)

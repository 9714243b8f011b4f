"""python scripts/bench_idle.py [--pairs N]

What the wrapper costs when it has nothing to do: probe off, policy "base". Bare and wrapped take turns in blocks of steps, on
two models from one seed; the figures are medians over the pairs of blocks, of the difference and of the ratio of CPU times.
Memory: bytes of all live tensors between backward and step, and after the step, wrapped beyond bare.
"""

from __future__ import annotations

import argparse
import gc
import sys
import time
from pathlib import Path
from statistics import median

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer

from adaptive_opt import AdaptiveOptimizer, ConstantPolicy, LanczosProbe


class Block(nn.Module):
    """One transformer layer over tokens, with a head."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.layer = nn.Embedding(64, 128), nn.TransformerEncoderLayer(128, 4, 256, batch_first=True)
        self.head = nn.Linear(128, 10)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.layer(self.embed(tokens)).mean(1))


MODELS = {  # name -> model, batch
    "MLP 64-64-10": lambda: (nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10)), torch.randn(32, 64)),
    "CNN, BatchNorm": lambda: (
        nn.Sequential(
            nn.Conv2d(1, 16, 3), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 16, 3), nn.BatchNorm2d(16), nn.ReLU(),
            nn.AdaptiveAvgPool2d(4), nn.Flatten(), nn.Dropout(0.1), nn.Linear(256, 10),
        ),
        torch.randn(64, 1, 28, 28),
    ),
    "transformer layer": lambda: (Block(), torch.randint(0, 64, (16, 32))),
}  # fmt: skip


class Run:
    """A training loop; `wrapped` says around which optimizer."""

    def __init__(self, name: str, wrapped: bool):
        torch.manual_seed(0)
        self.model, self.x = MODELS[name]()
        self.y, self.criterion = torch.randint(0, 10, (len(self.x),)), nn.CrossEntropyLoss()
        self.optimizer: Optimizer = AdamW(self.model.parameters(), lr=1e-4)
        if wrapped:
            idle = {"probe": LanczosProbe(overhead=0), "policy": ConstantPolicy("base")}
            self.optimizer = AdaptiveOptimizer(self.optimizer, self.model, loss_fn=self.criterion, **idle)

    def backward(self) -> None:
        self.optimizer.zero_grad()
        self.criterion(self.model(self.x), self.y).backward()

    def seconds(self, steps: int) -> float:
        """CPU seconds a step."""
        begin = time.process_time()
        for _ in range(steps):
            self.backward()
            self.optimizer.step()
        return (time.process_time() - begin) / steps

    def held(self) -> tuple[int, int]:
        """Bytes of live tensors between backward and step, and after the step."""
        self.backward()
        between = live_bytes()
        self.optimizer.step()
        return between, live_bytes()


def live_bytes() -> int:
    """Bytes of every storage that a live tensor holds, each counted once."""
    gc.collect()
    storages = {}
    for x in gc.get_objects():
        if issubclass(type(x), Tensor):  # isinstance would ask proxies for their class
            for t in (x, x.grad if x.is_leaf else None):
                if t is not None:
                    storages[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
    return sum(storages.values())


def memory(name: str) -> tuple[int, int]:
    """Wrapped beyond bare: bytes between backward and step, and after the step."""
    held = []
    for wrapped in (False, True):
        before = live_bytes()
        run = Run(name, wrapped)
        run.seconds(5)
        held.append([bytes_ - before for bytes_ in run.held()])
        del run
    return held[1][0] - held[0][0], held[1][1] - held[0][1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pairs", type=int, default=200)
    args = parser.parse_args()
    torch.set_num_threads(1)
    print("| model | bare, ms a step | wrapped beyond it, us | ratio | memory with a batch | after the step |")
    print("|---|---|---|---|---|---|")
    for name in MODELS:
        between, after = memory(name)
        bare, wrapped = Run(name, False), Run(name, True)
        steps = max(1, round(0.02 / bare.seconds(20)))  # blocks of about 20 ms
        wrapped.seconds(20)
        pairs = []
        for n in range(args.pairs):  # in turns, each first in half of the pairs
            order = (bare, wrapped) if n % 2 == 0 else (wrapped, bare)
            times = {run is wrapped: run.seconds(steps) for run in order}
            pairs.append((times[False], times[True]))
        beyond, ratio = median(b - a for a, b in pairs), median(b / a for a, b in pairs)
        base = median(a for a, _ in pairs)
        print(f"| {name} | {1e3 * base:.3f} | {1e6 * beyond:.1f} | {ratio:.4f} | {between:+,} B | {after:+,} B |", flush=True)


if __name__ == "__main__":
    main()

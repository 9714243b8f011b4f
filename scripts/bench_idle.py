"""python scripts/bench_idle.py [--rounds N]

What the wrapper costs when it has nothing to do: probe off, policy "base". One model with one optimizer is trained in blocks of
steps, bare and wrapped in turns: two models of one seed differ by 0.5 % for where their tensors lie. The figures are
medians over the rounds, of the difference and of the ratio of CPU times. "hooks off": after `detach()`, which leaves what the
step itself costs. Memory: bytes of all live tensors between backward and step, and after the step, wrapped beyond bare.

A malloc that gives memory back and faults it in again makes 8 ms of a step differ by 0.1 ms: the Makefile tells it not to.
"""

from __future__ import annotations

import argparse
import gc
import sys
import time
from pathlib import Path
from statistics import median
from typing import Any

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

HOWS = ("bare", "wrapped", "hooks off")


class Run:
    """A training loop with one model; `wear` says how its optimizer is worn from now on."""

    def __init__(self, name: str, how: str):
        torch.manual_seed(0)
        self.model, self.x = MODELS[name]()
        self.y, self.criterion = torch.randint(0, 10, (len(self.x),)), nn.CrossEntropyLoss()
        self.base, self.wrapper = AdamW(self.model.parameters(), lr=1e-4), None
        self.wear(how)

    def wear(self, how: str) -> None:
        """ "bare", "wrapped", or "hooks off": wrapped without listening to the model."""
        if how != "bare" and self.wrapper is None:
            idle: dict[str, Any] = {"probe": LanczosProbe(overhead=0), "policy": ConstantPolicy("base")}
            self.wrapper = AdaptiveOptimizer(self.base, **idle)
        if self.wrapper is not None:
            self.wrapper.detach()
            if how == "wrapped":
                self.wrapper.attach(self.model, loss_fn=self.criterion)
        self.optimizer: Optimizer = self.base if how == "bare" or self.wrapper is None else self.wrapper

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
    for how in ("bare", "wrapped"):
        before = live_bytes()
        run = Run(name, how)
        run.seconds(5)
        held.append([bytes_ - before for bytes_ in run.held()])
        del run
    return held[1][0] - held[0][0], held[1][1] - held[0][1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=200)
    args = parser.parse_args()
    torch.set_num_threads(1)
    print("| model | bare, ms a step | wrapped beyond it, us | ratio | hooks off, us | memory with a batch | after the step |")
    print("|---|---|---|---|---|---|---|")
    for name in MODELS:
        between, after = memory(name)
        run = Run(name, "bare")
        steps = max(1, round(0.02 / run.seconds(20)))  # blocks of about 20 ms
        rounds = []
        for n in range(args.rounds):  # in turns, each first in a third of the rounds
            times = {}
            for how in [*HOWS[n % 3 :], *HOWS[: n % 3]]:
                run.wear(how)
                run.seconds(1)
                times[how] = run.seconds(steps)
            rounds.append(times)
        base, ratio = median(t["bare"] for t in rounds), median(t["wrapped"] / t["bare"] for t in rounds)
        beyond = [1e6 * median(t[how] - t["bare"] for t in rounds) for how in HOWS[1:]]
        figures = f"{1e3 * base:.3f} | {beyond[0]:.1f} | {ratio:.4f} | {beyond[1]:.1f} | {between:+,} B | {after:+,} B"
        print(f"| {name} | {figures} |", flush=True)


if __name__ == "__main__":
    main()

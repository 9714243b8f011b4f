"""A run with faults at random steps, as a program that can be killed: python tests/soaking.py DIR --base adamw ...

Every step's loss and the checksum of its parameters go into DIR/log; DIR/checkpoint.pt is written every `--every` steps.
Started again it goes on from there. What breaks is drawn from the seed and the step alone, so that a run that was killed
meets the same faults.
"""

from __future__ import annotations

import argparse
import logging
import math
import os
import random
import signal
import zlib
from pathlib import Path

import torch
from torch import nn

from adaptive_opt import AdaptiveOptimizer, LanczosProbe

STYLES = ("closure", "capture", "objective")
BASES = {
    "adamw": lambda p: torch.optim.AdamW(p, lr=2e-3),
    "momentum": lambda p: torch.optim.SGD(p, lr=0.02, momentum=0.9),
}
FAULTS = ("nan loss", "nan gradient", "inf activation", "x1e6", "zeros", "nan parameter", "raise")
CLASSES = 4


class Broken(Exception):
    """The user's own."""


class Soak:
    """One run; `step` takes the next step and returns its line of the log."""

    def __init__(self, base: str, style: str, seed: int, rate: float):
        torch.manual_seed(seed)
        self.seed, self.style, self.rate, self.done = seed, style, rate, 0
        self.model = nn.Sequential(
            nn.Conv2d(1, 4, 3, stride=2), nn.BatchNorm2d(4), nn.ReLU(), nn.Dropout(0.1), nn.Flatten(), nn.Linear(36, CLASSES)
        )
        self.criterion = nn.CrossEntropyLoss()
        self.batch = self._batch(0)
        sources = {"closure": {}, "capture": {"loss_fn": self.criterion}, "objective": {"objective": self._loss}}
        # a fixed price: with a measured one the readings come when the clock says, in every run at other steps
        self.optimizer = AdaptiveOptimizer(
            BASES[base](self.model.parameters()), self.model, probe=LanczosProbe(overhead=0.05, price=1.0), **sources[style]
        )
        self.fault: str | None = None
        self.model[2].register_forward_hook(self._overflow)
        self.raised = 0
        self.faults: dict[str, int] = {}

    def step(self) -> str:
        draw = random.Random(f"{self.seed}:{self.done}")
        self.fault = draw.choice(FAULTS) if self.done and draw.random() < self.rate else None
        if self.fault is not None:
            self.faults[self.fault] = self.faults.get(self.fault, 0) + 1
        self.batch = self._batch(self.done)
        if self.fault == "nan parameter":
            with torch.no_grad():
                draw.choice(list(self.model.parameters())).view(-1)[0] = math.nan
        loss = self._taken()
        self.done += 1
        tensors, check = list(self.model.state_dict().values()), 0  # running statistics too
        finite = all(bool(torch.isfinite(t).all()) for t in tensors)
        for t in tensors:
            check = zlib.crc32(t.numpy().tobytes(), check)
        return f"{self.done} {self.fault or '-'} {loss!r} {check:08x} {'finite' if finite else 'NOT FINITE'}"

    def _taken(self) -> float | None:
        try:
            if self.style == "closure":
                return self.optimizer.step(self._closure).item()
            loss = self._closure()
            self.optimizer.step()
            return loss.item()
        except Broken:
            self.raised += 1
            return None

    def _closure(self) -> torch.Tensor:
        self.optimizer.zero_grad()
        loss = self._loss()
        if self.fault == "nan loss":
            loss = loss * math.nan
        loss.backward()
        if self.fault == "nan gradient":
            self.model[0].weight.grad.view(-1)[3] = math.nan
        if self.fault == "raise":
            raise Broken("in the middle of the user's own code")
        return loss

    def _loss(self) -> torch.Tensor:
        x, y = self.batch
        return self.criterion(self.model(x), y)

    def _overflow(self, module: nn.Module, args: object, output: torch.Tensor) -> torch.Tensor | None:
        if self.fault != "inf activation":
            return None
        return output.index_fill(1, torch.tensor([2]), math.inf)

    def _batch(self, step: int) -> tuple[torch.Tensor, torch.Tensor]:
        generator = torch.Generator().manual_seed(1000003 * self.seed + step)
        x = torch.randn(32, 1, 8, 8, generator=generator)
        y = (x.flatten(1)[:, :CLASSES] + 0.3 * torch.randn(32, CLASSES, generator=generator)).argmax(1)
        fault = getattr(self, "fault", None)
        return x * {"x1e6": 1e6, "zeros": 0.0}.get(fault or "", 1.0), y

    # ---- checkpoint ---------------------------------------------------------------------------------------------------

    def save(self, folder: Path) -> None:
        state = {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "rng": torch.get_rng_state(),
            "done": self.done,
        }
        torch.save(state, folder / "new.pt")
        os.replace(folder / "new.pt", folder / "checkpoint.pt")

    def load(self, folder: Path) -> None:
        state = torch.load(folder / "checkpoint.pt", weights_only=True)
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        torch.set_rng_state(state["rng"])
        self.done = state["done"]


def soak(
    folder: Path,
    base: str,
    style: str,
    *,
    seed: int = 0,
    rate: float = 0.05,
    steps: int = 10_000,
    every: int = 100,
    die_at: int | None = None,
) -> Soak:
    """Run, or go on with, `steps` steps in `folder`; at step `die_at` the process is killed, in the middle of that step."""
    folder.mkdir(parents=True, exist_ok=True)
    run, log = Soak(base, style, seed, rate), folder / "log"
    if (folder / "checkpoint.pt").exists():
        run.load(folder)
        log.write_text("".join(log.read_text().splitlines(keepends=True)[: run.done]))
    with log.open("a") as out:
        while run.done < steps:
            if run.done == die_at:
                out.flush()
                run.model.register_forward_hook(lambda *_: os.kill(os.getpid(), signal.SIGKILL))
            out.write(run.step() + "\n")
            if run.done % every == 0:
                out.flush()
                run.save(folder)
    return run


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--base", choices=BASES, default="adamw")
    parser.add_argument("--style", choices=STYLES, default="capture")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--rate", type=float, default=0.05, help="of the steps that are broken, one fault each")
    parser.add_argument("--steps", type=int, default=10_000)
    parser.add_argument("--every", type=int, default=100, help="steps between checkpoints")
    parser.add_argument("--die-at", type=int, default=None, help="SIGKILL in the middle of this step")
    args = parser.parse_args()
    torch.set_num_threads(1)
    logging.getLogger("adaptive_opt").setLevel(logging.ERROR)
    run = soak(**vars(args))
    lines = (args.folder / "log").read_text().splitlines()
    print(f"{run.done} steps; not finite after {sum(line.endswith('NOT FINITE') for line in lines)}; faults here {run.faults}")


if __name__ == "__main__":
    main()

"""python scripts/bench_overhead.py [--steps N ...]

How much of the training time the default probe takes: counted in gradient-equivalents, and measured by process time, on models
whose step is long and on one whose step is all launches. The price is what a counted gradient took of the run's own steps.
"""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from torch.optim import AdamW
from tqdm import trange

from adaptive_opt import AdaptiveOptimizer, ConstantPolicy, LanczosProbe
from experiments.tasks.base import Task
from experiments.tasks.digits import Digits
from experiments.tasks.mnist import MNIST

TASKS: dict[str, Callable[[], Task]] = {"MLP on digits": Digits, "CNN on MNIST": MNIST}


def row(name: str, steps: int, price: float | None) -> str:
    task = TASKS[name]()
    base = AdamW(task.model.parameters(), lr=1e-3)
    probe = LanczosProbe(overhead=0.05, price=price)
    optimizer = AdaptiveOptimizer(base, task.model, loss_fn=task.loss_fn, probe=probe, policy=ConstantPolicy("base"))
    clock, readings = optimizer.control.memory.clock, {"cheap": 0, "full": 0}
    for step in trange(steps, desc=f"{name}, {steps} steps, price {price or 'measured'}", leave=False):
        x, y = task.batch(step)
        optimizer.zero_grad()
        task.loss_fn(task.model(x), y).backward()
        optimizer.step()
        clock.tick(torch.device("cpu"))  # so that a fixed price is timed too
        reading = optimizer.report.reading if optimizer.report else None
        if reading is not None:
            readings[reading.kind] += 1
    training = clock.total - clock.probing
    memory = optimizer.control.memory
    return (
        f"| {name} | {steps} | {1e3 * training / steps:.2f} | {readings['cheap']} + {readings['full']} "
        f"| {memory.spent / steps:.1%} | {clock.probing / training:.1%} | {price or memory.price:.3g} |"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, nargs="+", default=[1000, 4000])
    args = parser.parse_args()
    torch.set_num_threads(1)
    logging.getLogger("adaptive_opt").setLevel(logging.ERROR)
    print("| model | steps | ms a step | readings: cheap + full | counted | measured | price |")
    print("|---|---|---|---|---|---|---|")
    for name in TASKS:
        for steps in args.steps:
            for price in (None, 1.0):
                print(row(name, steps, price), flush=True)


if __name__ == "__main__":
    main()

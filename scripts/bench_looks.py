"""python scripts/bench_looks.py [--seeds K] [--shares 1 0.1]

Whether a look ahead sees what an early reading sees: both at steps 0, 1, 2, 4, ... 32 of bare runs, at sensible learning rates
and at 3 to 1000 times these, and on the workloads of the clinic. A step is too long by its reading where that is above twice
the stability limit and overshoots more than twice (Thresholds); a look that overshoots more than twice asks for a reading.
"""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from torch.optim import Optimizer
from tqdm import tqdm

from adaptive_opt import AdaptiveOptimizer, ConstantPolicy, LanczosProbe
from adaptive_opt.controller import OVERSHOOTS
from adaptive_opt.diagnosis import Thresholds
from adaptive_opt.objective import ReplayError
from experiments.clinic.arms import base_of
from experiments.clinic.workloads import WORKLOADS
from experiments.tasks.base import Task, loss_of, source_of
from scripts.bench_treatments import RATES

STEPS = (0, 1, 2, 4, 8, 16, 32)
FACTORS = (1, 3, 10, 100, 1000)


def starts(seed: int) -> Iterator[tuple[str, Task, Optimizer]]:
    for name, (make, base, lr) in RATES.items():
        for factor in FACTORS:
            task = make(seed)
            yield f"{name} x{factor}", task, base(task.model.parameters(), lr=lr * factor)
    for name, workload in WORKLOADS.items():
        for base in ("AdamW", "SGD"):
            task = workload.task(seed)
            yield f"{name}, {base}", task, base_of(base, task.model, workload.rates[base] * workload.factor)


def seen(task: Task, base: Optimizer, shares: list[float]) -> Iterator[tuple[int, bool, list[bool]]]:
    """Step, whether the step is too long by its reading, and whether a look at each share asks for that reading."""
    optimizer = AdaptiveOptimizer(
        base, task.model, **source_of(task), probe=LanczosProbe(overhead=0), policy=ConstantPolicy("base", ("damp",))
    )
    control, limits = optimizer.control, Thresholds()
    torch.manual_seed(1000)
    for step in range(STEPS[-1] + 1):
        x, y = task.batch(step)
        optimizer.zero_grad()
        loss_of(task, x, y).backward()
        if step in STEPS:
            with torch.no_grad():
                ctx = control.gate.context(control.modes["base"])
                assert ctx.objective is not None
                try:
                    if not control.gate.passes(ctx):
                        return  # no number any more
                except ReplayError:
                    return
                looks = [control.probe.look_ahead(ctx.objective, base, control.memory, step, share) for share in shares]
                r = control._read(ctx.objective, ctx.mode, "cheap", layers=False)
            too_long = (r.stability or 0.0) > limits.unstable and (r.overshoot or 0.0) > limits.overshoot
            yield step, too_long, [(look or 0.0) > OVERSHOOTS for look in looks]
        base.step()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--shares", type=float, nargs="+", default=[1.0, 0.1], help="of the coming step")
    args = parser.parse_args()
    torch.set_num_threads(1)
    logging.getLogger("adaptive_opt").setLevel(logging.ERROR)
    rows, missed = [], []
    for seed in range(args.seeds):
        for name, task, base in tqdm(list(starts(seed)), desc=f"seed {seed}", disable=not sys.stderr.isatty()):
            for step, too_long, asked in seen(task, base, args.shares):
                rows.append((too_long, asked))
                missed += [(share, name, step) for share, a in zip(args.shares, asked, strict=True) if too_long and not a]
    print("| look at | readings | too long by the reading | of these the look missed | looks that asked for a reading |")
    print("|---|---|---|---|---|")
    for i, share in enumerate(args.shares):
        long, asks = sum(t for t, _ in rows), sum(a[i] for _, a in rows)
        print(f"| {share:g} of the step | {len(rows)} | {long} | {sum(t and not a[i] for t, a in rows)} | {asks} |")
    for share, name, step in missed:
        print(f"missed at {share:g}: {name}, step {step}")


if __name__ == "__main__":
    main()

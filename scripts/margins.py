"""python scripts/margins.py [--seeds K] [--workloads NAME ...] [--steps N]

How far from its threshold every number stays in healthy runs that nobody treats, and how far sick ones go: the table of
docs/evidence.md, "margins". The clinic's workloads, both bases, a full reading every 20 steps.
"""

from __future__ import annotations

import argparse
import logging
import math
import sys
import warnings
from pathlib import Path
from statistics import median
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402

from adaptive_opt import AdaptiveOptimizer, ConstantPolicy, LanczosProbe  # noqa: E402
from adaptive_opt.records import Reading, chains  # noqa: E402
from adaptive_opt.signals import LEARNED, WINDOW  # noqa: E402
from experiments.clinic.arms import base_of  # noqa: E402
from experiments.clinic.records import BASES  # noqa: E402
from experiments.clinic.workloads import WORKLOADS  # noqa: E402
from experiments.faults import Faults  # noqa: E402
from experiments.tasks.base import loss_of, source_of  # noqa: E402

HEALTHY = [w.name for w in WORKLOADS.values() if w.healthy]
SICK = ["lr x10", "lr x100", "corrupted batches", "layers x3", "layers x0.4", "one layer x30"]
EVERY = 20  # steps between two readings
Numbers = dict[str, float]


def extremes(workload: str, base: str, seed: int, steps: int | None) -> Numbers:
    """The largest value of each number that the diagnosis compares with a threshold; of a run that is left alone."""
    w = WORKLOADS[workload]
    task = w.task(seed)
    inner = base_of(base, task.model, w.rates[base] * w.factor)
    probe = LanczosProbe(every=EVERY, num_steps=6)
    optimizer = AdaptiveOptimizer(inner, task.model, policy=ConstantPolicy(), probe=probe, **source_of(task))
    faults = Faults(*w.faults, seed=seed) if w.faults is not None else None
    torch.manual_seed(1000 + seed)
    total = min(task.steps, steps or task.steps)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(inner, total)
    losses, norms, out = [], [], {}

    def most(name: str, value: float | None) -> None:
        if value is not None and math.isfinite(value):
            out[name] = max(out.get(name, 0.0), value)

    for step in range(total):
        x, y = task.batch(step)
        x = x if faults is None else faults(x)
        optimizer.zero_grad()
        loss_of(task, x, y).backward()
        optimizer.step()
        schedule.step()
        report = optimizer.report
        assert report is not None
        loss, norm = report.loss, report.grad_norm
        if loss is None or norm is None or not math.isfinite(loss) or not math.isfinite(norm):
            most("not finite, share of the steps", 1 / total + out.get("not finite, share of the steps", 0.0))
            continue
        if len(norms) >= LEARNED:
            apart = min(loss / max(losses[-WINDOW:]) / 3, norm / max(norms[-WINDOW:]) / 5)
            most("jump of loss and gradient, of what counts as one", apart)
        losses.append(loss)
        norms.append(norm)
        if len(losses) >= 30:
            most("median loss of five over that of twenty", median(losses[-5:]) / median(losses[-25:-5]))
        if report.reading is not None:
            of_reading(report.reading, most)
    return out


def of_reading(r: Reading, most: Any) -> None:
    when = "first" if r.step == 0 else "later"
    most(f"stability, {when}", r.stability)
    most(f"overshoot, {when}", r.overshoot)
    if r.step == 0:
        for chain in chains(r.layers, 3):
            logs = [math.log(layer.sigma_rms) for layer in chain]
            most("layer off 1, times", math.exp(min(700.0, max(map(abs, logs[:-1] or logs)))))
            most("chain off 1, times", math.exp(min(700.0, abs(sum(logs)))))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--workloads", nargs="+", choices=list(WORKLOADS), default=[*HEALTHY, *SICK], metavar="NAME")
    parser.add_argument("--steps", type=int, help="at most; the workload's own if it has fewer")
    args = parser.parse_args()
    if args.seeds < 1:
        parser.error(f"--seeds {args.seeds}: 1 or more")
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")  # a run that is left alone may end in NaN, and says so
    logging.getLogger("adaptive_opt").setLevel(logging.ERROR)
    rows: dict[str, list[Numbers]] = {}
    for name in args.workloads:
        for base in BASES:
            rows[f"{name}, {base}"] = [extremes(name, base, seed, args.steps) for seed in range(args.seeds)]
    names = list(dict.fromkeys(k for runs in rows.values() for run in runs for k in run))
    print("| largest of every run | " + " | ".join(names) + " |\n" + "|---" * (len(names) + 1) + "|")
    for row, runs in rows.items():
        cells = [spread([run[k] for run in runs if k in run]) for k in names]
        print("| " + " | ".join([row, *cells]) + " |", flush=True)


def spread(values: list[float]) -> str:
    if not values:
        return ""
    low, high = f"{min(values):.2g}", f"{max(values):.2g}"
    return low if low == high else f"{low} to {high}"


if __name__ == "__main__":
    main()

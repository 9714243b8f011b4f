"""python scripts/bench_agreement.py [--seeds K] [--workloads ...]

Whether the gradients of successive batches agree, on the clinic's bare runs: the mean |cosine| over windows of ten steps
(adaptive_opt/agreement.py), by which the rules decide whether kfac is worth a trial. Deterministic.
"""

from __future__ import annotations

import argparse
import math
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from tqdm import tqdm

from adaptive_opt.agreement import EVERY, FIRST, WINDOW, Agreement
from experiments.clinic.arms import base_of
from experiments.clinic.workloads import WORKLOADS
from experiments.tasks.base import loss_of

ENDS = [FIRST + WINDOW + EVERY * i for i in range(4)]  # steps at which a window ends


def means(workload: str, base_name: str, seed: int) -> list[float | None]:
    """Mean |cosine| of the windows that end at ENDS in a bare run with the clinic's cosine schedule."""
    w = WORKLOADS[workload]
    task = w.task(seed)
    base = base_of(base_name, task.model, w.rates[base_name] * w.factor)
    params = [p for group in base.param_groups for p in group["params"]]
    rates, agreement, found = [group["lr"] for group in base.param_groups], Agreement(), dict[int, float | None]()
    torch.manual_seed(1000 + seed)
    for step in range(ENDS[-1] + 1):
        for group, rate in zip(base.param_groups, rates, strict=True):
            group["lr"] = rate * 0.5 * (1 + math.cos(math.pi * min(step / task.steps, 1.0)))
        x, y = task.batch(step)
        base.zero_grad()
        loss_of(task, x, y).backward()
        if agreement.due(step) and agreement.see(step, params, range(len(params))):
            found[step] = agreement.now(step)
        base.step()
    return [found[step] for step in ENDS]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--workloads", nargs="+", choices=list(WORKLOADS), default=list(WORKLOADS), metavar="NAME")
    args = parser.parse_args()
    torch.set_num_threads(1)
    print(f"| least to most of {args.seeds} seeds | {' | '.join(f'step {step}' for step in ENDS)} |")
    print("|---" * (len(ENDS) + 1) + "|")
    for workload in tqdm(args.workloads, disable=not sys.stderr.isatty()):
        for base in ("AdamW", "SGD"):
            if WORKLOADS[workload].faults is not None:
                continue  # the wrapper leaves such batches out
            rows = [means(workload, base, seed) for seed in range(args.seeds)]
            columns = [[x for x in column if x is not None and math.isfinite(x)] for column in zip(*rows, strict=True)]
            said = [f"{min(c):.2f} to {max(c):.2f}" if c else "-" for c in columns]
            print(f"| {workload}, {base} | {' | '.join(said)} |")


if __name__ == "__main__":
    main()

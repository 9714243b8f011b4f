"""python scripts/bench_step_size.py [--seeds K] [--workloads ...] [--bases ...] [--out FILE.jsonl] [--figure FILE.png]

Bare over nine learning rates, the wrapped optimizer over the same nine (`step_size="user"`), and `step_size="auto"`, which
takes none: the section "step size" of docs/evidence.md. Same cosine schedule and steps for all. One line a run; what is in
the file is not run again.
"""

from __future__ import annotations

import argparse
import json
import logging
import math
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402
from torch.optim import SGD, AdamW, Optimizer, RMSprop  # noqa: E402
from torch.optim.lr_scheduler import CosineAnnealingLR  # noqa: E402
from tqdm import tqdm  # noqa: E402

from adaptive_opt import AdaptiveOptimizer  # noqa: E402
from experiments.loop import train  # noqa: E402
from experiments.tasks.base import Task  # noqa: E402
from experiments.tasks.digits import Digits  # noqa: E402
from experiments.tasks.mnist import MNIST  # noqa: E402

WORKLOADS: dict[str, Callable[[int], Task]] = {
    "MLP 3 layers": lambda seed: Digits(seed, steps=400),
    "MLP 13 layers": lambda seed: Digits(seed, steps=400, depth=12),
    "CNN MNIST": lambda seed: MNIST(seed, steps=400),
}
BASES: dict[str, tuple[Callable[[Any, float], Optimizer], float]] = {  # and the middle of the nine learning rates
    "AdamW": (lambda p, lr: AdamW(p, lr=lr), 1e-2),
    "heavy ball": (lambda p, lr: SGD(p, lr, momentum=0.9), 3e-2),
    "SGD": (lambda p, lr: SGD(p, lr), 0.3),
    "RMSprop": (lambda p, lr: RMSprop(p, lr=lr), 3e-3),
}
POWERS = [k / 2 for k in range(-4, 5)]  # of ten, around the middle


def runs(seeds: int, workloads: list[str], bases: list[str]) -> list[dict[str, Any]]:
    one = [(arm, k) for arm in ("bare", "user") for k in POWERS] + [("auto", 0.0)]
    return [
        {"workload": w, "base": b, "seed": s, "arm": arm, "power": k}
        for w in workloads
        for b in bases
        for s in range(seeds)
        for arm, k in one
    ]


def outcome(run: dict[str, Any]) -> dict[str, Any]:
    """Mean loss of the last 20 steps, test accuracy, and the probe's share of the gradient work."""
    task, (make, middle) = WORKLOADS[run["workload"]](run["seed"]), BASES[run["base"]]
    optimizer = make(task.model.parameters(), middle * 10 ** run["power"])
    if run["arm"] != "bare":
        optimizer = AdaptiveOptimizer(optimizer, task.model, loss_fn=task.loss_fn, step_size=run["arm"])
    schedule = CosineAnnealingLR(optimizer, task.steps)
    torch.manual_seed(0)
    done = train(task, optimizer, schedule=schedule)
    return {"loss": statistics.fmean(done.losses[-20:]), "accuracy": done.metrics["test_accuracy"], "probing": done.overhead}


def finite(loss: float) -> float:
    return loss if math.isfinite(loss) else math.inf


def table(rows: list[dict[str, Any]]) -> str:
    """Per workload and base: the best of the sweep, the width of the basin within twice the best, and auto beside them."""
    lines = [
        "| | best of nine, bare | basin, bare | basin, user | auto | auto / best | probing |",
        "|---|---|---|---|---|---|---|",
    ]
    for w, b in dict.fromkeys((r["workload"], r["base"]) for r in rows):
        these = [r for r in rows if (r["workload"], r["base"]) == (w, b)]
        means = {
            (arm, k): statistics.fmean([finite(r["loss"]) for r in these if (r["arm"], r["power"]) == (arm, k)])
            for arm, k in dict.fromkeys((r["arm"], r["power"]) for r in these)
        }
        bare = {k: v for (arm, k), v in means.items() if arm == "bare"}
        best = min(bare, key=lambda k: bare[k])
        accuracy = [r["accuracy"] for r in these if (r["arm"], r["power"]) == ("bare", best)]
        cells = [f"{bare[best]:.4f}, {statistics.fmean(accuracy):.1f} %, lr {BASES[b][1] * 10**best:.2g}"]
        for arm in ("bare", "user"):
            inside = [k for (a, k), v in means.items() if a == arm and v <= 2 * bare[best]]
            cells.append(f"x{10 ** (max(inside) - min(inside)):.3g}" if inside else "-")
        auto = [r for r in these if r["arm"] == "auto"]
        value = means.get(("auto", 0.0), math.nan)
        cells.append(f"{value:.4f}, {statistics.fmean([r['accuracy'] for r in auto]):.1f} %" if auto else "-")
        cells += [f"{value / bare[best]:.2f}", f"{statistics.fmean([r['probing'] for r in auto]):.1%}" if auto else "-"]
        lines.append(f"| {w}, {b} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def figure(rows: list[dict[str, Any]], path: Path) -> None:
    """Final loss over learning rate: bare, wrapped, and auto as the line that has none."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    workloads, bases = (list(dict.fromkeys(r[k] for r in rows)) for k in ("workload", "base"))
    drawn, axes = plt.subplots(len(workloads), len(bases), figsize=(3.4 * len(bases), 2.6 * len(workloads)), squeeze=False)
    for i, w in enumerate(workloads):
        for j, b in enumerate(bases):
            axis, these = axes[i][j], [r for r in rows if (r["workload"], r["base"]) == (w, b)]
            for arm, colour in (("bare", "#d1495b"), ("user", "#0b6e4f")):
                curve = {
                    k: statistics.fmean([min(finite(r["loss"]), 10.0) for r in these if (r["arm"], r["power"]) == (arm, k)])
                    for k in sorted({r["power"] for r in these if r["arm"] == arm})
                }
                shown = "bare" if arm == "bare" else 'wrapped, step_size="user"'
                axis.loglog([BASES[b][1] * 10**k for k in curve], list(curve.values()), "o-", color=colour, ms=3.5, label=shown)
            auto = [finite(r["loss"]) for r in these if r["arm"] == "auto"]
            if auto:
                axis.axhline(statistics.fmean(auto), color="#edae49", lw=2, label='wrapped, step_size="auto"')
            axis.set_title(f"{w}, {b}", fontsize=9)
            axis.tick_params(labelsize=8)
            axis.spines[["top", "right"]].set_visible(False)
    for axis in axes[-1]:
        axis.set_xlabel("learning rate", fontsize=8)
    for row in axes:
        row[0].set_ylabel("training loss at the end", fontsize=8)
    axes[0][0].legend(fontsize=7, frameon=False)
    drawn.tight_layout()
    drawn.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--workloads", nargs="+", choices=WORKLOADS, default=list(WORKLOADS))
    parser.add_argument("--bases", nargs="+", choices=BASES, default=list(BASES))
    parser.add_argument("--out", type=Path, default=ROOT / "runs" / "bench_step_size.jsonl")
    parser.add_argument("--figure", type=Path, default=None)
    args = parser.parse_args()
    logging.getLogger("adaptive_opt").setLevel(logging.ERROR)
    torch.set_num_threads(1)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    known = [json.loads(line) for line in args.out.read_text().splitlines()] if args.out.exists() else []
    wanted = runs(args.seeds, args.workloads, args.bases)
    missing = [run for run in wanted if not any(run.items() <= row.items() for row in known)]
    for run in tqdm(missing, desc="step size", disable=not sys.stderr.isatty()):
        known.append({**run, **outcome(run)})
        with args.out.open("a") as file:
            file.write(json.dumps(known[-1]) + "\n")
    shown = [row for row in known if any(run.items() <= row.items() for run in wanted)]
    print(table(shown))
    if args.figure is not None:
        figure(shown, args.figure)


if __name__ == "__main__":
    main()

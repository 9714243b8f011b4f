"""python scripts/bench_step_size.py [--seeds K] [--workloads ...] [--bases ...] [--arms ...] [--ablate] [--out FILE.jsonl]

Bare over nine learning rates, the wrapped optimizer over the same nine (`step_size="user"`), `step_size="auto"`, which takes
none, and the peers that take none (experiments/learning_rate_free.py): the section "step size" of docs/evidence.md. The same
budget of gradient-equivalents for all: what probes or tries steps less. Cosine annealing over the budget for all but
those whose authors want none. One line a run; what is in the file is not run again. `--figure FILE.png` draws it, and
`--ablate` switches the ingredients of "auto" off, one at a time.
"""

from __future__ import annotations

import argparse
import json
import logging
import math
import statistics
import sys
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any
from unittest.mock import patch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402
from joblib import Parallel, delayed  # noqa: E402
from torch.optim import SGD, Adam, AdamW, Optimizer, RMSprop  # noqa: E402
from torch.optim.lr_scheduler import LambdaLR  # noqa: E402
from tqdm import tqdm  # noqa: E402

from adaptive_opt import AdaptiveOptimizer, RulePolicy  # noqa: E402
from adaptive_opt.interventions import auto_step  # noqa: E402
from adaptive_opt.schedule import Schedule  # noqa: E402
from experiments.clinic.book import revision  # noqa: E402
from experiments.learning_rate_free import PEERS, Peer, judged  # noqa: E402
from experiments.loop import train  # noqa: E402
from experiments.tasks.autoencoder import Autoencoder  # noqa: E402
from experiments.tasks.base import Task, source_of  # noqa: E402
from experiments.tasks.digits import Digits  # noqa: E402
from experiments.tasks.gpt import CharGPT  # noqa: E402
from experiments.tasks.mnist import MNIST  # noqa: E402
from experiments.tasks.poisson import Poisson  # noqa: E402
from experiments.tasks.resnet import ResNet  # noqa: E402
from experiments.tasks.sequence import Sequence  # noqa: E402
from experiments.tasks.tabular import Tabular  # noqa: E402

WORKLOADS: dict[str, Callable[[int], Task]] = {
    "MLP 3 layers": lambda seed: Digits(seed, steps=400),
    "MLP 13 layers": lambda seed: Digits(seed, steps=400, depth=12),
    "CNN MNIST": lambda seed: MNIST(seed, steps=400, width=8),
    "ResNet-20": lambda seed: ResNet(seed, steps=200, batch_size=32),
    "char-GPT": lambda seed: CharGPT(seed, steps=400, batch_size=8),
    "RNN": lambda seed: Sequence(seed, steps=400),
    "LSTM": lambda seed: Sequence(seed, steps=400, cell="lstm", stride=2),
    "PINN": lambda seed: Poisson(seed, steps=400),
    "autoencoder": lambda seed: Autoencoder(seed, steps=400),
    "tabular": lambda seed: Tabular(seed, steps=400, scaled=True),
}
BASES: dict[str, tuple[Callable[[Any, float], Optimizer], float]] = {  # and the middle of the nine learning rates
    "AdamW": (lambda p, lr: AdamW(p, lr=lr), 1e-2),
    "Adam": (lambda p, lr: Adam(p, lr=lr), 1e-2),
    "heavy ball": (lambda p, lr: SGD(p, lr, momentum=0.9), 3e-2),
    "SGD": (lambda p, lr: SGD(p, lr), 0.3),
    "RMSprop": (lambda p, lr: RMSprop(p, lr=lr), 3e-3),
}
MIDDLES = {("PINN", "heavy ball"): 1e-4}  # a loss of 600 and a curvature to match: all of the nine would diverge
POWERS = [k / 2 for k in range(-4, 5)]  # of ten, around the middle
OURS = ("bare", "user", "auto")
# "auto" without one of its ingredients: what stands in its place
WITHOUT: dict[str, Callable[[], AbstractContextManager[Any]]] = {
    "readings alone": lambda: patch.object(
        auto_step, "has_momentum", lambda base: False
    ),  # the rule for steps without momentum
    "no looks": lambda: patch.object(Schedule, "looks_ahead", lambda *args: False),
    "no careful start": lambda: patch.object(auto_step.AutoStep, "_first", lambda self, bottom: bottom),
    "grows at once": lambda: patch.object(auto_step, "GROWTH", 1e9),
    "always to the bottom": lambda: patch.object(auto_step.AutoStep, "_kept", lambda self, present, length, bottom: length),
    "kfac not tried": lambda: patch.object(RulePolicy, "_untried", lambda self, history: None),
}
SOLVED = 1e-5  # a mean loss below it counts as that: the tabular net learns its 400 patients by heart, to 0 exactly
JUDGED = 20  # batches of the training set that the final loss is the mean of


def runs(seeds: int, workloads: list[str], bases: list[str], arms: list[str]) -> list[dict[str, Any]]:
    """A seed after the other, and in it an arm; the peers bring their own base: one run a workload and seed."""
    rates = {"bare": POWERS, "user": POWERS, "auto": [0.0]}
    return [
        {"workload": w, "base": b, "seed": s, "arm": arm, "power": k}
        for s in range(seeds)
        for arm in arms
        for w in workloads
        for b in (["own"] if arm in PEERS else bases)
        for k in rates.get(arm, [0.0])
    ]


def rate(workload: str, base: str, power: float) -> float:
    """The learning rate, `power` powers of ten from the middle of the nine."""
    return MIDDLES.get((workload, base), BASES[base][1]) * 10**power


class Spent:
    """Gradient-equivalents so far of a budget; the cosine over it, and whether it is used up."""

    def __init__(self, optimizer: Optimizer, budget: float, extra: float = 0.0):
        self.optimizer, self.budget, self.each = optimizer, budget, 1 + extra
        self.steps = 0

    def share(self) -> float:
        report = self.optimizer.report if isinstance(self.optimizer, AdaptiveOptimizer) else None
        ours = report.probe_cost + report.treatment_cost if report is not None else 0.0
        return min((self.steps * self.each + ours) / self.budget, 1.0)

    def cosine(self, _: int = 0) -> float:
        return (1 + math.cos(math.pi * self.share())) / 2

    def gone(self, _: float) -> bool:
        self.steps += 1
        return self.share() >= 1


def peer(run: dict[str, Any], task: Task) -> tuple[Peer, Spent]:
    """Ours and the bare base in the peers' clothes."""
    if run["arm"] in PEERS:
        made = PEERS[run["arm"]](task, task.steps)
        return made, Spent(made.optimizer, task.steps, made.extra)
    make, _ = BASES[run["base"]]
    optimizer = make(task.model.parameters(), rate(run["workload"], run["base"], run["power"]))
    if run["arm"] != "bare":
        size = "user" if run["arm"] == "user" else "auto"
        optimizer = AdaptiveOptimizer(optimizer, task.model, step_size=size, **source_of(task))
    spent = Spent(optimizer, task.steps)
    return Peer(optimizer, LambdaLR(optimizer, spent.cosine)), spent


def outcome(run: dict[str, Any]) -> dict[str, Any]:
    """Mean training loss at the end, the task's own metrics, and the probe's share of the gradient work."""
    torch.set_num_threads(1)
    logging.getLogger("adaptive_opt").setLevel(logging.ERROR)
    task = WORKLOADS[run["workload"]](run["seed"])
    task.steps = run.get("budget", task.steps)
    torch.manual_seed(0)
    began = time.process_time()
    try:
        with WITHOUT.get(run["arm"], nullcontext)():
            made, spent = peer(run, task)
            done = train(task, made.optimizer, schedule=made.schedule, until=spent.gone)
    except Exception as error:  # a peer that breaks is a row that says so
        return {**run, "loss": math.nan, "error": f"{type(error).__name__}: {error}"}
    seconds = time.process_time() - began
    with made.weights():
        loss, metrics = judged(task, [task.batch(done.steps + i) for i in range(JUDGED)]), task.evaluate()
    return {**run, "loss": loss, "probing": done.overhead, "steps": done.steps, "seconds": seconds, **metrics}


def finite(loss: float) -> float:
    return loss if math.isfinite(loss) else math.inf


def mean(rows: list[dict[str, Any]]) -> float:
    """Over seeds; the losses span decades, so their geometric mean."""
    losses = [finite(r["loss"]) for r in rows]
    if not losses or math.inf in losses:
        return math.inf if losses else math.nan
    return math.exp(statistics.fmean(math.log(max(loss, SOLVED)) for loss in losses))


def table(rows: list[dict[str, Any]]) -> str:
    """Per workload and base: the best of the sweep, the basins within 2 and 10 times the best, auto and peers over the best."""
    peers = [arm for arm in (*WITHOUT, *PEERS) if any(r["arm"] == arm for r in rows)]
    lines = [
        "| | best of nine, bare | basin, bare | basin, user | at the best lr, user | auto | probing | "
        + " | ".join(peers)
        + " |",
        "|---" * (7 + len(peers)) + "|",
    ]
    regrets: dict[str, list[float]] = {arm: [] for arm in ("auto", *peers)}
    for w, b in dict.fromkeys((r["workload"], r["base"]) for r in rows if r["base"] != "own"):
        these = [r for r in rows if r["workload"] == w and r["base"] in (b, "own")]
        means = {
            (arm, k): mean([r for r in these if (r["arm"], r["power"]) == (arm, k)])
            for arm, k in dict.fromkeys((r["arm"], r["power"]) for r in these)
        }
        bare = {k: v for (arm, k), v in means.items() if arm == "bare"}
        if not bare:
            continue
        best = min(bare, key=lambda k: bare[k])
        cells = [f"{bare[best]:.3g}, lr {rate(w, b, best):.2g}"]
        for arm in ("bare", "user"):
            losses = [v for (a, _), v in means.items() if a == arm]
            cells.append(", ".join(basin(losses, limit * bare[best]) for limit in (2, 10)) if losses else "-")
        cells.append(f"{means[('user', best)] / bare[best]:.2f}" if ("user", best) in means else "-")
        for arm in ("auto", *peers):
            ratio = means.get((arm, 0.0), math.nan) / bare[best]
            regrets[arm].append(ratio)
            cells.append(f"{ratio:.2f}")
            if arm == "auto":
                probing = [r["probing"] for r in these if r["arm"] == arm and "probing" in r]
                cells.append(f"{statistics.fmean(probing):.1%}" if probing else "-")
        lines.append(f"| {w}, {b} | " + " | ".join(cells) + " |")
    return "\n".join([*lines, "", *(regret(arm, ratios) for arm, ratios in regrets.items())])


def basin(losses: list[float], limit: float) -> str:
    """How wide the learning rates lie apart, in steps of sqrt(10), that reach the limit; 0 where none does."""
    reached = sum(loss <= limit for loss in losses)
    return f"x{10 ** ((reached - 1) / 2):.3g}" if reached else "0"


def regret(arm: str, ratios: list[float]) -> str:
    """How far above the best of nine rates: the mean of the logarithm (never below 0), and the shares within 5 and 25 %."""
    known = [x for x in ratios if not math.isnan(x)]
    if not known:
        return f"{arm}: not run"
    regrets = [math.log(min(max(x, 1.0), 1e3)) for x in known]
    within = [statistics.fmean(x <= limit for x in known) for limit in (1.05, 1.25)]
    return (
        f"{arm}: {math.exp(statistics.fmean(regrets)):.2f} times the best loss in the geometric mean (never below 1), "
        f"{within[0]:.0%} of {len(known)} within 5 %, {within[1]:.0%} within 25 %, at worst {max(known):.3g} times"
    )


def figure(rows: list[dict[str, Any]], path: Path) -> None:
    """Final loss over learning rate, a panel for each workload and base: bare, wrapped, and auto as the line that has none."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    panels = list(dict.fromkeys((r["workload"], r["base"]) for r in rows if r["base"] != "own"))
    across = min(len(panels), 5)
    down = -(-len(panels) // across)
    drawn, axes = plt.subplots(down, across, figsize=(2.5 * across, 2.3 * down + 0.4), squeeze=False)
    for axis in axes.flat[len(panels) :]:
        axis.axis("off")
    for axis, (w, b) in zip(axes.flat, panels, strict=False):
        these = [r for r in rows if (r["workload"], r["base"]) == (w, b)]
        ceiling = 2 * max((r["loss"] for r in these if math.isfinite(r["loss"]) and r["loss"] < 1e3), default=1.0)
        for arm, colour, shown in (("bare", "#d1495b", "bare"), ("user", "#0b6e4f", "wrapped")):
            curve = {
                k: min(mean([r for r in these if (r["arm"], r["power"]) == (arm, k)]), ceiling)
                for k in sorted({r["power"] for r in these if r["arm"] == arm})
            }
            axis.loglog([rate(w, b, k) for k in curve], list(curve.values()), "o-", color=colour, ms=3.5, label=shown)
        auto = [r for r in these if r["arm"] == "auto"]
        if auto:
            axis.axhline(mean(auto), color="#edae49", lw=2, label='wrapped, step_size="auto": no learning rate')
        axis.set_title(w if len({base for _, base in panels}) == 1 else f"{w}, {b}", fontsize=9)
        axis.tick_params(labelsize=7)
        low, high = axis.get_ylim()
        axis.tick_params(which="minor", labelleft=high < 10 * low, labelsize=7)
        axis.spines[["top", "right"]].set_visible(False)
    for axis in axes[-1]:
        axis.set_xlabel("learning rate", fontsize=8)
    for row in axes:
        row[0].set_ylabel("training loss at the end", fontsize=8)
    handles, labels = axes[0][0].get_legend_handles_labels()
    drawn.legend(handles, labels, loc="upper center", ncols=3, fontsize=8, frameon=False)
    drawn.tight_layout(rect=(0, 0, 1, 1 - 0.35 / (2.3 * down + 0.4)))
    drawn.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--workloads", nargs="+", choices=WORKLOADS, default=list(WORKLOADS))
    parser.add_argument("--bases", nargs="+", choices=BASES, default=["AdamW", "Adam", "heavy ball"])
    parser.add_argument("--arms", nargs="+", choices=[*OURS, *WITHOUT, *PEERS], default=[*OURS, *PEERS])
    parser.add_argument("--ablate", action="store_true", help="--arms bare auto and all of auto without an ingredient")
    parser.add_argument("--steps", type=int, default=None, help="gradient-equivalents of a run, in place of the workload's own")
    parser.add_argument("--jobs", type=int, default=1, help="processes")
    parser.add_argument("--out", type=Path, default=ROOT / "runs" / "bench_step_size.jsonl")
    parser.add_argument("--figure", type=Path, default=None)
    args = parser.parse_args()
    if args.ablate:
        args.arms = ["bare", "auto", *WITHOUT]
    args.out.parent.mkdir(parents=True, exist_ok=True)
    known = [json.loads(line) for line in args.out.read_text().splitlines()] if args.out.exists() else []
    wanted = runs(args.seeds, args.workloads, args.bases, args.arms)
    wanted = [{**run, "budget": args.steps} for run in wanted] if args.steps is not None else wanted
    known = [row for row in known if ("budget" in row) == (args.steps is not None)]
    missing = [run for run in wanted if not any(run.items() <= row.items() for row in known)]
    results = Parallel(n_jobs=args.jobs, return_as="generator_unordered")(delayed(outcome)(run) for run in missing)
    with args.out.open("a") as file:
        at = revision()
        for row in tqdm(results, total=len(missing), desc="step size", disable=not sys.stderr.isatty()):
            row = {**row, "revision": at, "date": time.strftime("%Y-%m-%d")}
            known.append(row)
            file.write(json.dumps(row) + "\n")
            file.flush()
    shown = [row for row in known if any(run.items() <= row.items() for run in wanted)]
    print(table(shown))
    for row in shown:
        if "error" in row:
            print(f"{row['workload']}, {row['arm']}, seed {row['seed']}: {row['error']}")
    if args.figure is not None:
        figure(shown, args.figure)


if __name__ == "__main__":
    main()

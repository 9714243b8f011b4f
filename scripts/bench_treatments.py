"""python scripts/bench_treatments.py [--seeds K] [--only rates layers canyon saddle healthy margins modes] [--out FILE.json]

What each treatment gains over the bare optimizer, and what it costs where nothing is wrong: the tables of docs/evidence.md.
"""

from __future__ import annotations

import argparse
import json
import logging
import math
import statistics
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402
from torch import nn  # noqa: E402
from torch.optim import SGD, Adagrad, Adam, AdamW, RMSprop  # noqa: E402
from torch.optim.lr_scheduler import CosineAnnealingLR  # noqa: E402
from tqdm import tqdm  # noqa: E402

from adaptive_opt import AdaptiveOptimizer, ConstantPolicy, LanczosProbe  # noqa: E402
from adaptive_opt.interventions import INTERVENTIONS, Damp  # noqa: E402
from adaptive_opt.modes import KFAC, SAM, BaseStep, Mode  # noqa: E402
from experiments.clinic.workloads.saddles import identical  # noqa: E402
from experiments.loop import Outcome, train  # noqa: E402
from experiments.tasks.base import Task  # noqa: E402
from experiments.tasks.canyon import Canyon  # noqa: E402
from experiments.tasks.digits import Digits  # noqa: E402
from experiments.tasks.factorisation import Factorisation  # noqa: E402
from experiments.tasks.mnist import MNIST  # noqa: E402
from experiments.tasks.saddle import Saddle  # noqa: E402
from experiments.tasks.sequence import Sequence  # noqa: E402

Base = Callable[[Iterable[nn.Parameter]], torch.optim.Optimizer]
Row = dict[str, Any]

# workload -> task of a seed, base of a learning rate, a sensible learning rate
RATES: dict[str, tuple[Callable[[int], Task], Callable[..., torch.optim.Optimizer], float]] = {
    "MLP 3 layers, AdamW": (lambda s: Digits(s, steps=400), AdamW, 1e-3),
    "MLP 13 layers, AdamW": (lambda s: Digits(s, steps=400, depth=12), AdamW, 1e-3),
    "MLP 13 layers, heavy ball": (
        lambda s: Digits(s, steps=400, depth=12),
        lambda p, lr: SGD(p, lr, momentum=0.9),
        0.02,
    ),
    "MLP 13 layers, SGD": (lambda s: Digits(s, steps=400, depth=12), SGD, 0.1),
    "MLP 13 layers, RMSprop": (lambda s: Digits(s, steps=400, depth=12), RMSprop, 3e-4),
    "CNN MNIST, AdamW": (lambda s: MNIST(s, steps=400), AdamW, 1e-3),
    "CNN MNIST, heavy ball": (lambda s: MNIST(s, steps=400), lambda p, lr: SGD(p, lr, momentum=0.9), 0.02),
    "CNN MNIST, SGD": (lambda s: MNIST(s, steps=400), SGD, 0.1),
    "CNN MNIST, RMSprop": (lambda s: MNIST(s, steps=400), RMSprop, 1e-3),
}
FACTORS = (1, 10, 100, 1000)


def learner(task: Task, base: torch.optim.Optimizer, arm: str) -> torch.optim.Optimizer:
    """`arm`: "bare", "wrapped" (the defaults), "no spectral", or "wrapped, rule" with another rule of Damp."""
    if arm == "bare":
        return base
    parts = {name: make() for name, make in INTERVENTIONS.items()}
    if arm == "no spectral":
        del parts["spectral"]
    if "," in arm:
        parts["damp"] = Damp(rule=arm.split(", ")[1])
    return AdaptiveOptimizer(base, task.model, loss_fn=task.loss_fn, interventions=parts)


def measured(task: Task, base: Base, arm: str, schedule: bool = True, **kwargs: Any) -> Outcome:
    optimizer = learner(task, base(task.model.parameters()), arm)
    cosine = CosineAnnealingLR(optimizer, task.steps) if schedule else None
    torch.manual_seed(0)
    return train(task, optimizer, schedule=cosine, **kwargs)


def row(section: str, workload: str, arm: str, seed: int, outcome: Outcome) -> Row:
    return {
        "section": section,
        "workload": workload,
        "arm": arm,
        "seed": seed,
        "train_loss": statistics.fmean(outcome.losses[-20:]),
        "steps": outcome.steps,
        "probing": outcome.overhead,
        "treatments": sum(not line.endswith("-> pending") for line in outcome.treatments),
        **outcome.metrics,
    }


def rates(seeds: int) -> list[Row]:
    """Learning rates 1, 10, 100, 1000 times a sensible one: damp and rollback."""
    rows = []
    runs = [
        (n, f, a, s)
        for n in RATES
        for f in FACTORS
        for a in ("bare", "wrapped", "wrapped, limit", "wrapped, step")
        for s in range(seeds)
    ]
    for name, factor, arm, seed in tqdm(runs, desc="learning rates", disable=not sys.stderr.isatty()):
        make, base, lr = RATES[name]
        outcome = measured(make(seed), lambda p, base=base, lr=lr * factor: base(p, lr=lr), arm)
        rows.append(row("rates", f"{name} x{factor}", arm, seed, outcome))
    return rows


class Drifting(Digits):
    """A 13-layer ReLU net whose weights grow or shrink: at the start, or bit by bit from step 200 to 300.

    spike: one layer's largest singular value, in units of what it was.
    """

    def __init__(self, seed: int, one: bool, factor: float, late: bool = False, spike: float = 1.0):
        super().__init__(seed, depth=12, steps=600)
        linear = [m for m in self.model if isinstance(m, nn.Linear)]
        self.sick, self.factor = linear[5:6] if one else linear, factor
        self.late = late
        with torch.no_grad():
            for layer in self.sick if not late else ():
                U, S, Vh = torch.linalg.svd(layer.weight)
                layer.weight.add_((spike - 1) * S[0] * torch.outer(U[:, 0], Vh[0])).mul_(factor)

    @torch.no_grad()
    def batch(self, step: int) -> tuple[torch.Tensor, torch.Tensor]:
        for layer in self.sick if self.late and 200 <= step < 300 else ():
            layer.weight.mul_(self.factor**0.01)
        return super().batch(step)


STARTS: dict[str, Callable[[int], Task]] = {
    "healthy": lambda s: Drifting(s, False, 1.0),
    "all x3": lambda s: Drifting(s, False, 3.0),
    "all x0.4": lambda s: Drifting(s, False, 0.4),
    "one x30": lambda s: Drifting(s, True, 30.0),
    "one spike x30": lambda s: Drifting(s, True, 1.0, spike=30.0),
    "one spike x100": lambda s: Drifting(s, True, 1.0, spike=100.0),
    "all to x3 by and by": lambda s: Drifting(s, False, 3.0, late=True),
    "all to x0.4 by and by": lambda s: Drifting(s, False, 0.4, late=True),
    "one to x30 by and by": lambda s: Drifting(s, True, 30.0, late=True),
    "RNN over 64 pixels": lambda s: Sequence(s, steps=600),
    "RNN over 64 pixels, gain 3": lambda s: Sequence(s, steps=600, gain=3.0),
}


def layers(seeds: int) -> list[Row]:
    """Signals that grow or die on their way: from the start, by and by from step 200 to 300, through time: spectral."""
    rows = []
    bases = {"Adam": lambda p: Adam(p, lr=1e-3), "SGD": lambda p: SGD(p, lr=0.05)}
    runs = [(n, b, a, s) for n in STARTS for b in bases for a in ("bare", "wrapped") for s in range(seeds)]
    for start, name, arm, seed in tqdm(runs, desc="layers", disable=not sys.stderr.isatty()):
        rows.append(
            row("layers", f"{start}, {name}", arm, seed, measured(STARTS[start](seed), bases[name], arm, schedule=False))
        )
    return rows


def canyon(seeds: int) -> list[Row]:
    """Steps to 1e-6 of the start loss on least squares with kappa 1e4: kfac."""
    rows = []
    for arm in ("bare", "wrapped"):
        for seed in range(seeds):
            task = Canyon(seed)
            goal = 1e-6 * task.evaluate()["loss"]
            outcome = measured(
                task,
                lambda p, lr=task.best_lr: SGD(p, lr=lr),
                arm,
                False,
                steps=60000,
                until=lambda x, goal=goal: x < goal,
            )
            rows.append(row("canyon", "least squares, kappa 1e4, SGD at its best lr", arm, seed, outcome))
    return rows


SADDLE_ARMS = ("bare", "kick", "no spectral", "wrapped")
SADDLES: dict[str, tuple[Callable[[int], Task], dict[str, Base]]] = {
    "two-layer linear net at the origin": (Saddle, {"SGD": lambda p: SGD(p, 0.1), "AdamW": lambda p: AdamW(p, 1e-2)}),
    "factorisation from 1e-4": (Factorisation, {"SGD": lambda p: SGD(p, 0.1), "AdamW": lambda p: AdamW(p, 1e-2)}),
    "identical units": (identical, {"SGD": lambda p: SGD(p, 0.1), "AdamW": lambda p: AdamW(p, 3e-3)}),
}


def saddle(seeds: int) -> list[Row]:
    """Final loss from a saddle: escape ("no spectral", "wrapped"), and a random kick of every weight at the start."""
    rows = []
    runs = [(n, b, a, s) for n in SADDLES for b in SADDLES[n][1] for a in SADDLE_ARMS for s in range(seeds)]
    for name, base, arm, seed in tqdm(runs, desc="saddles", disable=not sys.stderr.isatty()):
        task = SADDLES[name][0](seed)
        with torch.no_grad():
            for p in task.model.parameters() if arm == "kick" else ():
                p.add_(0.01 * torch.randn(p.shape, generator=torch.Generator().manual_seed(seed)))
        arm_of = "bare" if arm == "kick" else arm
        rows.append(row("saddle", f"{name}, {base}", arm, seed, measured(task, SADDLES[name][1][base], arm_of, False)))
    return rows


def healthy(seeds: int) -> list[Row]:
    """Runs in which nothing is wrong, other seeds than the thresholds were chosen on: false alarms and cost."""
    bases: dict[str, Base] = {
        "AdamW": lambda p: AdamW(p, lr=2e-3),
        "heavy ball": lambda p: SGD(p, lr=0.05, momentum=0.9),
        "Adagrad": lambda p: Adagrad(p, lr=0.01),
        "RMSprop": lambda p: RMSprop(p, lr=1e-3),
    }
    return [
        row("healthy", f"MLP 3 layers, {name}, 1000 steps", arm, seed, measured(Digits(seed, steps=1000), base, arm))
        for name, base in bases.items()
        for arm in ("bare", "wrapped")
        for seed in range(10, 10 + seeds)
    ]


def modes(seeds: int) -> list[Row]:
    """kfac and sam as constant modes beside the base: equal steps, and what their defaults were chosen among."""
    made: dict[str, Callable[[], Mode]] = {
        "base": BaseStep,
        "kfac (beta 0.95)": KFAC,
        "kfac, beta 0.99": lambda: KFAC(beta=0.99),
        "sam, rho 0.005": lambda: SAM(rho=0.005),
        "sam (rho 0.01)": SAM,
        "sam, rho 0.02": lambda: SAM(rho=0.02),
    }
    workloads: dict[str, tuple[Callable[[int], Task], Base]] = {
        "MLP 4 layers, AdamW 1e-3": (lambda s: Digits(s, steps=600, depth=3), lambda p: AdamW(p, lr=1e-3)),
        "MLP 4 layers, AdamW 3e-3": (lambda s: Digits(s, steps=600, depth=3), lambda p: AdamW(p, lr=3e-3)),
        "MLP 13 layers, AdamW": (lambda s: Digits(s, depth=12), lambda p: AdamW(p, lr=1e-3)),
        "MLP 13 layers, heavy ball": (lambda s: Digits(s, depth=12), lambda p: SGD(p, lr=0.02, momentum=0.9)),
        "MLP 13 layers, RMSprop": (lambda s: Digits(s, depth=12), lambda p: RMSprop(p, lr=3e-4)),
        "CNN MNIST, AdamW": (lambda s: MNIST(s, steps=300), lambda p: AdamW(p, lr=1e-3)),
        "MLP 3 layers, 40 % label noise, AdamW": (
            lambda s: Digits(s, steps=1500, label_noise=0.4),
            lambda p: AdamW(p, lr=2e-3),
        ),
    }
    rows = []
    for workload, (make, base) in workloads.items():
        for arm, mode in made.items():
            for seed in range(seeds):
                task = make(seed)
                optimizer = AdaptiveOptimizer(
                    base(task.model.parameters()),
                    task.model,
                    loss_fn=task.loss_fn,
                    probe=LanczosProbe(overhead=0),
                    policy=ConstantPolicy("base" if arm == "base" else "on"),
                    modes={"base": BaseStep(), "on": mode()},
                )
                torch.manual_seed(seed)
                outcome = train(task, optimizer, schedule=CosineAnnealingLR(optimizer, task.steps))
                rows.append(row("modes", workload, arm, seed, outcome))
    return rows


MARGINS: dict[str, tuple[Callable[[int], Task], Base]] = {
    "MLP 3 layers, AdamW": (lambda s: Digits(s, steps=300), lambda p: AdamW(p, lr=1e-3)),
    "MLP 13 layers, SGD": (lambda s: Digits(s, steps=300, depth=12), lambda p: SGD(p, lr=0.05)),
    "MLP 3 layers, batch of 8, AdamW": (lambda s: Digits(s, 8, steps=300), lambda p: AdamW(p, lr=1e-3)),
    "MLP 13 layers x3, AdamW": (lambda s: Digits(s, steps=300, depth=12, gain=3.0), lambda p: AdamW(p, lr=1e-3)),
    "CNN MNIST, AdamW": (lambda s: MNIST(s, steps=300, width=8), lambda p: AdamW(p, lr=1e-3)),
    "CNN MNIST, SGD": (lambda s: MNIST(s, steps=300, width=8), lambda p: SGD(p, lr=0.1)),
    "CNN MNIST, batch of 8, AdamW x10": (lambda s: MNIST(s, 8, 300, 8), lambda p: AdamW(p, lr=1e-2)),
}


def margins(seeds: int) -> list[Row]:
    """How far the batches of runs without faults stand out: first losses and running statistics, the largest factor."""
    rows = []
    for workload, (make, base) in MARGINS.items():
        for seed in range(seeds):
            task = make(seed)
            optimizer = learner(task, base(task.model.parameters()), "wrapped")
            assert isinstance(optimizer, AdaptiveOptimizer)
            first, running = optimizer.control.interventions["rollback"].first, optimizer.control.statistics
            seen = {"first losses": 0.0, "first statistics": 0.0, "statistics": 0.0}
            look, judge = first.look, running.judge

            def looked(*args: Any, first: Any = first, look: Any = look, seen: Row = seen) -> Any:
                known, found = list(first.losses or [math.nan]), look(*args)
                if first.losses is None and found is None:
                    seen["first losses"] = max(known) / statistics.median(known)
                return found

            def judged(step: int, moments: list[float], of: Any = running, judge: Any = judge, seen: Row = seen) -> Any:
                table = [moments, *(early.moments for early in of.early)]
                usual = of.largest or [statistics.median(column) for column in zip(*table, strict=True)]
                if of.largest or len(table) == 5:
                    factor = max(m / u for row in table for m, u in zip(row, usual, strict=True))
                    name = "statistics" if of.largest else "first statistics"
                    seen[name] = max(seen[name], factor)
                return judge(step, moments)

            first.look, running.judge = looked, judged
            outcome = train(task, optimizer)
            rows.append({**row("margins", workload, "wrapped", seed, outcome), **seen})
    return rows


SECTIONS = {
    "rates": rates,
    "layers": layers,
    "canyon": canyon,
    "saddle": saddle,
    "healthy": healthy,
    "margins": margins,
    "modes": modes,
}


def table(rows: list[Row]) -> str:
    """Markdown: mean over the seeds, a column an arm."""
    arms = list(dict.fromkeys(r["arm"] for r in rows))
    lines = ["| " + " | ".join(["", *arms]) + " |", "|---" * (len(arms) + 1) + "|"]
    for workload in dict.fromkeys(r["workload"] for r in rows):
        cells = [cell([r for r in rows if r["workload"] == workload and r["arm"] == arm]) for arm in arms]
        lines.append("| " + " | ".join([workload, *cells]) + " |")
    return "\n".join(lines)


def cell(rows: list[Row]) -> str:
    mean = {k: statistics.fmean(r[k] for r in rows) for k in rows[0] if isinstance(rows[0][k], (int, float))}
    if rows[0]["section"] == "canyon":
        return f"{mean['steps']:.0f} steps"
    if rows[0]["section"] == "saddle":
        return f"{mean['train_loss']:.3g}"
    if rows[0]["section"] == "margins":
        most = (f"{name} {max(r[name] for r in rows):.2f}" for name in ("first losses", "first statistics", "statistics"))
        return f"{', '.join(most)}; {mean['treatments']:.2g} treatments"
    text = f"{mean['train_loss']:.4f}, {mean['test_accuracy']:.1f} %"
    wrapped = rows[0]["arm"] == "wrapped" and rows[0]["section"] == "healthy"
    return text + (f" ({mean['treatments']:.2g} treatments, probing {mean['probing']:.1%})" if wrapped else "")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--only", nargs="+", choices=SECTIONS, default=list(SECTIONS))
    parser.add_argument("--out", type=Path, default=ROOT / "runs" / "bench_treatments.json")
    args = parser.parse_args()
    if args.seeds < 1:
        parser.error(f"--seeds {args.seeds}: 1 or more")
    torch.set_num_threads(1)
    logging.getLogger("adaptive_opt").setLevel(logging.ERROR)  # the tables count the treatments
    everything: list[Row] = []
    for name in args.only:
        rows = SECTIONS[name](args.seeds)
        everything += rows
        title = (SECTIONS[name].__doc__ or name).rstrip(".")
        print(f"\n{title} (mean of {args.seeds} seeds)\n\n{table(rows)}", flush=True)
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps(everything, indent=1) + "\n")
    print(f"\nAll rows: {args.out}")


if __name__ == "__main__":
    main()

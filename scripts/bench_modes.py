"""python scripts/bench_modes.py [--only SECTION...] [--seeds K] [--figure FILE.png]

Each mode beside the bare base optimizer and the peers (pytorch_optimizer's SOAP, Shampoo, Muon, SAM): loss at equal process
time and equal steps on five workloads, time and memory of a step, and what a switch does to the loss. Every arm's learning
rate is swept on seed 0; its best one runs on the other seeds. One JSON line a finished run in runs/bench_modes.jsonl; what
is there is not run again.
"""

from __future__ import annotations

import argparse
import json
import logging
import math
import statistics
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402
from scipy.stats import t as student  # noqa: E402
from torch import Tensor, nn  # noqa: E402

from adaptive_opt import AdaptiveOptimizer, ConstantPolicy, LanczosProbe  # noqa: E402
from adaptive_opt.modes import KFAC, SAM, BaseStep, Mode, SGDStep  # noqa: E402
from experiments.tasks.autoencoder import Autoencoder  # noqa: E402
from experiments.tasks.gpt import CharGPT  # noqa: E402
from experiments.tasks.mnist import MNIST  # noqa: E402
from experiments.tasks.mnist1d import MNIST1D  # noqa: E402
from experiments.tasks.poisson import Poisson  # noqa: E402

Row = dict[str, Any]
Params = Iterable[nn.Parameter]


@dataclass
class Work:
    """A workload: `batch()` draws, `loss_fn(model(x), y)` is trained, `score()` is what is compared."""

    model: nn.Module
    batch: Callable[[], tuple[Tensor, Tensor]]
    score: Callable[[], float]
    loss_fn: nn.Module = field(default_factory=nn.CrossEntropyLoss)
    objective: Callable[[], Tensor] | None = None  # in place of loss_fn(model(x), y)

    def loss(self) -> Tensor:
        if self.objective is not None:
            return self.objective()
        x, y = self.batch()
        return self.loss_fn(self.model(x), y)


# ---- workloads -------------------------------------------------------------------------------------------------------


def poisson(seed: int, points: int = 256) -> Work:
    task = Poisson(seed, points=points)
    return Work(task.model, lambda: task.batch(0), lambda: task.evaluate()["relative_error"], objective=task.objective)


def autoencoder(seed: int) -> Work:
    task = Autoencoder(seed, batch_size=128)
    return Work(task.model, lambda: task.batch(0), lambda: task.evaluate()["mse"], task.loss_fn)


def gpt(seed: int, width: int = 64, depth: int = 2, samples: int = 16) -> Work:
    task = CharGPT(seed, samples, width=width, depth=depth)
    return Work(task.model, lambda: task.batch(0), lambda: task.evaluate()["validation_loss"])


def mnist(seed: int) -> Work:
    """Test error in per cent."""
    task = MNIST(seed, width=8)
    return Work(task.model, lambda: task.batch(0), lambda: 100 - task.evaluate()["test_accuracy"], task.loss_fn)


def noise(seed: int) -> Work:
    """40 % of the training labels random, drawn with replacement; test error in per cent."""
    task = MNIST1D(seed, label_noise=0.4)
    x, y = task.train

    def batch() -> tuple[Tensor, Tensor]:
        rows = torch.randint(0, len(x), (128,))
        return x[rows], y[rows]

    return Work(task.model, batch, lambda: 100 - task.evaluate()["test_accuracy"])


# ---- arms ------------------------------------------------------------------------------------------------------------


def adamw(p: Params, lr: float, beta2: float = 0.999) -> torch.optim.Optimizer:
    return torch.optim.AdamW(p, lr=lr, betas=(0.9, beta2))


def wrapped(mode: Callable[[], Mode], base: Callable[..., torch.optim.Optimizer] = adamw) -> Callable[[Work, float], Any]:
    """One mode from the first step to the last, nothing measured."""

    def make(w: Work, lr: float) -> AdaptiveOptimizer:
        given: dict[str, Any] = {"objective": w.objective} if w.objective is not None else {"loss_fn": w.loss_fn}
        modes = {"base": BaseStep(), "on": mode()}
        policy, probe = ConstantPolicy("on"), LanczosProbe(overhead=0)
        return AdaptiveOptimizer(base(w.model.parameters(), lr=lr), w.model, **given, probe=probe, policy=policy, modes=modes)

    return make


def peer(name: str, **kwargs: Any) -> Callable[[Work, float], Any]:
    """pytorch_optimizer's, with its defaults."""

    def make(w: Work, lr: float) -> torch.optim.Optimizer:
        import pytorch_optimizer

        made = getattr(pytorch_optimizer, name)
        if name == "Muon":
            groups = [
                {"params": [p for p in w.model.parameters() if (p.dim() >= 2) == big], "use_muon": big} for big in (True, False)
            ]
            return made(groups, lr=lr, adamw_lr=lr, **kwargs)
        return made(w.model.parameters(), lr=lr, **kwargs)

    return make


ARMS: dict[str, Callable[[Work, float], Any]] = {
    "AdamW": lambda w, lr: adamw(w.model.parameters(), lr),
    "AdamW, beta2 0.95": lambda w, lr: adamw(w.model.parameters(), lr, 0.95),
    "kfac": wrapped(KFAC),
    "kfac, beta 0.99": wrapped(lambda: KFAC(beta=0.99)),
    "kfac, of layers": wrapped(lambda: KFAC("kfac")),
    "sam": wrapped(lambda: SAM(rho=0.05)),
    "sam, every 2nd": wrapped(lambda: SAM(rho=0.05, every=2)),
    "asam": wrapped(lambda: SAM(rho=2.0, adaptive=True)),
    "kfac_sam": wrapped(lambda: SAM(rho=0.05, inner=KFAC())),
    "sgd": wrapped(SGDStep),
    "SOAP (peer)": peer("SOAP", weight_decay=0.01),
    "Shampoo (peer)": peer("Shampoo", preconditioning_compute_steps=10),
    "Muon (peer)": peer("Muon"),
    "SAM (peer)": peer("SAM", base_optimizer=torch.optim.AdamW, rho=0.2),
}


@dataclass(frozen=True)
class Contest:
    """A workload, its arms with the learning rates to sweep, and the budgets."""

    make: Callable[[int], Work]
    metric: str
    seconds: float | None  # of process time
    steps: int | None
    rates: tuple[float, ...]
    arms: tuple[str, ...]


RATES, LOW = (1e-3, 3e-3, 1e-2, 3e-2), (1e-4, 3e-4, 1e-3, 3e-3)
SECOND_ORDER = ("AdamW", "kfac", "kfac, of layers", "SOAP (peer)", "Muon (peer)", "Shampoo (peer)")
SHARP = ("AdamW", "sam", "sam, every 2nd", "asam", "SAM (peer)")
LAYERED = ("AdamW, beta2 0.95", "kfac", "kfac, of layers")
TUNED = ("AdamW", "AdamW, beta2 0.95", "kfac", "kfac, beta 0.99", *SECOND_ORDER[2:])
CONTESTS = {
    "autoencoder": Contest(autoencoder, "train MSE", 4, None, RATES, SECOND_ORDER),
    "poisson": Contest(poisson, "relative L2 error", 6, None, RATES, TUNED),
    "poisson, 1024 points": Contest(partial(poisson, points=1024), "relative L2 error", 10, None, RATES, LAYERED),
    "noise": Contest(noise, "test error, %", 10, None, LOW, SHARP),
    "noise, equal steps": Contest(noise, "test error, %", None, 4000, LOW, SHARP[:2]),
    "gpt": Contest(gpt, "validation loss", 8, None, RATES, SECOND_ORDER[:5]),
    "gpt, equal steps": Contest(gpt, "validation loss", None, 400, RATES, ("AdamW", "kfac", "SOAP (peer)")),
    "mnist": Contest(mnist, "test error, %", 5, None, RATES, ("AdamW", "kfac", "sam")),
}


# ---- runs ------------------------------------------------------------------------------------------------------------


def one_step(w: Work, optimizer: Any) -> float:
    """Forward, backward, step; the peer's SAM is given its closure."""
    optimizer.zero_grad()
    if type(optimizer).__name__ != "SAM":
        loss = w.loss()
        loss.backward()
        optimizer.step()
        return float(loss.detach())
    x, y = w.batch()
    loss = w.loss_fn(w.model(x), y)
    loss.backward()
    optimizer.step(lambda: w.loss_fn(w.model(x), y).backward())
    return float(loss.detach())


def run(contest: Contest, arm: str, lr: float, seed: int) -> Row:
    """Trains with a cosine schedule over the budget: process time of one thread, or steps."""
    w = contest.make(seed)
    optimizer = ARMS[arm](w, lr)
    rates = [float(g["lr"]) for g in optimizer.param_groups]
    torch.manual_seed(1000 + seed)
    losses: list[float] = []
    began = time.process_time()
    while True:
        spent = time.process_time() - began
        share = spent / contest.seconds if contest.seconds else len(losses) / (contest.steps or 1)
        if share >= 1 or (losses and not math.isfinite(losses[-1])):
            break
        for group, rate in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = rate * 0.5 * (1 + math.cos(math.pi * share))
        losses.append(one_step(w, optimizer))
    score = w.score()
    return {
        "score": score if math.isfinite(score) else None,
        "train_loss": statistics.fmean(losses[-20:]) if math.isfinite(losses[-1]) else None,
        "steps": len(losses),
        "seconds": time.process_time() - began,
    }


class Book:
    """Finished runs, one JSON line each."""

    def __init__(self, path: Path):
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        self.rows: list[Row] = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

    def find(self, **key: Any) -> Row | None:
        return next((r for r in self.rows if all(r.get(k) == v for k, v in key.items())), None)

    def get(self, make: Callable[[], Row], **key: Any) -> Row:
        row = self.find(**key)
        if row is None:
            row = {**key, **make()}
            self.rows.append(row)
            with self.path.open("a") as file:
                file.write(json.dumps(row) + "\n")
            print(json.dumps(row), flush=True)
        return row


def compete(book: Book, name: str, seeds: int) -> None:
    contest = CONTESTS[name]
    for arm in contest.arms:

        def at(lr: float, seed: int, arm: str = arm) -> Row:
            return book.get(lambda: run(contest, arm, lr, seed), section=name, arm=arm, lr=lr, seed=seed)

        swept = [at(lr, 0) for lr in contest.rates]
        best = min(swept, key=lambda r: math.inf if r["score"] is None else r["score"])
        for seed in range(1, seeds):
            at(best["lr"], seed)


# ---- time and memory of a step ---------------------------------------------------------------------------------------

SPEED = (
    "AdamW", "kfac", "kfac, of layers", "sam", "sam, every 2nd", "asam", "kfac_sam", "sgd",
    "SOAP (peer)", "Shampoo (peer)", "Muon (peer)", "SAM (peer)",
)  # fmt: skip


def speed(book: Book, seeds: int) -> None:
    """Steps of a GPT of 0.8M parameters, the arms in turn so that all see the same machine; medians over the rounds."""
    if book.find(section="speed") is not None:
        return
    made = {}
    for arm in SPEED:
        w = gpt(0, 128, 4)
        made[arm] = (w, ARMS[arm](w, 1e-3), [])
        for _ in range(25 if "kfac" in arm else 12):  # the modes' first bases, the estimates of sgd
            one_step(w, made[arm][1])
    for _ in range(8):
        for w, optimizer, times in made.values():
            for _ in range(5):
                began = time.process_time()
                one_step(w, optimizer)
                times.append(time.process_time() - began)
    bare = statistics.fmean(made["AdamW"][2])
    for arm, (w, optimizer, times) in made.items():
        row = {
            "ms": 1e3 * statistics.fmean(times),
            "ratio": statistics.fmean(times) / bare,
            "longest": max(times) / statistics.median(times),
            "state": held(optimizer) / sum(p.numel() for p in w.model.parameters()),
        }
        book.get(lambda row=row: row, section="speed", arm=arm)


def held(optimizer: Any) -> int:
    """Numbers in every tensor that the optimizer keeps between steps, parameters and gradients aside."""
    seen: dict[int, int] = {}

    def look(value: Any, depth: int = 0) -> None:
        if isinstance(value, Tensor):
            if not isinstance(value, nn.Parameter) and value.numel() > 1:
                seen[value.data_ptr()] = value.numel()
        elif isinstance(value, dict):
            for v in value.values():
                look(v, depth + 1)
        elif isinstance(value, (list, tuple)):
            for v in value:
                look(v, depth + 1)

    look(dict(optimizer.state))
    if isinstance(optimizer, AdaptiveOptimizer):
        look({name: mode.state_dict() for name, mode in optimizer.control.modes.items()})
    elif hasattr(optimizer, "base_optimizer"):
        look(dict(optimizer.base_optimizer.state))
    return sum(seen.values())


# ---- what a switch does ----------------------------------------------------------------------------------------------

SWITCHED = {"kfac": KFAC, "sam": SAM, "sgd": SGDStep}  # with their defaults


def switch(book: Book, seeds: int) -> None:
    """Mean loss of the 20 steps after a switch in (from the base) and out (of the mode), less that of the same 20 steps
    without it, in units of the standard deviation of single steps' losses about their trend."""
    makers: dict[str, Callable[[int], Work]] = {
        "poisson": poisson, "autoencoder": autoencoder, "gpt": gpt, "mnist": mnist, "noise": noise,
    }  # fmt: skip
    for name, make in makers.items():
        for mode in SWITCHED:
            for seed in range(seeds):
                book.get(lambda: switched(make, mode, seed), section="switch", workload=name, mode=mode, seed=seed)


def switched(make: Callable[[int], Work], mode: str, seed: int, before: int = 100, between: int = 40) -> Row:
    ends: dict[str, list[float]] = {}
    plans = {"never": ("base",) * 3, "in": ("base", mode, mode), "out": ("base", mode, "base")}
    for plan, (first, second, third) in plans.items():
        w = make(seed)
        modes: dict[str, Mode] = {"base": BaseStep(), mode: SWITCHED[mode]()}
        given: dict[str, Any] = {"objective": w.objective} if w.objective is not None else {"loss_fn": w.loss_fn}
        optimizer = AdaptiveOptimizer(
            adamw(w.model.parameters(), 1e-3),
            w.model,
            **given,
            probe=LanczosProbe(overhead=0),
            policy=ConstantPolicy(),
            modes=modes,
        )
        optimizer.sinks.append(lambda report: None)  # or a wrapper that has nothing to do would not look at its policy
        torch.manual_seed(1000 + seed)
        losses = []
        for count, wanted in ((before, first), (between, second), (20, third)):
            optimizer.control.policy = ConstantPolicy(wanted)
            losses += [one_step(w, optimizer) for _ in range(count)]
        ends[plan] = losses
    after = slice(before, before + 20)
    spread = deviation(ends["never"][before - 50 : before])
    spread_out = deviation(ends["in"][-50:])
    return {
        "in": (statistics.fmean(ends["in"][after]) - statistics.fmean(ends["never"][after])) / spread,
        "out": (statistics.fmean(ends["out"][-20:]) - statistics.fmean(ends["in"][-20:])) / spread_out,
    }


def deviation(losses: list[float]) -> float:
    """Standard deviation about a straight line."""
    y = torch.tensor(losses, dtype=torch.float64)
    X = torch.stack([torch.ones(len(y)), torch.arange(len(y))], 1).double()
    return float((y - X @ torch.linalg.lstsq(X, y.unsqueeze(1)).solution[:, 0]).std())


# ---- tables ----------------------------------------------------------------------------------------------------------


def interval(values: list[float]) -> tuple[float, float]:
    """Mean and half of the 95 % confidence interval (Student's t)."""
    if len(values) < 2:
        return values[0], math.nan
    half = float(student.ppf(0.975, len(values) - 1)) * statistics.stdev(values) / len(values) ** 0.5
    return statistics.fmean(values), half


def summary(book: Book, name: str) -> list[Row]:
    """An arm a row: its best rate, score with interval, steps and milliseconds."""
    rows = []
    for arm in CONTESTS[name].arms:
        mine = [r for r in book.rows if r["section"] == name and r["arm"] == arm]
        swept = [r for r in mine if r["seed"] == 0 and r["score"] is not None]
        if not swept:
            continue
        lr = min(swept, key=lambda r: r["score"])["lr"]
        chosen = [r for r in mine if r["lr"] == lr and r["score"] is not None]
        mean, half = interval([r["score"] for r in chosen])
        steps = statistics.fmean(r["steps"] for r in chosen)
        ms = 1e3 * statistics.fmean(r["seconds"] / r["steps"] for r in chosen)
        rows.append({"arm": arm, "lr": lr, "seeds": len(chosen), "mean": mean, "half": half, "steps": steps, "ms": ms})
    return rows


def table(book: Book, name: str) -> str:
    if name == "speed":
        lines = ["| | ms a step | of AdamW's | longest / median | state, in copies of the model |", "|---|---|---|---|---|"]
        for r in (r for r in book.rows if r["section"] == "speed"):
            lines.append(f"| {r['arm']} | {r['ms']:.1f} | {r['ratio']:.2f} | {r['longest']:.2f} | {r['state']:.1f} |")
        return "\n".join(lines)
    if name == "switch":
        lines = ["| | mode | in | out |", "|---|---|---|---|"]
        rows = [r for r in book.rows if r["section"] == "switch"]
        for workload, mode in dict.fromkeys((r["workload"], r["mode"]) for r in rows):
            both = [interval([r[way] for r in rows if (r["workload"], r["mode"]) == (workload, mode)]) for way in ("in", "out")]
            lines.append(f"| {workload} | {mode} | " + " | ".join(f"{m:+.2f} ± {h:.2f}" for m, h in both) + " |")
        return "\n".join(lines)
    contest = CONTESTS[name]
    budget = f"{contest.seconds:g} s" if contest.seconds else f"{contest.steps} steps"
    lines = [f"| {budget} | {contest.metric} | lr | steps | ms a step |", "|---|---|---|---|---|"]
    for r in summary(book, name):
        score = f"{r['mean']:.3g} ± {r['half']:.2g} ({r['seeds']} seeds)" if r["seeds"] > 1 else f"{r['mean']:.3g} (1 seed)"
        lines.append(f"| {r['arm']} | {score} | {r['lr']:g} | {r['steps']:.0f} | {r['ms']:.2f} |")
    return "\n".join(lines)


def draw(book: Book, path: Path) -> None:
    """A panel a contest: mean and 95 % interval of every arm that did not diverge."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    names = [name for name in CONTESTS if summary(book, name)]
    lines = -(-len(names) // 4)
    figure, axes = plt.subplots(lines, 4, figsize=(15, 3 * lines), squeeze=False)
    for axis in axes.flat[len(names) :]:
        axis.set_axis_off()
    for axis, name in zip(axes.flat, names, strict=False):
        rows = summary(book, name)[::-1]
        rows = [r for r in rows if r["mean"] < 100 * min(r["mean"] for r in rows)]  # what diverged is in the table
        axis.errorbar([r["mean"] for r in rows], range(len(rows)), xerr=[r["half"] for r in rows], fmt="o", capsize=3)
        axis.set_yticks(range(len(rows)), [r["arm"] for r in rows], fontsize=7)
        axis.set_xscale("log" if name.startswith("poisson") else "linear")
        axis.set_title(name, fontsize=9)
        axis.set_xlabel(CONTESTS[name].metric, fontsize=8)
        axis.tick_params(axis="x", labelsize=7)
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)


def main() -> None:
    sections = [*CONTESTS, "speed", "switch"]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--only", nargs="+", choices=sections, default=sections)
    parser.add_argument("--book", type=Path, default=ROOT / "runs" / "bench_modes.jsonl")
    parser.add_argument("--figure", type=Path, help="draw the contests into this file")
    args = parser.parse_args()
    if args.seeds < 1:
        parser.error(f"--seeds {args.seeds}: 1 or more")
    torch.set_num_threads(1)
    logging.getLogger("adaptive_opt").setLevel(logging.ERROR)  # every arm says that it is in its mode
    book = Book(args.book)
    for name in args.only:
        if name in CONTESTS:
            compete(book, name, args.seeds)
        else:
            {"speed": speed, "switch": switch}[name](book, args.seeds)
    for name in args.only:
        print(f"\n{name}\n\n{table(book, name)}")
    if args.figure is not None:
        draw(book, args.figure)
        print(f"\nFigure: {args.figure}")
    summaries = {name: summary(book, name) for name in args.only if name in CONTESTS}
    args.book.with_suffix(".json").write_text(json.dumps({"contests": summaries, "rows": book.rows}, indent=1) + "\n")
    print(f"\nAll runs: {args.book}, summary: {args.book.with_suffix('.json')}")


if __name__ == "__main__":
    main()

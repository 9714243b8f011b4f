"""python scripts/demo.py [--seeds K] [--steps N] [--out DIR]: bare AdamW beside the wrapped one, healthy and sick."""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import matplotlib  # noqa: E402

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402
import torch  # noqa: E402
from matplotlib.axes import Axes  # noqa: E402

from adaptive_opt import AdaptiveOptimizer, StepReport  # noqa: E402
from adaptive_opt.telemetry import JsonlSink, read_reports  # noqa: E402
from experiments.faults import Faults  # noqa: E402
from experiments.loop import Outcome, train  # noqa: E402
from experiments.tasks.mnist import MNIST  # noqa: E402

CASES = {"healthy": (1e-3, 0.0), "sick": (1e-1, 0.01)}  # learning rate, share of corrupted batches
COLOURS = {"bare": "#D55E00", "wrapped": "#0072B2"}  # Okabe and Ito: safe for the colour-blind


def run(case: str, arm: str, seed: int, steps: int, folder: Path) -> Outcome:
    """One training run; both arms of a case start from the same weights and see the same batches and faults."""
    lr, rate = CASES[case]
    task = MNIST(seed=seed, steps=steps)
    optimizer: torch.optim.Optimizer = torch.optim.AdamW(task.model.parameters(), lr=lr)
    sink = None
    if arm == "wrapped":
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "steps.jsonl").unlink(missing_ok=True)
        sink = JsonlSink(folder, {"case": case, "lr": lr, "faults": rate, "steps": steps}, seed)
        optimizer = AdaptiveOptimizer(optimizer, task.model, loss_fn=task.loss_fn, sinks=[sink])
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    torch.manual_seed(seed)
    faults = Faults(rate, "mixed", seed=seed)
    outcome = train(task, optimizer, faults=faults, schedule=schedule, title=f"{case}, {arm}, seed {seed}")
    if sink is not None:
        sink.close()
    return outcome


def table(results: dict[tuple[str, str], list[Outcome]]) -> str:
    """Means over the seeds, as Markdown."""
    lines = ["| | test accuracy | test loss | seconds | probing | treatments |", "|---|---|---|---|---|---|"]
    for (case, arm), outs in results.items():
        accuracy = statistics.fmean(o.metrics["test_accuracy"] for o in outs)
        loss = statistics.fmean(o.metrics["test_loss"] for o in outs)
        seconds = statistics.fmean(o.seconds for o in outs)
        probing = f"{statistics.fmean(o.overhead for o in outs):.1%}" if arm == "wrapped" else "-"
        done = sum(" -> pending" not in line for o in outs for line in o.treatments)
        name = "AdamW" if arm == "bare" else "AdaptiveOptimizer(AdamW)"
        treatments = f"{done / len(outs):.3g}" if arm == "wrapped" else "-"
        lines.append(f"| {case}: {name} | {accuracy:.1f} % | {loss:.3f} | {seconds:.1f} | {probing} | {treatments} |")
    return "\n".join(lines)


def figure(results: dict[tuple[str, str], list[Outcome]], reports: dict[str, list[StepReport]], path: Path) -> None:
    """Loss of both arms, and what the wrapped one measured and did, for the first seed."""
    fig, axes = plt.subplots(2, 2, figsize=(11, 6.2), sharex=True, layout="constrained")
    for column, case in enumerate(CASES):
        _losses(axes[0, column], case, results)
        _steps(axes[1, column], reports[case])
    axes[0, 0].set_ylabel("training loss (median of 15)")
    axes[1, 0].set_ylabel("learning rate")
    fig.savefig(path, dpi=120)
    plt.close(fig)


def _losses(ax: Axes, case: str, results: dict[tuple[str, str], list[Outcome]]) -> None:
    lr, rate = CASES[case]
    for arm in ("bare", "wrapped"):
        out = results[case, arm][0]
        smooth = [statistics.median(out.losses[max(0, i - 14) : i + 1]) for i in range(len(out.losses))]
        style = {"bare": "-", "wrapped": (0, (4, 2))}[arm] if case == "healthy" else "-"  # there the two are the same line
        ax.plot(smooth, color=COLOURS[arm], ls=style, label=f"{arm}: {out.metrics['test_accuracy']:.1f} % test accuracy")
        broke = next((i for i, x in enumerate(out.losses) if x != x), None) if arm == "bare" else None
        if broke is not None:
            ax.plot(broke, smooth[broke - 1], "x", color=COLOURS[arm], ms=9, mew=2, label="NaN from here on")
    broken = f", {rate:.0%} of the batches corrupted" if rate else ""
    ax.set_title(f"{case}: AdamW at lr {lr:g}{broken}", fontsize=11)
    ax.set_yscale("log")
    ax.legend(loc="upper right", fontsize=9)
    ax.grid(alpha=0.3)


def _steps(ax: Axes, reports: list[StepReport]) -> None:
    steps = [r.step for r in reports]
    ax.plot(steps, [r.lr for r in reports], color="0.55", ls="--", label="the user's learning rate")
    ax.plot(steps, [r.lr * r.lr_scale for r in reports], color=COLOURS["wrapped"], label="effective learning rate")
    skipped = [r.step for r in reports if not r.stepped]
    if skipped:
        ax.plot(skipped, [reports[s].lr for s in skipped], "v", color="#CC79A7", ls="", label="broken batch, skipped")
    ax.set_yscale("log")
    ax.set_ylim(1e-5, 0.5)
    ax.set_xlabel("step")
    ax.legend(loc="lower left", fontsize=9)
    ax.grid(alpha=0.3)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=1, help="runs of each arm (default 1)")
    parser.add_argument("--steps", type=int, default=800)
    parser.add_argument("--out", type=Path, default=ROOT / "runs" / "demo")
    args = parser.parse_args()
    if args.seeds < 1 or args.steps < 20:
        parser.error(f"--seeds {args.seeds} --steps {args.steps}: at least 1 seed and 20 steps")
    args.out.mkdir(parents=True, exist_ok=True)
    print("5000 real MNIST images, a small CNN; both optimizers start from the same weights and see the same batches.\n")
    results: dict[tuple[str, str], list[Outcome]] = {}
    for case in CASES:
        for arm in ("bare", "wrapped"):
            folders = [args.out / f"{case}-{arm}-seed{seed}" for seed in range(args.seeds)]
            results[case, arm] = [run(case, arm, seed, args.steps, folder) for seed, folder in enumerate(folders)]
    reports = {case: list(read_reports(args.out / f"{case}-wrapped-seed0")) for case in CASES}
    figure(results, reports, args.out / "figure.png")
    numbers = {
        f"{c} {a}": [{**o.metrics, "seconds": o.seconds, "probing": o.overhead} for o in outs]
        for (c, a), outs in results.items()
    }
    (args.out / "results.json").write_text(json.dumps(numbers, indent=2) + "\n")
    print(table(results))
    for case in CASES:
        log = [line for line in results[case, "wrapped"][0].treatments if not line.endswith("-> pending")]
        print(f"\nWhat the wrapped optimizer did, {case}:" + ("" if log else " nothing, it had no reason to."))
        for line in log:
            print(f"  {line}")
    print(f"\nRun folders and results: {args.out}\nFigure: {args.out / 'figure.png'}")


if __name__ == "__main__":
    main()

"""The figures: differences to the reference with their intervals, and performance profiles."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes

from .runs import RunRow
from .tables import Line, profiles

BETTER, WORSE, SAME = "#0072B2", "#D55E00", "#808890"  # Okabe and Ito: safe for the colour-blind
STYLES = ("-", "--", "-.", ":")
COSTS = {"gradients_to_target": "gradient-equivalents", "seconds_to_target": "seconds"}


def differences(table: Sequence[Line], reference: str, path: Path) -> None:
    """A panel a workload: each arm minus the reference on equal seeds, with its 95 % interval."""
    workloads = list(dict.fromkeys(line.workload for line in table if line.versus is not None))
    if not workloads:
        return
    columns = min(3, len(workloads))
    rows = -(-len(workloads) // columns)
    most = max(sum(line.workload == w for line in table) for w in workloads)
    fig, axes = plt.subplots(
        rows, columns, figsize=(4.2 * columns, (0.9 + 0.24 * most) * rows), layout="constrained", squeeze=False
    )
    for ax, workload in zip(axes.flat, workloads, strict=False):
        _panel(ax, [line for line in table if line.workload == workload and line.versus is not None], workload)
    for ax in axes.flat[len(workloads) :]:
        ax.axis("off")
    fig.suptitle(f"arm minus {reference}, equal seeds; 95 % bootstrap intervals; blue: better, orange: worse, grey: neither")
    fig.savefig(path, dpi=110)
    plt.close(fig)


def _panel(ax: Axes, lines: Sequence[Line], workload: str) -> None:
    for y, line in enumerate(lines):
        assert line.versus is not None
        mean = line.versus.mean
        low = mean.value if mean.low is None else mean.low
        high = mean.value if mean.high is None else mean.high
        sure = low > 0 or high < 0
        colour = SAME if not sure else BETTER if (mean.value > 0) == line.higher else WORSE
        ax.plot([low, high], [y, y], color=colour, lw=2)
        ax.plot(mean.value, y, "o", color=colour, ms=4)
    ax.axvline(0, color="0.5", lw=0.8)
    ax.set_yticks(range(len(lines)), [line.arm for line in lines], fontsize=8)
    ax.invert_yaxis()
    ax.tick_params(axis="x", labelsize=8)
    if lines:
        way = "more" if lines[0].higher else "less"
        ax.set_title(f"{workload}: {lines[0].metric} ({way} is better)", fontsize=9)
    ax.grid(axis="x", alpha=0.3)


def performance(rows: Sequence[RunRow], reference: str, path: Path) -> bool:
    """Share of problems solved within a factor of the best arm's cost; False where no run has a target."""
    factors = np.logspace(0, 1.5, 200)
    fig, axes = plt.subplots(1, 2, figsize=(11, 4.2), sharey=True, layout="constrained")
    drawn = False
    for ax, (cost, unit) in zip(axes, COSTS.items(), strict=True):
        for i, (arm, share) in enumerate(profiles(rows, cost, reference, factors).items()):
            colour, style = plt.get_cmap("tab10")(i % 10), STYLES[i // 10]
            ax.step(factors, share, where="post", color=colour, ls=style, lw=2.4 if arm == reference else 1.3, label=arm)
            drawn = True
        ax.set_xscale("log")
        ticks = [1, 2, 5, 10, 20]
        ax.set_xticks(ticks, [str(t) for t in ticks])
        ax.minorticks_off()
        ax.set_ylim(0, 1.02)
        ax.set_xlabel(f"times the best arm's {unit} to the target")
        ax.grid(alpha=0.3)
    axes[0].set_ylabel("share of workload and seed pairs solved")
    axes[1].legend(fontsize=8, loc="center left", bbox_to_anchor=(1.01, 0.5))
    if drawn:
        fig.savefig(path, dpi=110)
    plt.close(fig)
    return drawn

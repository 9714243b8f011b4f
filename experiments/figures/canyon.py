"""Fig. 3: what the condition number costs gradient descent, beside the theory, and what preconditioning makes of it."""

from __future__ import annotations

import math
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import torch
from matplotlib.axes import Axes
from numpy.typing import NDArray

from adaptive_opt import AdaptiveOptimizer, ConstantPolicy, LanczosProbe

from ..loop import train
from ..tasks.canyon import Canyon
from .common import BLUE, GREEN, GREY, VERMILLION, Drawn, save

SEED, KAPPAS, GOAL = 0, (100, 10_000), 1e-3


def descent(kappa: float, steps: int, share: float = 1.0) -> NDArray[np.float64]:
    """Gradient descent on (x^2 + y^2 / kappa) / 2 from (1, 1), where the theory is exact: (steps + 1, 2).

    share: of the best constant step 2 / (1 + 1/kappa).
    """
    curvature = np.array([1.0, 1.0 / kappa])
    step = share * 2 / (1 + 1 / kappa)
    path = [np.array([1.0, 1.0])]
    for _ in range(steps):
        path.append(path[-1] - step * curvature * path[-1])
    return np.array(path)


def first(errors: NDArray[np.float64], share: float) -> int:
    """Iterations until the error is at `share` of its start."""
    return int(np.argmax(errors <= share * errors[0]))


def theory(kappa: float, share: float) -> int:
    """The same from (kappa - 1) / (kappa + 1) an iteration."""
    return math.ceil(math.log(share) / math.log((kappa - 1) / (kappa + 1)))


def net_steps(kappa: float, mode: str, steps: int = 60_000) -> int | None:
    """Steps of the wrapped SGD at its best rate on 10 x 20 least squares until the loss is at 1e-3 of its start."""
    task = Canyon(SEED, kappa=kappa)
    optimizer = AdaptiveOptimizer(
        torch.optim.SGD(task.model.parameters(), lr=task.best_lr),
        task.model,
        loss_fn=task.loss_fn,
        probe=LanczosProbe(overhead=0),
        policy=ConstantPolicy(mode),
        sinks=[lambda report: None],
    )
    goal = GOAL * task.evaluate()["loss"]
    outcome = train(task, optimizer, steps=steps, until=lambda loss: loss < goal)
    return outcome.steps if outcome.losses[-1] < goal else None


def draw(folder: Path) -> Drawn:
    errors = {k: np.linalg.norm(descent(k, 12 * k), axis=1) for k in KAPPAS}
    nets = {(k, mode): net_steps(k, mode) for k in KAPPAS for mode in ("base", "kfac")}
    fig, axes = plt.subplots(1, 4, figsize=(15, 3.9), layout="constrained", width_ratios=(1, 1, 1.2, 1.2))
    for ax, kappa in zip(axes[:2], KAPPAS, strict=True):
        _valley(ax, kappa)
    _errors(axes[2], errors)
    _bars(axes[3], nets)
    files = (save(fig, folder / "fig3.png"),)
    small, large = KAPPAS
    half = {k: first(errors[k], 0.5) for k in KAPPAS}
    e = {k: first(errors[k], math.exp(-1)) for k in KAPPAS}
    square = {k: first(errors[k], math.exp(-2)) for k in KAPPAS}
    halved = descent(large, 12 * large, share=0.5)
    crossings = int((np.diff(np.sign(halved[:50, 0])) != 0).sum())
    halved_e = first(np.linalg.norm(halved, axis=1), math.exp(-1))
    return Drawn(
        "Fig. 3: the canyon",
        files,
        "Left: ten steps of gradient descent at its best constant step on (x^2 + y^2 / kappa) / 2 from (1, 1), where the "
        "theory's "
        "factor (kappa - 1) / (kappa + 1) is exact. Middle: the error over the iterations, measured (lines) and by "
        "theory (dots). "
        "Right: steps of SGD at its best learning rate through the wrapper on a 10 x 20 least-squares problem with "
        "exactly that "
        f"condition number (seed {SEED}), until the loss is at {GOAL:g} of its start, as it is and in the mode kfac.",
        (
            f"The factor (kappa - 1) / (kappa + 1) is what is measured: the error is down to 1/e after {e[small]} "
            "iterations at kappa "
            f"{small} (theory {theory(small, math.exp(-1))}) and {e[large]} at kappa {large:,} (theory "
            f"{theory(large, math.exp(-1))}). "
            f"A hundred times the condition number costs a hundred times the iterations.",
            f"Preconditioning is the cure: at kappa {large:,} the least squares need {_steps(nets[large, 'base'])} steps "
            "of SGD and "
            f"{_steps(nets[large, 'kfac'])} with kfac; at kappa {small}, {_steps(nets[small, 'base'])} and "
            f"{_steps(nets[small, 'kfac'])}.",
        ),
        (
            f'"kappa = 100: roughly 100 iterations to cut your error in half" is three times too many: {half[small]} are '
            "measured "
            f"({half[large]:,} at kappa {large:,}; theory 0.35 kappa). In {square[small]} iterations the error falls to 1/e^2.",
            "The zig-zag is a matter of the step, not of the canyon alone: the marble crosses the floor at every step "
            "because the "
            f"best constant step is just below 2 / lambda_max. With half that step it crosses the floor {crossings} times "
            "in 50 "
            f"steps at kappa {large:,}, and is at 1/e after {halved_e:,} iterations instead of {e[large]:,}.",
            "This is gradient descent. Momentum feels sqrt(kappa), Adam's step is another one; what a run's own optimizer "
            "feels is "
            "kappa_effective (docs/numbers.md).",
        ),
        SEED,
    )


def _steps(n: int | None) -> str:
    return "more than 60,000" if n is None else f"{n:,}"


def _valley(ax: Axes, kappa: int) -> None:
    path = descent(kappa, 10)
    x, y = np.meshgrid(np.linspace(-1.3, 1.3, 200), np.linspace(-0.2, 1.3, 200))
    ax.contour(x, y, x**2 + y**2 / kappa, levels=15, colors="0.8", linewidths=0.7)
    ax.plot(path[:, 0], path[:, 1], ".-", color=VERMILLION, lw=1)
    ax.plot(0, 0, "*", color=GREEN, ms=12)
    ax.set_title(f"kappa {kappa:,}: 10 steps", fontsize=11)
    ax.set_xlabel("steep direction")
    ax.set_ylabel("flat direction")


def _errors(ax: Axes, errors: dict[int, NDArray[np.float64]]) -> None:
    for colour, (kappa, e) in zip((BLUE, VERMILLION), errors.items(), strict=True):
        steps = np.unique(np.logspace(0, math.log10(len(e) - 1), 200).astype(int))
        ax.loglog(steps, e[steps] / e[0], color=colour, label=f"kappa {kappa:,}, measured")
        some = np.unique(np.logspace(0, math.log10(len(e) - 1), 14).astype(int))
        ax.loglog(some, ((kappa - 1) / (kappa + 1)) ** some, "o", color=colour, ms=4, mfc="none", label="theory")
    ax.axhline(math.exp(-1), color=GREY, lw=0.8, ls=":")
    ax.text(1.1, math.exp(-1) * 0.8, "1/e", color=GREY, fontsize=9, va="top")
    ax.set_ylim(1e-4, 1.5)
    ax.set_xlabel("iteration")
    ax.set_ylabel("error / its start")
    ax.legend(fontsize=8, loc="lower left")
    ax.grid(alpha=0.3)


def _bars(ax: Axes, nets: dict[tuple[int, str], int | None]) -> None:
    for i, kappa in enumerate(KAPPAS):
        for j, (mode, colour) in enumerate((("base", VERMILLION), ("kfac", GREEN))):
            n = nets[kappa, mode]
            label = {"base": "SGD, best lr", "kfac": "SGD + kfac"}[mode] if i == 0 else None
            ax.bar(i + (j - 0.5) * 0.36, n or 60_000, 0.34, color=colour, label=label)
            ax.text(i + (j - 0.5) * 0.36, (n or 60_000) * 1.12, _steps(n), ha="center", fontsize=9)
    ax.set_yscale("log")
    ax.set_ylim(1, 4e5)
    ax.set_xticks(range(len(KAPPAS)), [f"kappa {k:,}" for k in KAPPAS])
    ax.set_ylabel(f"steps to {GOAL:g} of the loss")
    ax.legend(fontsize=8, loc="upper left")

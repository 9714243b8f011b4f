"""Fig. 2, 2b, 2c: what a framework shows and what the three numbers show, of the same run at the same moment."""

from __future__ import annotations

import copy
import itertools
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import torch
from matplotlib.axes import Axes
from numpy.typing import NDArray
from torch import nn

from adaptive_opt import AdaptiveOptimizer, ConstantPolicy, LanczosProbe, Reading

from ..tasks.digits import Digits
from .common import BLUE, GREEN, ORANGE, VERMILLION, Drawn, dense_spectrum, save, with_error

SEED, WIDTH, STEPS, MOMENT, LR = 0, 16, 900, 400, 0.2


def net(gain: float) -> nn.Sequential:
    """64-16-16-16-16-10, tanh; `gain` on the weights at the start: 0.2 makes a plateau around a saddle."""
    torch.manual_seed(SEED)
    sizes = [64, WIDTH, WIDTH, WIDTH, WIDTH]
    layers: list[nn.Module] = []
    for n_in, n_out in itertools.pairwise(sizes):
        layers += [nn.Linear(n_in, n_out), nn.Tanh()]
    model = nn.Sequential(*layers, nn.Linear(WIDTH, 10))
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(gain)
    return model


class Course:
    """Full-batch SGD on the 1400 digits, with a full reading every 50 steps."""

    def __init__(self, gain: float, escape: bool = False, steps: int = STEPS, moment: int = MOMENT):
        task = Digits(SEED)
        self.model, self.x, self.y = net(gain), *task.train
        self.criterion = nn.CrossEntropyLoss()
        self.losses: list[float] = []
        self.norms: list[float] = []
        self.readings: list[Reading] = []
        self.sentences: list[str] = []
        self.at: Reading | None = None  # of the moment, with more products
        self.eigenvalues = None
        policy = ConstantPolicy("base", ("escape",) if escape else ())
        optimizer = AdaptiveOptimizer(
            torch.optim.SGD(self.model.parameters(), lr=LR),
            self.model,
            loss_fn=self.criterion,
            probe=LanczosProbe(every=50, num_steps=20),
            policy=policy,
            sinks=[lambda report: self.sentences.extend(e.sentence() for e in report.events)],
        )
        for step in range(steps):
            optimizer.zero_grad()
            loss = self.criterion(self.model(self.x), self.y)
            loss.backward()
            if step == moment and not escape:
                self.at = optimizer.probe_now()
                self.eigenvalues = self._dense()
            optimizer.step()
            assert optimizer.report is not None
            self.losses.append(float(loss.detach()))
            self.norms.append(optimizer.report.grad_norm or 0.0)
            if optimizer.report.reading is not None:
                self.readings.append(optimizer.report.reading)
        task.model = self.model
        self.accuracy = task.evaluate()["test_accuracy"]

    def _dense(self) -> NDArray[np.float64]:
        """All eigenvalues, on a copy that the optimizer does not listen to."""
        model, criterion = copy.deepcopy(self.model), nn.CrossEntropyLoss()
        return dense_spectrum(lambda: criterion(model(self.x), self.y), list(model.parameters()))


def draw(folder: Path) -> Drawn:
    stuck, helped, healthy = Course(0.2), Course(0.2, escape=True), Course(1.6, moment=STEPS - 1)
    files = (save(_two_views(stuck), folder / "fig2b.png"), save(_moment(stuck, helped), folder / "fig2c.png"))
    assert stuck.at is not None
    assert healthy.at is not None
    assert stuck.eigenvalues is not None
    assert healthy.eigenvalues is not None
    r, h = stuck.at, healthy.at
    n = len(stuck.eigenvalues)
    below = int((stuck.eigenvalues < -0.01 * stuck.eigenvalues.max()).sum())
    h_below = int((healthy.eigenvalues < -0.01 * healthy.eigenvalues.max()).sum())
    h_negative = int((healthy.eigenvalues < -1e-6 * healthy.eigenvalues.max()).sum())
    on_the_way = [x for x in healthy.readings if x.delta]
    most = max((x.delta or 0 for x in healthy.readings), default=0)
    after = next((s for s in helped.sentences if "kept" in s), "no escape was made")
    return Drawn(
        "Fig. 2, 2b, 2c: the same run, the same moment, two views",
        files,
        f"A tanh net 64-16-16-16-16-10 (n = {n}) whose weights start at a fifth of their size, full-batch SGD at lr {LR} "
        "on 1400 "
        f"digits; a full reading of 20 Lanczos steps every 50 steps. At step {MOMENT} the loss is "
        f"{stuck.losses[MOMENT]:.4f} and "
        f"has moved by {abs(stuck.losses[MOMENT] - stuck.losses[MOMENT - 100]):.1g} in 100 steps, the gradient norm is "
        f"{stuck.norms[MOMENT]:.2g}. The reading of that moment: kappa >= {with_error(r.kappa)}, epsilon "
        f"{with_error(r.epsilon)}, lambda_min {with_error(r.lambda_min, r.lambda_min_error)}, delta >= {r.delta}; a dense "
        f"eigendecomposition counts {below} eigenvalues below -1 % of epsilon.",
        (
            "Loss and gradient alone look converged, and the reading of the same moment shows that it is no minimum: negative "
            f"curvature of {with_error(r.lambda_min)}, {100 * abs((r.lambda_min or 0) / (r.lambda_max or 1)):.2g} % of "
            "the largest.",
            f"Acting on it leaves the plateau: {after}. After {STEPS} steps the loss is {helped.losses[-1]:.3f} "
            f"({helped.accuracy:.1f} % test accuracy) against {stuck.losses[-1]:.3f} ({stuck.accuracy:.1f} %).",
        ),
        (
            '"delta > 0: do not ship" is wrong as a rule. The same net with weights 8 times as large at the start trains to '
            f"{healthy.losses[-1]:.3f} ({healthy.accuracy:.1f} % test accuracy). On its way {len(on_the_way)} of "
            f"{len(healthy.readings)} readings have delta > 0, up to {most}; at its last step the dense count finds "
            f"{h_negative} of "
            f"{n} eigenvalues below zero, {h_below} of them below -1 % of epsilon (lambda_min {with_error(h.lambda_min)}, "
            "lambda_max "
            f"{with_error(h.lambda_max)}). So the count needs a tolerance, and only a stall with negative curvature is a "
            "saddle: that "
            "is what the rules act on.",
            "Kappa says nothing here: it is a lower bound that grows with the number of Lanczos steps.",
        ),
        SEED,
    )


def _two_views(run: Course) -> plt.Figure:
    fig, axes = plt.subplots(3, 2, figsize=(11, 6.6), sharex=True, layout="constrained")
    steps = range(MOMENT + 1)
    shown = [r for r in run.readings if r.step <= MOMENT]
    at = [r.step for r in shown]
    axes[0, 0].set_title("what the framework shows", fontsize=12)
    axes[0, 1].set_title("what the three numbers show", fontsize=12)
    _curve(axes[0, 0], steps, run.losses[: MOMENT + 1], "loss")
    axes[0, 0].set_ylim(0, 2.6)
    _curve(axes[1, 0], steps, run.norms[: MOMENT + 1], "gradient norm", log=True)
    _curve(axes[2, 0], steps, [LR] * (MOMENT + 1), "learning rate")
    axes[2, 0].set_ylim(0, 2 * LR)
    right = (("kappa", VERMILLION, "kappa, at least"), ("epsilon", ORANGE, "epsilon, at least"))
    for ax, (name, colour, label) in zip(axes[:2, 1], right, strict=True):
        ax.plot(at, [getattr(r, name) for r in shown], "o-", color=colour, ms=4)
        ax.set_ylim(0, 1.25 * max(getattr(r, name) for r in shown))
        ax.set_ylabel(label)
    axes[2, 1].step(at, [r.delta for r in shown], "o-", color=GREEN, where="post", ms=4)
    axes[2, 1].set_ylim(0, 1.25 * max(r.delta or 1 for r in shown))
    axes[2, 1].set_ylabel("delta, at least")
    for ax in axes.flat:
        ax.grid(alpha=0.3)
    for ax in axes[2]:
        ax.set_xlabel("step")
    fig.align_ylabels()
    return fig


def _curve(ax: Axes, x: range, y: list[float], label: str, log: bool = False) -> None:
    ax.plot(x, y, color=BLUE)
    ax.set_ylabel(label)
    if log:
        ax.set_yscale("log")


def _moment(stuck: Course, helped: Course) -> plt.Figure:
    assert stuck.at is not None
    r = stuck.at
    fig, (left, right, after) = plt.subplots(1, 3, figsize=(13, 3.4), layout="constrained", width_ratios=(1, 1.2, 1.4))
    moved = abs(stuck.losses[MOMENT] - stuck.losses[MOMENT - 100])
    _box(
        left,
        f"the framework, step {MOMENT}",
        [
            f"loss              {stuck.losses[MOMENT]:.4f}",
            f"  in 100 steps    {moved:.1e} less",
            f"gradient norm     {stuck.norms[MOMENT]:.1e}",
            f"learning rate     {LR:g}",
        ],
        '"converged"',
        GREEN,
    )
    _box(
        right,
        f"the numbers, step {MOMENT}",
        [
            f"lambda_max   {with_error(r.lambda_max, r.lambda_max_error)}",
            f"lambda_min   {with_error(r.lambda_min, r.lambda_min_error)}",
            f"kappa     >= {with_error(r.kappa)}",
            f"epsilon   >= {with_error(r.epsilon)}",
            f"delta     >= {r.delta}",
        ],
        "a saddle: stalled at negative curvature",
        VERMILLION,
    )
    after.plot(stuck.losses, color=BLUE, label=f"SGD: {stuck.accuracy:.0f} % test accuracy")
    after.plot(helped.losses, color=ORANGE, label=f"SGD + escape: {helped.accuracy:.0f} %")
    after.axvline(MOMENT, color="0.5", ls=":")
    after.text(MOMENT + 8, 2.4, "the moment", color="0.35", fontsize=9)
    after.set_ylim(0, 2.6)
    after.set_title("what came of it", fontsize=12)
    after.set_xlabel("step")
    after.set_ylabel("loss")
    after.legend(fontsize=9, loc="lower left")
    after.grid(alpha=0.3)
    return fig


def _box(ax: Axes, title: str, lines: list[str], verdict: str, colour: str) -> None:
    ax.set_title(title, fontsize=12)
    ax.set_xticks([])
    ax.set_yticks([])
    for side in ax.spines.values():
        side.set_color("0.6")
    ax.text(0.06, 0.90, "\n".join(lines), transform=ax.transAxes, va="top", family="monospace", fontsize=11, linespacing=1.8)
    ax.text(0.5, 0.07, verdict, transform=ax.transAxes, ha="center", color=colour, fontsize=12, weight="bold")

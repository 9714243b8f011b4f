"""Fig. 5: the saddle point trap, and the ways out of it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import torch
from matplotlib.axes import Axes
from torch.optim import SGD, Adam, Optimizer

from adaptive_opt import AdaptiveOptimizer, LanczosProbe, checkup

from ..loop import train
from ..tasks.saddle import Saddle
from .common import BLUE, GREY, ORANGE, PURPLE, VERMILLION, Drawn, dense_spectrum, save, with_error

SEED, STEPS, KICKS = 0, 600, (1e-3, 1e-6)


def course(base: Callable[..., Optimizer], wrapped: bool = False, kick: float = 0.0) -> tuple[list[float], list[str]]:
    """Losses from the origin, and what was done; `kick`: a random shift of the weights before the first step."""
    task = Saddle(SEED, steps=STEPS)
    g = torch.Generator().manual_seed(SEED)
    with torch.no_grad():
        for p in task.model.parameters():
            p.add_(kick * torch.randn(p.shape, generator=g))
    optimizer = base(task.model.parameters())
    if wrapped:
        probe = LanczosProbe(overhead=0.05, price=1.0)
        optimizer = AdaptiveOptimizer(optimizer, task.model, loss_fn=task.loss_fn, probe=probe, sinks=[lambda report: None])
    torch.manual_seed(SEED)
    outcome = train(task, optimizer)
    return outcome.losses, outcome.treatments


def out_of_it(losses: list[float]) -> int | None:
    """The first step at which the loss is below half of its start."""
    return next((i for i, loss in enumerate(losses) if loss < losses[0] / 2), None)


def draw(folder: Path) -> Drawn:
    sgd, adam = lambda p: SGD(p, lr=0.1), lambda p: Adam(p, lr=0.01)
    courses = {
        "SGD": course(sgd)[0],
        "Adam": course(adam)[0],
        f"SGD, kicked by {KICKS[0]:g}": course(sgd, kick=KICKS[0])[0],
        f"SGD, kicked by {KICKS[1]:g}": course(sgd, kick=KICKS[1])[0],
    }
    helped, log = course(sgd, wrapped=True)
    courses["SGD + escape"] = helped
    task = Saddle(SEED)
    reading = checkup(task.model, task.loss_fn, (task.x, task.y), num_steps=30)
    eigenvalues = dense_spectrum(lambda: task.loss_fn(task.model(task.x), task.y), list(task.model.parameters()))
    fig, (left, right) = plt.subplots(1, 2, figsize=(12, 4.4), layout="constrained", width_ratios=(1, 1.4))
    _surface(left, task)
    _losses(right, courses)
    files = (save(fig, folder / "fig5.png"),)
    n, negative = len(eigenvalues), int((eigenvalues < -1e-6).sum())
    zero = int((abs(eigenvalues) <= 1e-6).sum())
    first = next((s for s in log if "along" in s and "-> kept" in s), "nothing was kept")
    outs = {name: out_of_it(losses) for name, losses in courses.items()}
    return Drawn(
        "Fig. 5: the saddle point trap",
        files,
        f"A two-layer linear net (8-8-8, n = {n}) that starts exactly at W1 = W2 = 0, where the gradient of its "
        "least-squares loss "
        "is exactly zero. Left: the loss over the plane of the most negative and the most positive eigenvector there. "
        "Right: the "
        f"loss of {STEPS} full-batch steps. The reading of the start: lambda_min "
        f"{with_error(reading.lambda_min, reading.lambda_min_error)}, lambda_max {with_error(reading.lambda_max)}, delta >= "
        f"{reading.delta}; a dense eigendecomposition counts {negative} negative, {zero} zero and {n - negative - zero} "
        "positive "
        f"eigenvalues.",
        (
            "The gradient says that it is over and the spectrum says that it is not. SGD and Adam both stay for all "
            f"{STEPS} steps: "
            f"a gradient of exactly zero moves neither.",
            f"The step along negative curvature leaves it: {first}; final loss {helped[-1]:.2g} against "
            f"{courses['SGD'][-1]:.3g}.",
        ),
        (
            f"A random kick does it too: by {KICKS[0]:g}, SGD is below half of the loss at step {_at(outs, KICKS[0])}, by "
            f"{KICKS[1]:g} at step {_at(outs, KICKS[1])}; with the escape at step {outs['SGD + escape']} (the stall has "
            "to be seen "
            "first). What the line search adds is that it is sure, and that it says so.",
            "delta is a certified lower bound: Lanczos from one vector finds one copy of an eigenvalue that occurs "
            "several times, "
            f"and this one has copies: {reading.delta} are certified of {negative}.",
            "Eigenvalues are no coin flips: with independent signs the chance of a minimum would be 2^-n, and Fig. 2's "
            "net that trains "
            "well still has negative ones at its end. What makes a trap is a stall, not a negative eigenvalue.",
        ),
        SEED,
    )


def _at(outs: dict[str, int | None], kick: float) -> str:
    return str(outs[f"SGD, kicked by {kick:g}"])


def _surface(ax: Axes, task: Saddle) -> None:
    """The loss over the span of the extreme eigenvectors at the origin."""
    params = list(task.model.parameters())
    grads = torch.autograd.grad(task.loss_fn(task.model(task.x), task.y), params, create_graph=True)
    flat = torch.cat([g.reshape(-1) for g in grads])
    rows = [torch.cat([h.reshape(-1) for h in torch.autograd.grad(g, params, retain_graph=True)]) for g in flat]
    values, vectors = torch.linalg.eigh(torch.stack(rows))
    down, up = vectors[:, 0], vectors[:, -1]
    reach = np.linspace(-1.6, 1.6, 61)
    loss = np.empty((61, 61))
    with torch.no_grad():
        for i, a in enumerate(reach):
            for j, b in enumerate(reach):
                w = float(b) * down + float(a) * up
                for p, piece in zip(params, w.split([p.numel() for p in params]), strict=True):
                    p.copy_(piece.view_as(p))
                loss[i, j] = float(task.loss_fn(task.model(task.x), task.y))
        for p in params:
            p.zero_()
    drawn = ax.contourf(reach, reach, loss, levels=24, cmap="cividis")
    ax.figure.colorbar(drawn, ax=ax, label="loss")
    ax.plot(0, 0, "o", color=VERMILLION, ms=8, label="the start: the gradient is zero")
    ax.annotate("", (1.1, 0), (0.1, 0), arrowprops={"color": "white", "width": 1.5, "headwidth": 8})
    ax.text(0.15, 0.10, "the way out", color="white", fontsize=10)
    ax.set_xlabel(f"along lambda_min = {float(values[0]):.3g}")
    ax.set_ylabel(f"along lambda_max = {float(values[-1]):.3g}")
    ax.legend(fontsize=9, loc="upper left")


def _losses(ax: Axes, courses: dict[str, list[float]]) -> None:
    styles = ((BLUE, "-"), (PURPLE, "--"), (GREY, "-"), (GREY, ":"), (ORANGE, "-"))
    for (name, losses), (colour, style) in zip(courses.items(), styles, strict=True):
        ax.plot(losses, color=colour, ls=style, label=name, lw=2 if "escape" in name else 1.5)
    ax.set_yscale("log")
    ax.set_xlabel("step")
    ax.set_ylabel("loss")
    ax.legend(fontsize=9)
    ax.grid(alpha=0.3)

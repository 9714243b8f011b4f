"""Fig. 6: what fifty layers make of a signal: vanishing, exploding, kept, and after treatment."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import torch
from matplotlib.axes import Axes
from torch import nn

from adaptive_opt import AdaptiveOptimizer, LanczosProbe, LayerReading
from adaptive_opt.interventions import Spectral

from ..loop import train
from ..tasks.digits import Digits
from .common import BLUE, GREEN, GREY, PURPLE, VERMILLION, Drawn, save

SEED, LAYERS, STEPS = 0, 50, 300


@dataclass(frozen=True)
class Chain:
    """A net of 50 layers: its measured layers, the gradient at each, how it trains."""

    name: str
    layers: tuple[LayerReading, ...]
    gradients: list[float]  # norm of the loss's gradient at each layer's input, first layer first
    accuracy: float  # test, after training
    loss: float
    done: str = ""

    @property
    def rms(self) -> list[float]:
        return [layer.sigma_rms for layer in self.layers]

    @property
    def largest(self) -> list[float]:
        return [layer.sigma_max for layer in self.layers]


def chain(name: str, gain: float, treated: bool = False, unit_norm: bool = False) -> Chain:
    """Train a 50-layer ReLU net whose He weights are multiplied by `gain`; `unit_norm`: every spectral norm set to 1."""
    task = Digits(SEED, depth=LAYERS - 1, gain=gain, steps=STEPS)
    if unit_norm:
        with torch.no_grad():
            for layer in task.model:
                if isinstance(layer, nn.Linear):
                    layer.weight.div_(torch.linalg.matrix_norm(layer.weight, 2))
    optimizer = AdaptiveOptimizer(
        torch.optim.Adam(task.model.parameters(), lr=1e-4),
        task.model,
        loss_fn=task.loss_fn,
        probe=LanczosProbe(every=STEPS - 1),
        interventions={"spectral": Spectral()} if treated else {},
        sinks=[lambda report: None],
    )
    x, y = task.train[0][:256], task.train[1][:256]
    optimizer.zero_grad()
    task.loss_fn(task.model(x), y).backward()
    if treated:
        optimizer.step()  # the repair stands in for this step
        optimizer.zero_grad()
        task.loss_fn(task.model(x), y).backward()
    layers = optimizer.probe_now().layers
    gradients = signal(task.model, task.loss_fn, x, y)
    optimizer.zero_grad()
    torch.manual_seed(SEED)
    outcome = train(task, optimizer)
    done = next((line for line in outcome.treatments if "sigma_rms" in line and "pending" not in line), "")
    return Chain(name, layers, gradients, outcome.metrics["test_accuracy"], outcome.train_loss, done)


def signal(model: nn.Sequential, loss_fn: nn.Module, x: torch.Tensor, y: torch.Tensor) -> list[float]:
    """Norm of the gradient at the input of every linear layer."""
    inputs = []
    h = x.clone().requires_grad_()
    for layer in model:
        if isinstance(layer, nn.Linear):
            inputs.append(h)
        h = layer(h)
    return [float(g.norm()) for g in torch.autograd.grad(loss_fn(h, y), inputs)]


def draw(folder: Path) -> Drawn:
    chains = [
        chain("vanishing: He x 0.7", 0.7),
        chain("exploding: He x 1.4", 1.4),
        chain("kept: He", 1.0),
        chain("vanishing, treated", 0.7, treated=True),
        chain("exploding, treated", 1.4, treated=True),
        chain("He, every largest sigma set to 1", 1.0, unit_norm=True),
    ]
    fig, axes = plt.subplots(1, 3, figsize=(15, 4.6), layout="constrained")
    _lines(axes[0], chains, "rms", "sigma_rms of the layer's Jacobian")
    _lines(axes[1], chains, "largest", "largest singular value")
    _lines(axes[2], chains, "gradients", "gradient norm at the layer's input")
    axes[2].set_ylim(1e-14, 1e8)
    said = {"title": "test accuracy after training", "title_fontsize": 8, "fontsize": 8}
    axes[2].legend(loc="center left", bbox_to_anchor=(1.01, 0.5), **said)
    files = (save(fig, folder / "fig6.png"),)
    v, e, k, vt, et, u = chains
    share = {c.name: c.gradients[0] / c.gradients[-1] for c in chains}  # what is left at the first layer
    return Drawn(
        "Fig. 6: gradients play telephone",
        files,
        f"ReLU nets of {LAYERS} layers without normalisation on the digits (seed {SEED}), measured at the start on 256 "
        "samples: for each "
        "layer the root mean square and the largest singular value of its Jacobian, and the norm of the loss's gradient "
        "at its "
        f"input; then {STEPS} steps of Adam at 1e-4. The treated ones are repaired by `spectral` at the first step of the run.",
        (
            f"Vanishing: sigma_rms {np.median(v.rms):.2g} a layer, and the gradient at the first layer is {share[v.name]:.1g} "
            f"times that at the last: {v.accuracy:.0f} % test accuracy after training. Exploding: sigma_rms "
            f"{np.median(e.rms):.2g}, "
            f"{share[e.name]:.1g} times: {e.accuracy:.0f} %. Near one: sigma_rms {np.median(k.rms):.2g}: {k.accuracy:.0f} %.",
            f"Treated, both are near one ({np.median(vt.rms):.2g} and {np.median(et.rms):.2g}) and train to "
            f"{vt.accuracy:.0f} % and "
            f"{et.accuracy:.0f} %.",
            "Which layer is the problem can be said: every layer has its own number.",
        ),
        (
            "It is not the largest singular value that has to be 1. In the net that keeps its signal it is "
            f"{np.median(k.largest):.2g} "
            f"in the median layer. With every largest one set to 1, as spectral normalisation does, sigma_rms is "
            f"{np.median(u.rms):.2g} and the gradient of the first layer is {share[u.name]:.1g} times the last one's in "
            f"float32: {u.accuracy:.0f} % test accuracy.",
            "The singular values are those of the Jacobian with the activation. Orthogonal weights would have all of "
            "theirs at 1, and "
            "ReLU would still halve the signal's mean square at every layer.",
        ),
        SEED,
    )


def _lines(ax: Axes, chains: list[Chain], what: str, label: str) -> None:
    styles = itertools.cycle(((VERMILLION, "-"), (PURPLE, "-"), (BLUE, "-"), (VERMILLION, ":"), (PURPLE, ":"), (GREY, "--")))
    for c, (colour, style) in zip(chains, styles, strict=False):
        values = getattr(c, what)
        ax.plot(range(1, len(values) + 1), values, color=colour, ls=style, lw=1.6, label=f"{c.name}: {c.accuracy:.0f} %")
    if what == "gradients":
        ax.set_yscale("log")
    else:
        ax.axhline(1, color=GREEN, lw=1)
        ax.set_ylim(bottom=0)
    ax.set_xlabel("layer")
    ax.set_title(label, fontsize=11)
    ax.grid(alpha=0.3)

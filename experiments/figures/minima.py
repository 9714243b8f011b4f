"""Fig. 4a, 4b: a flat and a sharp minimum of one real net, and what each is worth under a shift of inputs and of weights."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import torch
from matplotlib.axes import Axes
from torch import Tensor, nn

from adaptive_opt import AdaptiveOptimizer, ConstantPolicy, LanczosProbe, Reading, checkup
from adaptive_opt.curvature import Hessian, top_eigenpairs
from adaptive_opt.modes import SAM, BaseStep

from ..tasks.digits import Digits
from .common import BLUE, GREEN, GREY, VERMILLION, Drawn, save, with_error

SEEDS = (0, 1, 2)
LOSS = 0.01  # training loss at which each is taken: two minima are compared at the same height
SHIFTS = (0.0, 0.1, 0.2, 0.3, 0.4, 0.5)  # standard deviation of the noise on inputs in [0, 1]
WEIGHTS = (0.0, 0.1, 0.2, 0.3, 0.5, 0.7, 1.0)  # size of a random shift, relative to each weight tensor's norm
RESCALE = 30.0


class Minimum:
    """A net at training loss 0.01, and what is measured there."""

    def __init__(self, model: nn.Module, task: Digits, steps: int):
        self.model, self.task, self.steps = model, task, steps
        self.reading: Reading = checkup(model, task.loss_fn, task.train, num_steps=30, seed=0)
        task.model = model
        self.test = task.evaluate()["test_accuracy"]

    def loss(self) -> float:
        with torch.no_grad():
            return float(self.task.loss_fn(self.model(self.task.train[0]), self.task.train[1]))

    def along(self, direction: list[Tensor], lengths: np.ndarray) -> list[float]:
        """Training loss at each length along a direction."""
        params = list(self.model.parameters())
        before = [p.detach().clone() for p in params]
        out = []
        for t in lengths:
            with torch.no_grad():
                for p, w, d in zip(params, before, direction, strict=True):
                    p.copy_(w + float(t) * d)
            out.append(self.loss())
        with torch.no_grad():
            for p, w in zip(params, before, strict=True):
                p.copy_(w)
        return out

    def inputs_shifted(self, size: float) -> float:
        """Test accuracy with noise on the images."""
        g = torch.Generator().manual_seed(7)
        x, y = self.task.test
        with torch.no_grad():
            hits = [(self.model(x + size * torch.randn(x.shape, generator=g)).argmax(1) == y).float().mean() for _ in range(10)]
        return 100 * float(torch.stack(hits).mean())

    def weights_shifted(self, size: float) -> float:
        """Test accuracy with noise on the weights, relative to each tensor's norm."""
        g = torch.Generator().manual_seed(7)
        x, y = self.task.test
        hits = []
        for _ in range(10):
            noisy = copy.deepcopy(self.model)
            with torch.no_grad():
                for p in noisy.parameters():
                    noise = torch.randn(p.shape, generator=g)
                    p.add_(noise * (size * p.norm() / noise.norm()))
                hits.append((noisy(x).argmax(1) == y).float().mean())
        return 100 * float(torch.stack(hits).mean())


def flat(seed: int) -> Minimum:
    """AdamW in small batches with SAM."""
    task = Digits(seed, batch_size=32)
    optimizer = AdaptiveOptimizer(
        torch.optim.AdamW(task.model.parameters(), lr=2e-3, weight_decay=0.0),
        task.model,
        loss_fn=task.loss_fn,
        probe=LanczosProbe(overhead=0),
        policy=ConstantPolicy("sam"),
        modes={"base": BaseStep(), "sam": SAM(rho=0.02)},
        sinks=[lambda report: None],
    )
    return _reached(task, optimizer, task.batch, every=20)


def sharp(seed: int) -> Minimum:
    """Plain gradient descent on the whole set with a small step: nothing keeps it out of narrow places."""
    task = Digits(seed)
    optimizer = torch.optim.SGD(task.model.parameters(), lr=0.1, momentum=0.9)
    return _reached(task, optimizer, lambda step: task.train, every=10)


def _reached(
    task: Digits, optimizer: torch.optim.Optimizer, batch: Callable[[int], tuple[Tensor, Tensor]], every: int
) -> Minimum:
    """Train until the whole training loss is at LOSS."""
    torch.manual_seed(0)
    for step in range(20_000):
        x, y = batch(step)
        optimizer.zero_grad()
        task.loss_fn(task.model(x), y).backward()
        optimizer.step()
        if step % every == every - 1:
            with torch.no_grad():
                if float(task.loss_fn(task.model(task.train[0]), task.train[1])) <= LOSS:
                    break
    return Minimum(copy.deepcopy(task.model), task, step + 1)


def rescaled(m: Minimum, factor: float) -> Minimum:
    """The very same function: the first layer times `factor`, the second divided by it (Dinh et al., 2017)."""
    model = copy.deepcopy(m.model)
    first, second = [layer for layer in model.children() if isinstance(layer, nn.Linear)][:2]
    with torch.no_grad():
        first.weight.mul_(factor)
        first.bias.mul_(factor)
        second.weight.div_(factor)
    return Minimum(model, m.task, m.steps)


def draw(folder: Path) -> Drawn:
    flats, sharps = [flat(s) for s in SEEDS], [sharp(s) for s in SEEDS]
    same = rescaled(flats[0], RESCALE)
    a, b = flats[0], sharps[0]
    files = (
        save(_picture(a, "4a", "flat: AdamW in batches of 32, with SAM", BLUE), folder / "fig4a.png"),
        save(_picture(b, "4b", "sharp: heavy ball on the whole set", VERMILLION), folder / "fig4b.png"),
        save(_shifts(flats, sharps, same), folder / "fig4c.png"),
    )
    eps = {name: [m.reading.epsilon or 0.0 for m in ms] for name, ms in (("flat", flats), ("sharp", sharps))}
    test = {name: float(np.mean([m.test for m in ms])) for name, ms in (("flat", flats), ("sharp", sharps))}
    inputs = {name: [float(np.mean([m.inputs_shifted(s) for m in ms])) for s in (0.2, 0.4)] for name, ms in
              (("flat", flats), ("sharp", sharps))}  # fmt: skip
    weights = {name: [float(np.mean([m.weights_shifted(s) for m in ms])) for s in (0.3, 0.7)] for name, ms in
               (("flat", flats), ("sharp", sharps))}  # fmt: skip
    ratio = np.mean(eps["sharp"]) / np.mean(eps["flat"])
    shift = max(abs(same.inputs_shifted(s) - a.inputs_shifted(s)) for s in SHIFTS)
    return Drawn(
        "Fig. 4a, 4b: a flat and a sharp minimum",
        files,
        "One net (64-64-64-10, ReLU) on 1400 digits, trained from the same weights in two ways until the loss of the "
        "whole training "
        f"set is {LOSS:g}: AdamW in batches of 32 with SAM (4a), heavy ball on the whole set (4b). Left: training loss "
        "along five "
        "random directions and along the top eigenvector, in units of weight. Right: test accuracy with noise on inputs "
        "and on weights, mean "
        f"of 10 draws. The third picture has the means of seeds {', '.join(map(str, SEEDS))}, and the flat net with its "
        "first layer times "
        f"{RESCALE:g} and its second divided by {RESCALE:g}: the very same function.",
        (
            f"The two minima differ {ratio:.2g} fold in epsilon at the same loss: {_list(eps['flat'])} against "
            f"{_list(eps['sharp'])} (seeds {', '.join(map(str, SEEDS))}).",
            f"A random shift of the weights by 30 % and 70 % of their norm leaves {weights['flat'][0]:.1f} % and "
            f"{weights['flat'][1]:.1f} % "
            f"test accuracy to the flat ones, {weights['sharp'][0]:.1f} % and {weights['sharp'][1]:.1f} % to the sharp ones.",
        ),
        (
            f"No prophecy of generalisation: without a shift the flat ones have {test['flat']:.1f} % test accuracy, the "
            "sharp ones "
            f"{test['sharp']:.1f} %.",
            f"The article's case, a shift of the inputs: noise of 0.2 and 0.4 leaves {inputs['flat'][0]:.1f} % and "
            f"{inputs['flat'][1]:.1f} % to the flat ones, {inputs['sharp'][0]:.1f} % and {inputs['sharp'][1]:.1f} % to "
            "the sharp "
            f"ones. Nothing blows up.",
            f"Epsilon alone cannot decide it: the rescaled net computes the same function, its epsilon is "
            f"{with_error(same.reading.epsilon)} instead of {with_error(a.reading.epsilon)}, and its accuracy under every "
            "shift of the "
            f"inputs is the same within {shift:.2g} points. Sharpness means something only beside the size of the weights.",
        ),
        SEEDS[0],
    )


def _list(values: list[float]) -> str:
    return ", ".join(f"{v:.3g}" for v in values)


def _directions(m: Minimum) -> tuple[list[list[Tensor]], list[Tensor]]:
    """Five random unit directions, and the top eigenvector."""
    params = list(m.model.parameters())
    g = torch.Generator().manual_seed(3)
    random = []
    for _ in range(5):
        d = [torch.randn(p.shape, generator=g) for p in params]
        size = torch.stack([x.norm() for x in d]).norm()
        random.append([x / size for x in d])
    H = Hessian(m.task.loss_fn(m.model(m.task.train[0]), m.task.train[1]), params)
    start = torch.randn(sum(p.numel() for p in params), generator=g)
    top = top_eigenpairs(H, start, 1).vectors[0]
    pieces, at = [], 0
    for p in params:
        pieces.append(top[at : at + p.numel()].view_as(p))
        at += p.numel()
    return random, pieces


def _picture(m: Minimum, name: str, title: str, colour: str) -> plt.Figure:
    fig, (left, right) = plt.subplots(1, 2, figsize=(10, 3.8), layout="constrained")
    lengths = np.linspace(-2, 2, 41)
    random, top = _directions(m)
    for i, d in enumerate(random):
        left.plot(lengths, m.along(d, lengths), color=GREY, lw=1, label="five random directions" if i == 0 else None)
    left.plot(lengths, m.along(top, lengths), color=colour, lw=2, label=f"top eigenvector, epsilon {m.reading.epsilon:.3g}")
    left.set_ylim(0, 1.5)
    left.set_xlabel("shift of the weights (Euclidean)")
    left.set_ylabel("training loss")
    left.set_title(f"Fig. {name}: {title}", fontsize=11)
    left.legend(fontsize=9, loc="upper center", framealpha=1)
    right.plot(SHIFTS, [m.inputs_shifted(s) for s in SHIFTS], "o-", color=colour, label="noise on the inputs (std)")
    right.plot(WEIGHTS, [m.weights_shifted(s) for s in WEIGHTS], "s--", color=colour, label="noise on the weights (relative)")
    right.set_ylim(0, 102)
    right.set_xlabel("size of the shift")
    right.set_ylabel("test accuracy, %")
    right.legend(fontsize=9, loc="lower left")
    for ax in (left, right):
        ax.grid(alpha=0.3)
    return fig


def _shifts(flats: list[Minimum], sharps: list[Minimum], same: Minimum) -> plt.Figure:
    fig, (left, right) = plt.subplots(1, 2, figsize=(10, 3.8), layout="constrained", sharey=True)
    for ms, colour, name in ((flats, BLUE, "flat"), (sharps, VERMILLION, "sharp")):
        _mean(left, SHIFTS, [[m.inputs_shifted(s) for s in SHIFTS] for m in ms], colour, name)
        _mean(right, WEIGHTS, [[m.weights_shifted(s) for s in WEIGHTS] for m in ms], colour, name)
    label = f"flat, rescaled: epsilon {same.reading.epsilon:.3g}"
    left.plot(SHIFTS, [same.inputs_shifted(s) for s in SHIFTS], "x:", color=GREEN, label=label)
    right.plot(WEIGHTS, [same.weights_shifted(s) for s in WEIGHTS], "x:", color=GREEN, label=label)
    left.set_xlabel("noise on the inputs (standard deviation)")
    right.set_xlabel("noise on the weights (relative to each tensor)")
    left.set_ylabel("test accuracy, %")
    left.set_title("what the article promises: a shift of the data", fontsize=11)
    right.set_title("what epsilon measures: a shift of the weights", fontsize=11)
    for ax in (left, right):
        ax.set_ylim(0, 102)
        ax.grid(alpha=0.3)
        ax.legend(fontsize=9, loc="lower left")
    return fig


def _mean(ax: Axes, x: tuple[float, ...], ys: list[list[float]], colour: str, name: str) -> None:
    y = np.array(ys)
    ax.plot(x, y.mean(0), "o-", color=colour, label=f"{name}, {len(ys)} seeds")
    ax.fill_between(x, y.min(0), y.max(0), color=colour, alpha=0.15)

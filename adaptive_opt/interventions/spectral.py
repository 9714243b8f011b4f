"""Bring a drifting layer back: the root-mean-square singular value of its Jacobian to 1, by a factor on its weights.

Not the largest singular value: with every spectral norm at 1 the average one is far below it and the signal of a deep
net vanishes (docs/evidence.md, "layers").
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any

import torch
from torch import nn

from adaptive_opt.curvature import whole
from adaptive_opt.family import ELEMENTWISE, family
from adaptive_opt.interventions.base import Applied, Patient, Snapshot
from adaptive_opt.records import LayerReading, chains
from adaptive_opt.sharded import placed

# f(c x) = c f(x) for every c > 0: a factor on a layer passes through them to the next one
HOMOGENEOUS = (
    nn.ReLU, nn.LeakyReLU, nn.PReLU, nn.Identity, nn.Dropout, nn.Flatten, nn.Unflatten,
    nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d, nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d, nn.AdaptiveAvgPool2d,
)  # fmt: skip
SPIKE = 5.0  # times the root mean square of the others; 4.0 at most in healthy nets (docs/evidence.md, "layers")
ROUNDING = (
    1e-3  # of a weight's norm: others that are less are no matrix of their own, but what rounding left of one of lower rank
)
LEAST, TOGETHER = 3, 1000.0  # layers of a chain, and their factor on the signal: the diagnosis' own thresholds
POWERS = (("momentum_buffer", -1), ("exp_avg", -1), ("exp_avg_sq", -2), ("square_avg", -2), ("sum", -2))


class Spectral:
    """Multiplies each measured layer's weight so that its sigma_rms is what it ought to be; the base's moments go along.

    In a chain the sigma_rms ought to be 1 in the geometric mean, each layer's own by its shape: (inputs / outputs)^(1/4) of
    that, so that the signal keeps its size on the way there and the gradient on the way back (Glorot and Bengio, 2010, as a
    geometric mean). In a chain with nothing but ReLU-like activations between the layers, biases get the product of the
    factors so far, so that the chain's output is multiplied by one number and its argmax stays. Where that number needs not
    change, because the layers together keep the signal and only single ones are out of their band, each gets the chain's
    geometric mean, and the function stays as it was. Not before the first step: a function that nobody has trained is none
    to be kept (docs/evidence.md, "layers").

    A recurrent matrix becomes the orthogonal one next to it if nothing was learned yet (Saxe et al., 2014); later it is
    multiplied. With it comes a limit on the gradient's norm where the base's steps are as long as their gradients: what keeps
    its size over a long sequence has cliffs (Pascanu et al., 2013). Singular values that stand out of a layer are clipped to
    the largest of the others before it is multiplied.

    Two layers that vanish are left to bases that divide by the size of their gradients: they are out of there in a few steps.

    band: layers whose sigma_rms is within [1 / band, band] of the goal are left alone. limit: the largest factor in one go.
    trial: steps after which the loss must be below its level before the repair.
    """

    name = "spectral"

    def __init__(self, band: float = 1.1, limit: float = 1e4, trial: int = 100):
        if band < 1 or limit <= 1 or trial < 1:
            raise ValueError(f"Spectral(band={band}, limit={limit}, trial={trial}): band of 1 or more, limit above 1")
        self.band, self.limit, self.trial = band, limit, trial

    @torch.no_grad()
    def apply(self, patient: Patient) -> Applied | None:
        """Called when the diagnosis says DRIFTING; None when no measured layer's weight is among the wrapped ones."""
        if patient.model is None or patient.reading is None:
            return None
        mine = {id(p) for p in patient.ctx.params}
        named = {n: p for n, p in patient.model.named_parameters() if id(p) in mine}
        before = Snapshot.take(patient.trend.step, patient.ctx)
        layers, divides = patient.reading.layers, family(patient.ctx.base) in ELEMENTWISE
        done: list[str] = []
        recurrent = [r for r in layers if r.kind == "recurrent" and r.sigma_rms > 0 and r.name in named]
        turned = [r for r in recurrent if self._recurrent(r, named[r.name], patient)]
        if turned:
            done.append(f"brought the singular values of {', '.join(r.name for r in turned)} to 1")
        left = False
        for chain in chains(layers, LEAST):
            chain = [r for r in chain if f"{r.name}.weight" in named]
            small = divides and len(chain) < LEAST and sum(math.log(r.sigma_rms) for r in chain) < 0
            left = left or small
            if chain and not small:
                done += self._chain(chain, named, patient)
        if left and not done:  # nor is the length of a step judged by what vanishes
            return Applied("left the two layers to the base, whose steps are as long for small gradients", last=True)
        if not done:
            return None
        words = "; ".join(done)
        return Applied(words, moved=True, trial=self.trial, before=before, cliffs=bool(turned) and not divides)

    def _recurrent(self, r: LayerReading, w: nn.Parameter, patient: Patient) -> bool:
        """Whether the matrix was changed."""
        if patient.trend.usual_loss is None:
            u, _, vh = torch.linalg.svd(whole(w).float(), full_matrices=False)
            w.copy_(placed((u @ vh).to(w.dtype), w))
            return True
        return _multiply(w, self._factor(1.0, r.sigma_rms), patient)

    def _chain(self, chain: list[LayerReading], named: Mapping[str, nn.Parameter], patient: Patient) -> list[str]:
        """What was done to it, in words."""
        assert patient.model is not None
        passes = len(chain) > 1 and _homogeneous(patient.model, chain)
        same = passes and patient.trend.usual_loss is not None and _balanced(chain)
        if same:
            goals = [math.exp(fmean(math.log(r.sigma_rms) for r in chain))] * len(chain)
        else:
            shapes = [_shape(patient.model.get_submodule(r.name)) for r in chain]
            mean = math.exp(fmean(map(math.log, shapes)))
            goals = [shape / mean for shape in shapes]
        changed: list[LayerReading] = []
        clipped = 0
        through = 1.0  # what the signal has been multiplied by so far
        for r, goal in zip(chain, goals, strict=True):
            w, sigma = named[f"{r.name}.weight"], r.sigma_rms
            if not same and r.sigma_max > SPIKE * sigma:
                kept = _clip(w)
                clipped, sigma = clipped + (kept < 1), sigma * kept
            inside = 1 / self.band <= sigma / goal <= self.band and not same
            factor = 1.0 if inside else self._factor(goal, sigma)
            through *= factor
            changed += [r] * _multiply(w, factor, patient)
            if passes and f"{r.name}.bias" in named:
                _multiply(named[f"{r.name}.bias"], through, patient)
        if not changed and not clipped:
            return []
        worst = max(changed or chain, key=lambda r: r.distance)
        goal = "their mean, which leaves the function as it was" if same else "1, each by its shape"
        words = f"brought sigma_rms of {len(changed)} layers to {goal} ({worst.name} had {worst.sigma_rms:.3g})"
        return [words + (f", outlying singular values clipped in {clipped}" if clipped else "")]

    def _factor(self, goal: float, sigma: float) -> float:
        return min(max(goal / sigma, 1 / self.limit), self.limit)

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        pass


def _multiply(p: nn.Parameter, factor: float, patient: Patient) -> bool:
    """A parameter and the base's averages of its gradients: one that is c times as large has gradients 1/c as large."""
    if factor == 1.0:
        return False
    p.mul_(factor)
    state = patient.ctx.base.state.get(p, {})
    for name, power in POWERS:
        if isinstance(state.get(name), torch.Tensor):
            state[name].mul_(factor**power)
    return True


def _clip(w: nn.Parameter) -> float:
    """Singular values that stand out, down to the largest that does not; what is left of the matrix' Frobenius norm.

    Those of a convolution are of its kernel as a matrix of outputs x (inputs and positions).
    """
    matrix = whole(w).float().flatten(1)
    u, s, vh = torch.linalg.svd(matrix, full_matrices=False)
    squares = s.double().square().tolist()
    rest, k = sum(squares), 0
    while k < len(squares) // 4 and squares[k] > SPIKE**2 * (rest - squares[k]) / (len(squares) - k - 1):
        rest, k = rest - squares[k], k + 1
    if not k or rest < ROUNDING**2 * sum(squares):
        return 1.0
    s[:k] = s[k]
    w.copy_(placed(((u * s) @ vh).reshape(whole(w).shape).to(w.dtype), w))
    return math.sqrt(float(s.double().square().sum()) / sum(squares))


def _shape(layer: nn.Module) -> float:
    """(inputs / outputs)^(1/4): sigma_rms where signal and gradient fare alike."""
    inputs = getattr(layer, "in_features", getattr(layer, "in_channels", None))
    outputs = getattr(layer, "out_features", getattr(layer, "out_channels", None))
    return (inputs / outputs) ** 0.25 if inputs and outputs else 1.0


def _balanced(chain: Sequence[LayerReading]) -> bool:
    """Only single layers are out of their band: together they keep the signal."""
    return abs(sum(math.log(r.sigma_rms) for r in chain)) <= math.log(TOGETHER)


def _homogeneous(model: nn.Module, chain: Sequence[LayerReading]) -> bool:
    """Whether a factor on one of these layers goes through to the next: neighbours in a Sequential with ReLUs between."""
    parent, _, first = chain[0].name.rpartition(".")
    container = model.get_submodule(parent)
    if not isinstance(container, nn.Sequential):
        return False
    names = list(container._modules)
    last = chain[-1].name.rpartition(".")[2]
    members = {r.name for r in chain}
    inside = {f"{parent}.{n}" if parent else n: container._modules[n] for n in names[names.index(first) :]}
    if last not in names or not members <= inside.keys():
        return False
    between = [m for n, m in inside.items() if n not in members and names.index(n.rpartition(".")[2]) < names.index(last)]
    return all(isinstance(m, HOMOGENEOUS) for m in between)

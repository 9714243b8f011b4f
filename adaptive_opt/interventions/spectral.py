"""Bring a drifting layer back: the root-mean-square singular value of its Jacobian to 1, by a factor on its weights.

Not the largest singular value: with every spectral norm at 1 the average one is far below it and the signal of a deep
net vanishes (docs/evidence.md, "layers").
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from adaptive_opt.interventions.base import Applied, Patient, Snapshot
from adaptive_opt.records import LayerReading, chains

# f(c x) = c f(x) for every c > 0: a factor on a layer passes through them to the next one
HOMOGENEOUS = (
    nn.ReLU, nn.LeakyReLU, nn.PReLU, nn.Identity, nn.Dropout, nn.Flatten, nn.Unflatten,
    nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d, nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d, nn.AdaptiveAvgPool2d,
)  # fmt: skip
LEAST, TOGETHER = 3, 1000.0  # layers of a chain, and their factor on the signal: the diagnosis' own thresholds
POWERS = (("momentum_buffer", -1), ("exp_avg", -1), ("exp_avg_sq", -2), ("square_avg", -2), ("sum", -2))


class Spectral:
    """Divides each measured layer's weight by its sigma_rms; the base's moments are rescaled along.

    In a chain of layers with nothing but ReLU-like activations between them, biases get the product of the factors so far,
    so that the chain's output is multiplied by one number and its argmax stays. Where that number needs not change, because
    the layers together keep the signal and only single ones are out of their band, each gets the chain's geometric mean
    instead of 1, and the function stays as it was. Not before the first step: a function that nobody has trained is none to
    be kept, and 1 is better (docs/evidence.md, "layers").

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
        state, before = patient.ctx.base.state, Snapshot.take(patient.trend.step, patient.ctx)
        changed: list[LayerReading] = []
        kept = True  # the function
        for chain in _chains(patient.reading.layers, named):
            passes = len(chain) > 1 and _homogeneous(patient.model, chain)
            same = passes and patient.trend.usual_loss is not None and _balanced(chain)
            goal = math.exp(sum(math.log(r.sigma_rms) for r in chain) / len(chain)) if same else 1.0
            through = 1.0  # what the signal has been multiplied by so far
            for r in chain:
                inside = 1 / self.band <= r.sigma_rms / goal <= self.band and not same
                factor = 1.0 if inside else min(max(goal / r.sigma_rms, 1 / self.limit), self.limit)
                through *= factor
                for p, f in ((named[_weight(r)], factor), (named.get(f"{r.name}.bias") if passes else None, through)):
                    if p is not None and f != 1.0:
                        p.mul_(f)
                        _rescale(state.get(p, {}), f)
                changed += [r] * (factor != 1.0)
            kept = kept and same
        if not changed:
            return None
        worst = max(changed, key=lambda r: r.times * r.distance)
        goal_words = "to their mean, which leaves the function as it was" if kept else "to 1"
        done = f"brought sigma_rms of {len(changed)} layers {goal_words} ({worst.name} had {worst.sigma_rms:.3g})"
        return Applied(done, moved=True, trial=self.trial, before=before)

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        pass


def _weight(layer: LayerReading) -> str:
    return layer.name if layer.kind == "recurrent" else f"{layer.name}.weight"


def _chains(layers: Sequence[LayerReading], named: Mapping[str, nn.Parameter]) -> Iterator[list[LayerReading]]:
    """What is repaired: recurrent matrices, and the chains in which a scale is passed on."""
    yield from ([r] for r in layers if r.kind == "recurrent" and r.sigma_rms > 0 and r.name in named)
    wrapped = ([r for r in chain if _weight(r) in named] for chain in chains(layers, LEAST))
    yield from (chain for chain in wrapped if chain)


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


def _rescale(state: dict[str, Any], factor: float) -> None:
    """A weight that is c times as large has a gradient 1/c as large: so have its averages."""
    for name, power in POWERS:
        if isinstance(state.get(name), torch.Tensor):
            state[name].mul_(factor**power)

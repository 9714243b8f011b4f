"""Bring a drifting layer back: the root-mean-square singular value of its Jacobian to 1, by a factor on its weights.

Not the largest singular value: with every spectral norm at 1 the average one is far below it and the signal of a deep
net vanishes (docs/evidence.md, "layers").
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from adaptive_opt.interventions.base import Applied, Patient, Snapshot


class Spectral:
    """Divides each measured layer's weight by its sigma_rms; the base's moments are rescaled along.

    band: layers whose sigma_rms is within [1 / band, band] of 1 are left alone. limit: the largest factor in one go.
    trial: steps after which the loss must be below its level before the repair.
    """

    name = "spectral"

    def __init__(self, band: float = 1.1, limit: float = 100.0, trial: int = 100):
        if band < 1 or limit <= 1 or trial < 1:
            raise ValueError(f"Spectral(band={band}, limit={limit}, trial={trial}): band of 1 or more, limit above 1")
        self.band, self.limit, self.trial = band, limit, trial

    @torch.no_grad()
    def apply(self, patient: Patient) -> Applied | None:
        """Called when the diagnosis says DRIFTING; None when no measured layer's weight is among the wrapped ones."""
        if patient.model is None or patient.reading is None:
            return None
        modules = dict(patient.model.named_modules())
        mine = {id(p) for p in patient.ctx.params}
        before = Snapshot.take(patient.trend.step, patient.ctx)
        changed = []
        for layer in patient.reading.layers:
            weight = getattr(modules.get(layer.name), "weight", None)
            if not isinstance(weight, nn.Parameter) or id(weight) not in mine or not layer.sigma_rms > 0:
                continue
            if 1 / self.band <= layer.sigma_rms <= self.band:
                continue
            factor = min(max(1 / layer.sigma_rms, 1 / self.limit), self.limit)
            weight.mul_(factor)
            self._rescale(patient.ctx.base.state.get(weight, {}), factor)
            changed.append((layer.name, layer.sigma_rms))
        if not changed:
            return None
        worst = max(changed, key=lambda c: max(c[1], 1 / c[1]))
        done = f"brought sigma_rms of {len(changed)} layers to 1 ({worst[0]} had {worst[1]:.3g})"
        return Applied(done, moved=True, trial=self.trial, before=before)

    @staticmethod
    def _rescale(state: dict[str, Any], factor: float) -> None:
        """A weight that is c times as large has a gradient 1/c as large: so have its averages."""
        for name, power in (
            ("momentum_buffer", -1),
            ("exp_avg", -1),
            ("exp_avg_sq", -2),
            ("square_avg", -2),
            ("sum", -2),
        ):
            if isinstance(state.get(name), torch.Tensor):
                state[name].mul_(factor**power)

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        pass

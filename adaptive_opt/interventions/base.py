"""What interventions share: the patient, what was done to it, and a snapshot to go back to."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from adaptive_opt.modes import StepContext
from adaptive_opt.records import Reading, Trend


@dataclass
class Patient:
    """What an intervention sees of the step it is called in."""

    ctx: StepContext
    trend: Trend
    reading: Reading | None
    bottom: Tensor | None = None  # (n,) direction of the most negative curvature
    model: nn.Module | None = None


@dataclass
class Applied:
    """What an intervention did."""

    done: str  # a sentence
    skip: bool = False  # this batch is not stepped on
    moved: bool = False  # the parameters jumped: this batch's gradients belong to where they were
    trial: int = 0  # steps until the verdict; 0: nothing to wait for
    before: Snapshot | None = None  # the way back


@dataclass
class Snapshot:
    """Parameters and the base optimizer's state, copied on their own device: one copy of each costs their size."""

    step: int
    params: list[Tensor]
    state: dict[int, dict[str, Any]] = field(default_factory=dict)  # index of the parameter -> its state

    @classmethod
    @torch.no_grad()
    def take(cls, step: int, base: Optimizer) -> Snapshot:
        params = all_params(base)
        state = {i: copied(base.state[p]) for i, p in enumerate(params) if p in base.state}
        return cls(step, [p.detach().clone() for p in params], state)

    @torch.no_grad()
    def restore(self, base: Optimizer) -> None:
        """Write the very same values back. State that came into being since is dropped, as it was not there."""
        for i, (p, kept) in enumerate(zip(all_params(base), self.params, strict=True)):
            p.copy_(kept)
            if i in self.state:
                base.state[p] = copied(self.state[i])
            else:
                base.state.pop(p, None)

    def state_dict(self) -> dict[str, Any]:
        return {"step": self.step, "params": list(self.params), "state": {i: dict(s) for i, s in self.state.items()}}

    @classmethod
    def from_state_dict(cls, d: dict[str, Any] | None) -> Snapshot | None:
        return None if d is None else cls(d["step"], list(d["params"]), dict(d["state"]))


def all_params(base: Optimizer) -> Sequence[Tensor]:
    return [p for group in base.param_groups for p in group["params"]]


def copied(state: dict[str, Any]) -> dict[str, Any]:
    return {k: v.detach().clone() if isinstance(v, Tensor) else v for k, v in state.items()}

"""torch.distributed.checkpoint keeps of an optimizer the state and the param groups: this keeps the wrapper's own part too."""

from __future__ import annotations

import io
from typing import Any

import torch
from torch import nn
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict

from adaptive_opt.optimizer import AdaptiveOptimizer


class OptimizerState:
    """The wrapper and its base as one Stateful, for whole and for sharded parameters, read by any number of processes.

        parts = {"model": model, "optimizer": OptimizerState(model, optimizer)}
        dcp.save(parts, checkpoint_id=path)
        dcp.load(parts, checkpoint_id=path)  # where model and optimizer were made anew, on one process or on many

    All processes must take part, as in dcp itself. What the wrapper remembers (the latest reading, start vectors, snapshots) is
    written whole, once.
    """

    def __init__(self, model: nn.Module, optimizer: AdaptiveOptimizer):
        self.model, self.optimizer = model, optimizer

    def state_dict(self) -> dict[str, Any]:
        box = io.BytesIO()
        torch.save(self.optimizer.control.state_dict(), box)
        # bytes: dcp fills in what it finds in the optimizer made anew, which has no snapshot and no start vector yet
        return {"base": get_optimizer_state_dict(self.model, self.optimizer), "adaptive": box.getvalue()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        set_optimizer_state_dict(self.model, self.optimizer, state_dict["base"])
        self.optimizer.control.load_state_dict(torch.load(io.BytesIO(state_dict["adaptive"]), weights_only=True))

"""The user's validation loss: when to ask for it, what it has been, and what that costs."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn

from adaptive_opt.capture import tensors_in
from adaptive_opt.clock import Clock
from adaptive_opt.objective import without_trace
from adaptive_opt.probe import FORWARD
from adaptive_opt.records import Look

SHARE = 0.03  # of the training work; with the probe's 5 % "a few percent" (docs/evidence.md, "validation")
LEVEL = 10  # steps whose median is the training loss of a look: the fewest between two looks
MOST = 100  # looks; then every second one is forgotten and they come half as often: a long run needs no more


class Validation:
    """Asks now and then, within a share of the training work, and keeps the series.

    A call is counted as a forward pass of the samples that it puts through the model, and as its measured time where that is
    more. `reproducible`: its count alone, so that the same run asks in the same steps.
    """

    def __init__(self, reproducible: bool = False) -> None:
        self.reproducible = reproducible
        self.looks: list[Look] = []
        self.counted = 0.0  # gradient-equivalents of the latest call
        self.cost = 0.0  # the same, or its measured time where that is more
        self.halved = 0  # times that the looks were thinned
        self.calls = 0
        self.clock = Clock()

    @property
    def spacing(self) -> int:
        """Steps from one look to the next."""
        return max(LEVEL, math.ceil(self.cost / SHARE)) * 2**self.halved

    def due(self, step: int) -> bool:
        return not self.looks or step - self.looks[-1].step >= self.spacing

    def ask(
        self, validate: Callable[[], float], params: Sequence[Tensor], model: nn.Module | None, samples: float | None
    ) -> tuple[float, float]:
        """(validation loss, gradient-equivalents as counted). Leaves no trace; raises what `validate` raises.

        samples: of a training batch; None where nobody knows.
        """
        modules = [] if model is None else list(model.modules())
        with self.clock.measuring(params[0].device), without_trace(params, modules), _rows(model) as rows:
            value = float(validate())
        self.calls += 1
        return value, FORWARD * sum(rows) / samples if samples and rows else 1.0

    def remember(self, step: int, value: float, counted: float, losses: Sequence[float]) -> None:
        """What a call gave and cost, and the training losses so far."""
        self.counted, self.cost = counted, max(counted, self.cost)
        self.looks.append(Look(step, value, median(losses[-LEVEL:]) if losses else None))
        if len(self.looks) > MOST:
            self.looks, self.halved = self.looks[::2], self.halved + 1

    def reprice(self, measured: float) -> None:
        self.cost = max(self.counted, measured)

    def measured(self, step: int) -> float:
        """Steps of the run that a call has taken in measured time, rounded up to a power of two: noise seldom moves it."""
        if self.reproducible or not step or not self.calls:
            return 0.0
        training = self.clock.training
        share = self.clock.probing / self.calls * step / training if training > 0 else 0.0
        return 2.0 ** math.ceil(math.log2(share)) if share > 0 else 0.0

    def since(self, step: int) -> list[Look]:
        return [look for look in self.looks if look.step > step]

    def forget(self, step: int) -> None:
        """The parameters are those of this step again: what was seen later is of others."""
        self.looks = [look for look in self.looks if look.step <= step]

    def state_dict(self) -> dict[str, Any]:
        return {
            "looks": [asdict(look) for look in self.looks],
            "counted": self.counted,
            "cost": self.cost,
            "halved": self.halved,
            "calls": self.calls,
            "clock": self.clock.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.looks = [Look(**look) for look in state["looks"]]
        for name in ("counted", "cost", "halved", "calls"):
            setattr(self, name, state[name])
        self.clock.load_state_dict(state["clock"])


@contextmanager
def _rows(model: nn.Module | None) -> Iterator[list[int]]:
    """The first dimension of the first tensor of every call of the model inside."""
    rows: list[int] = []

    def count(_module: nn.Module, args: Any, kwargs: Any) -> None:
        first = next(tensors_in((args, kwargs)), None)
        rows.append(first.shape[0] if isinstance(first, torch.Tensor) and first.dim() else 1)

    if model is None:
        yield rows
        return
    with model.register_forward_pre_hook(count, with_kwargs=True):
        yield rows

"""The mode that changes nothing, and what every mode is."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Protocol

from torch import Tensor, nn
from torch.optim import Optimizer

from adaptive_opt.objective import Objective
from adaptive_opt.parallel import ALONE, Team


@dataclass(frozen=True)
class Moved:
    """What a mode has changed at `enter`."""

    done: str
    before: float  # loss of the batch where the parameters were
    after: float  # and where they are now


@dataclass
class StepContext:
    """What a mode or an intervention may use in one step."""

    base: Optimizer
    params: Sequence[Tensor]  # dense, real, with a gradient in this step, in the order of the param groups
    indices: Sequence[int]  # their positions among all wrapped parameters, which survive a checkpoint
    objective: Objective | None  # None: no trusted replay
    mode: Mode = field(default_factory=lambda: BaseStep())  # the one that is on
    cost: float = 0.0  # gradient-equivalents that were spent on replays, added up by whoever spends them
    failure: Exception | None = None  # a replay that raised; whoever caught it went on without
    costs: tuple[float, float] | None = None  # of a cheap and of a full reading, where several processes agreed on them
    moved: Moved | None = None  # the mode that was entered has changed the parameters: the gradients are of where they were
    short: bool = False  # a process has no batch left (Join): nothing that needs all of them can be done
    team: Team = ALONE  # the processes that take this step together
    given: Sequence[Tensor] = ()  # every gradient of this step, sparse and complex ones too

    @property
    def grads(self) -> list[Tensor]:
        return [p.grad for p in self.params if p.grad is not None]

    def group_of(self, p: Tensor) -> dict[str, Any]:
        return self._groups[id(p)]

    @cached_property
    def _groups(self) -> dict[int, dict[str, Any]]:
        return {id(p): group for group in self.base.param_groups for p in group["params"]}


def all_params(base: Optimizer) -> list[Tensor]:
    """Every wrapped parameter, in the order of the groups: positions in it are keys that survive a checkpoint."""
    return [p for group in base.param_groups for p in group["params"]]


class Mode(Protocol):
    """Takes the step. Hyperparameters belong to the constructor, the problem to the context.

    A mode may also have `stronger()`, the next larger dose in words, or None (sam). One that changes the parameters at `enter`
    (`ctx.moved`) has `helps(ctx)`, which says before whether that lowers the loss of this batch, and changes nothing: no trial
    begins where it does not. Both replay, so they wait for a trusted batch. Such a mode stays on after a return into it; and
    its `holds(ctx)` is False where a later batch does not show what it was entered for (standardised).
    """

    name: str
    needs_replay: bool
    steps_as_base: bool  # the base's own rule in the parameters' own basis: what a reading says of the coming step holds

    def refuses(self, base: Optimizer) -> str | None: ...  # why it cannot work with this base
    def listen(self, model: nn.Module | None, base: Optimizer) -> None: ...  # the mode is on: hear this model's layers
    def enter(self, ctx: StepContext) -> None: ...
    def step(self, ctx: StepContext) -> None: ...
    def exit(self, ctx: StepContext) -> None: ...
    def state_dict(self) -> dict[str, Any]: ...
    def load_state_dict(self, state: dict[str, Any]) -> None: ...


class BaseStep:
    """The wrapped optimizer as it is."""

    name = "base"
    needs_replay = False
    steps_as_base = True

    def refuses(self, base: Optimizer) -> str | None:
        return None

    def listen(self, model: nn.Module | None, base: Optimizer) -> None:
        pass

    def enter(self, ctx: StepContext) -> None:
        pass

    def step(self, ctx: StepContext) -> None:
        ctx.base.step()

    def exit(self, ctx: StepContext) -> None:
        pass

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        pass


@contextmanager
def overridden(groups: Sequence[dict[str, Any]], **values: Any) -> Iterator[None]:
    """Param-group entries at other values inside, the user's very objects outside."""
    kept = [{k: g[k] for k in values if k in g} for g in groups]
    try:
        for g, old in zip(groups, kept, strict=True):
            g.update({k: values[k](old[k]) if callable(values[k]) else values[k] for k in old})
        yield
    finally:
        for g, old in zip(groups, kept, strict=True):
            g.update(old)

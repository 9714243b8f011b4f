"""What interventions share: the patient, what was done to it, and a snapshot to go back to."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from adaptive_opt.modes import StepContext, all_params
from adaptive_opt.records import Reading, Trend
from adaptive_opt.sharded import is_sharded, placed


@dataclass
class Patient:
    """What an intervention sees of the step it is called in."""

    ctx: StepContext
    trend: Trend
    reading: Reading | None
    recent: Reading | None = None  # the one before, if it is fresh
    bottom: Tensor | None = None  # (n,) direction of the most negative curvature
    below: Tensor | None = None  # (n,) of all negative curvatures together
    model: nn.Module | None = None


@dataclass
class Applied:
    """What an intervention did, or asks the controller to do."""

    done: str  # a sentence
    skip: bool = False  # this batch is not stepped on
    cleanse: int | None = None  # what the batch of this step did to the running statistics is undone; the step is taken
    moved: bool = False  # the parameters jumped: this batch's gradients belong to where they were
    back_to: Snapshot | None = None  # restore this
    forget: bool = False  # what the losses have been says nothing any more,
    but: int | None = None  # but for those up to this step
    cliffs: bool = False  # rollback holds the gradient's norm from here on
    last: bool = False  # nothing else is done in this step
    trial: int = 0  # steps until the verdict; 0: nothing to wait for
    before: Snapshot | None = None  # the way back


@dataclass
class Snapshot:
    """Parameters, the base optimizer's state and the mode's, copied: one copy costs their size (`bytes`).

    It lies on their own device, or on the one that is given (host memory, say), and comes back from there by itself.
    """

    step: int
    params: list[Tensor]
    state: dict[int, dict[str, Any]] = field(default_factory=dict)  # index of the parameter -> its state
    mode: str = "base"  # whose basis the state is in
    mode_state: dict[str, Any] = field(default_factory=dict)
    usual_norm: float | None = None  # the gradient's then, if it was known

    @classmethod
    @torch.no_grad()
    def take(cls, step: int, ctx: StepContext, usual_norm: float | None = None, device: torch.device | None = None) -> Snapshot:
        params = all_params(ctx.base)
        device = None if any(map(is_sharded, params)) else device  # shards stay with their mesh
        state = {i: copied(ctx.base.state[p], device) for i, p in enumerate(params) if p in ctx.base.state}
        values, mode = [copied(p, device) for p in params], ctx.mode
        return cls(step, values, state, mode.name, copied(mode.state_dict(), device), usual_norm)

    @torch.no_grad()
    def restore(self, base: Optimizer) -> None:
        """Write the very same values back. State that came into being since is dropped, as it was not there.

        Parameters that were added since stay as they are. The mode's part is the caller's to load.
        """
        for i, (p, kept) in enumerate(zip(all_params(base), self.params, strict=False)):
            p.copy_(placed(kept, p))
            if i in self.state:
                now = base.state[p]
                base.state[p] = {k: _back(v, p, now.get(k)) for k, v in self.state[i].items()}
            else:
                base.state.pop(p, None)

    def values(self, base: Optimizer) -> dict[int, Tensor]:
        """The parameters' values then, by id(p)."""
        return {id(p): kept.to(p.device) for p, kept in zip(all_params(base), self.params, strict=False)}

    @property
    def bytes(self) -> int:
        """What it takes."""
        return sum(t.numel() * t.element_size() for t in _tensors([self.params, self.state, self.mode_state]))

    def state_dict(self) -> dict[str, Any]:
        return dict(vars(self))

    @classmethod
    def from_state_dict(cls, d: dict[str, Any] | None, device: torch.device | None = None) -> Snapshot | None:
        return None if d is None else cls(**(d if device is None else copied(d, device)))


def _back(kept: Any, p: Tensor, now: Any) -> Any:
    """A piece of kept state where its like is now, or with the parameter; a step counter stays where it was kept."""
    if not isinstance(kept, Tensor):
        return copied(kept)
    like = now if isinstance(now, Tensor) else p if kept.dim() else kept
    return placed(kept.detach().to(like.device, copy=True), p)


def _tensors(tree: Any) -> Iterator[Tensor]:
    if isinstance(tree, Tensor):
        yield tree
    elif isinstance(tree, Mapping):
        for value in tree.values():
            yield from _tensors(value)
    elif isinstance(tree, (list, tuple)):
        for value in tree:
            yield from _tensors(value)


def copied(tree: Any, device: torch.device | None = None) -> Any:
    """A copy of nested plain containers with every tensor cloned, and put on `device` if that is given (not RNG states)."""
    if isinstance(tree, Tensor):
        clone = tree.detach().clone()
        return clone if device is None or tree.dtype == torch.uint8 else clone.to(device)
    if isinstance(tree, Mapping):
        return {k: copied(v, device) for k, v in tree.items()}
    return type(tree)(copied(v, device) for v in tree) if isinstance(tree, (list, tuple)) else tree

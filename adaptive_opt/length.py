"""The length of a mode's steps, from what the next gradient says of the last one."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from statistics import median
from typing import Any

import torch
from torch import Tensor

from adaptive_opt.curvature import flatten
from adaptive_opt.curvature.vectors import dot, norm, unflatten, whole
from adaptive_opt.sharded import placed

AVERAGED = 0.9  # what both slopes keep of their average at each step
BOTTOM = 0.5  # overshoot of a step that ends at the bottom of its parabola
SHORT = 0.35  # overshoot below which a step longer than the user's is worth its noise
GROWTH, SHRINK = 1.05, 0.5  # of the scale, a step
FARTHEST = 10.0  # times the user's learning rate (docs/evidence.md, "length of kfac's steps")
LEAST = 0.02  # overshoot: a slope that has hardly changed yet tells no more than that
RECENT = 10  # steps: "lately"


class StepLength:
    """Scales the learning rate in a mode that it was not chosen for.

    Along the step d just taken the loss has the slope g'd < 0 at its beginning, with g the gradient that it was taken on, and
    h'd at its end, with h the next gradient. The parabola through both has overshoot (1 + h'd / |g'd|) / 2, which is 1/2
    where d ends at the bottom. h is of another batch: what d owes to the noise of its own does not count as progress, and
    where the gradient is mostly noise the overshoot is 1/2 by itself. So a step grows beyond the user's only while it is
    clearly short of the bottom, comes back to the user's where it is not, and is cut where it goes beyond. The sign of h'd is
    the hypergradient (Baydin et al., 2018); both slopes are averaged over some ten steps, as shares of |d| |g|. The overshoot
    of a parabola is proportional to the step: what is cut once is taken off the average, or old steps would cut again.

    The averages come too late where the loss falls off a plateau, into a valley it has not seen: the gradient grows from
    step to step, and the steps with it. So while it is larger than lately, a step beyond the user's is held to a little more
    than the longest of the last ones.

    It needs no replay: a copy of the parameters during the step and one of the step between two steps.
    """

    def __init__(self) -> None:
        self.scale = 1.0
        self.end = self.start = 0.0  # averages of h'd and |g'd|, each over |d| |g|
        self.indices: tuple[int, ...] = ()  # positions of the parameters that moved in the last step
        self.moved: Tensor | None = None  # (n,): the last step; None: nothing to judge
        self.slope: Tensor | None = None  # (4,): g'd, |g|, |d| and the share it was held to, still on the device
        self.sizes: list[float] = []  # |d| of the last steps
        self.norms: list[float] = []  # |g| that they were taken on

    @contextmanager
    def watching(self, params: Sequence[Tensor], indices: Sequence[int]) -> Iterator[None]:
        """Judges the last step by the gradients at its end; the coming one is taken inside, at `scale`.

        Where that raises nothing was judged.
        """
        g, before, as_it_was = _gradients(params), flatten(params), self.state_dict()
        size = norm(g)
        grown = self._judge(g, size, tuple(indices))
        try:
            yield
        except BaseException:
            vars(self).update(as_it_was)
            raise
        moved = flatten(params).sub_(before)
        length = norm(moved)
        held = torch.ones_like(length)
        if grown and self.scale > 1:
            held = (GROWTH * max(self.sizes) / length).clamp(1 / self.scale, 1)
            _hold(params, before, 1 - held)
            moved, length = moved.mul_(held), length * held
        self.indices, self.moved = tuple(indices), moved
        self.slope = torch.stack([dot(g, moved), size, length, held])

    def _judge(self, h: Tensor, norm_now: Tensor, indices: tuple[int, ...]) -> bool:
        """How far the last step went, and how long the coming one may be; whether the gradient is larger than lately."""
        if self.moved is None or self.slope is None or self.indices != indices:
            return False
        *told, now = torch.cat([self.slope, torch.stack([dot(h, self.moved), norm_now])]).tolist()
        start, before, length, held, end = told
        self.forget()
        size = before * length
        if math.isfinite(size):
            self.scale *= held
            self.sizes, self.norms = [*self.sizes, length][-RECENT:], [*self.norms, before][-RECENT:]
        if size > 0 and start < 0 and math.isfinite(start * end / size):  # else its length says nothing: it did not descend
            self._follow(start, end, size)
        return bool(self.norms) and now > median(self.norms)

    def _follow(self, start: float, end: float, size: float) -> None:
        """The scale, after a step with these slopes at its two ends, on a loss as steep as `size` at most."""
        self.end = AVERAGED * self.end + (1 - AVERAGED) * end / size
        self.start = AVERAGED * self.start - (1 - AVERAGED) * start / size
        overshoot = max((1 + self.end / self.start) / 2, LEAST)
        if overshoot > BOTTOM:
            cut = max(BOTTOM / overshoot, SHRINK)
            self.scale *= cut
            self.end = (2 * cut * overshoot - 1) * self.start
        elif self.scale < 1:
            self.scale = min(self.scale * GROWTH, 1.0)
        elif overshoot < SHORT:
            self.scale = min(self.scale * GROWTH, FARTHEST)
        else:
            self.scale = max(self.scale / GROWTH, 1.0)

    def forget(self) -> None:
        """The parameters are no longer where the last step led."""
        self.moved, self.slope, self.indices = None, None, ()

    def state_dict(self) -> dict[str, Any]:
        return dict(vars(self))

    @classmethod
    def from_state_dict(cls, state: dict[str, Any] | None) -> StepLength | None:
        if state is None:
            return None
        length = cls()
        if "sizes" not in state:  # of an older version, whose last step says less
            state = {**state, "moved": None}
        vars(length).update({**state, "indices": tuple(state["indices"])})
        return length


@torch.no_grad()
def _hold(params: Sequence[Tensor], before: Tensor, share: Tensor) -> None:
    """This share of the way back to where they were; none leaves them as they are, bit for bit."""
    for p, old in zip(params, unflatten(before, [whole(p) for p in params]), strict=True):
        p.lerp_(placed(old, p), share.to(p.dtype))


def _gradients(params: Sequence[Tensor]) -> Tensor:
    return flatten([p.grad for p in params if p.grad is not None])

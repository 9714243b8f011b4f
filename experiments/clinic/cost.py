"""What a run has cost so far, in gradient-equivalents: one is a forward and backward pass of a batch."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from statistics import median
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

PRICED = 20  # steps from one look at what a gradient costs without the arm's hooks to the next


class Meter:
    """Gradients that the loop took, and what the arm did beside them and beside the base's own step.

    Passes inside of the arm's steps (Hessian products, replays, forward passes) are counted by the arm itself, and their time
    is left out. All else that its steps took, and what its hooks add to the loop's own passes, is timed, in process time, and
    divided by the time of one gradient, taken now and then on a copy of the model that nobody listens to.
    """

    def __init__(self, base: Optimizer, model: nn.Module, bare: bool = False):
        self.bare = bare  # nothing is charged: the others are compared with it
        self.gradients = 0
        self.passes = 0.0  # gradient-equivalents, as counted by the arm
        self.step_seconds = 0.0  # of the arm's steps
        self.base_seconds = 0.0  # of the base's, inside of them
        self.pass_seconds = 0.0  # of passes, inside of them
        self._taken: list[float] = []  # seconds of the loop's gradients
        self._prices: list[float] = []  # and of those on the copy
        self._began, self._inside = 0.0, False
        step = base.step

        def timed(*args: Any, **kwargs: Any) -> Any:
            began = time.process_time()
            try:
                return step(*args, **kwargs)
            finally:
                self.base_seconds += (time.process_time() - began) * self._inside

        base.step = timed  # by step hooks, torch's own preparations for a step would be charged to the arm
        model.register_forward_pre_hook(self._enter)
        model.register_forward_hook(lambda *_: self._leave("pass_seconds"))

    def _enter(self, *_: Any) -> None:
        self._began = time.process_time()

    def _leave(self, account: str) -> None:
        if self._inside:
            setattr(self, account, getattr(self, account) + time.process_time() - self._began)

    @contextmanager
    def gradient(self) -> Iterator[None]:
        began = time.process_time()
        yield
        self._taken.append(time.process_time() - began)
        self.gradients += 1

    def price(self, gradient: Callable[[], Any]) -> None:
        """Look at what a gradient costs where nobody listens, if it is time to."""
        if not self.bare and self.gradients % PRICED == 0:
            with torch.random.fork_rng(devices=[]):  # the loop's own dropout must not notice
                began = time.process_time()
                gradient()
                self._prices.append(time.process_time() - began)

    @contextmanager
    def step(self) -> Iterator[None]:
        grad = torch.autograd.grad

        def timed(*args: Any, **kwargs: Any) -> Any:
            began = time.process_time()
            try:
                return grad(*args, **kwargs)
            finally:
                self.pass_seconds += time.process_time() - began

        self._inside, torch.autograd.grad = True, timed
        began = time.process_time()
        try:
            yield
        finally:
            self.step_seconds += time.process_time() - began
            self._inside, torch.autograd.grad = False, grad

    @property
    def one(self) -> float:
        """Seconds of one gradient."""
        return median(self._prices or self._taken)

    @property
    def hooks(self) -> float:
        """Seconds that the arm's hooks have added to the loop's passes."""
        return max(0.0, median(self._taken) - self.one) * self.gradients

    @property
    def other(self) -> float:
        """Work of the arm that is no pass, in gradients."""
        if self.bare or not self._taken:
            return 0.0
        return max(0.0, self.step_seconds - self.base_seconds - self.pass_seconds + self.hooks) / self.one

    @property
    def timed(self) -> float:
        """All work of the arm by its time, passes too, in gradients: for comparison."""
        if self.bare or not self._taken:
            return 0.0
        return max(0.0, self.step_seconds - self.base_seconds + self.hooks) / self.one

    @property
    def spent(self) -> float:
        return self.gradients + self.passes + self.other

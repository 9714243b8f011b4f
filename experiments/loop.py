"""The training loop: the same lines for the bare and for the wrapped optimizer."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from statistics import fmean
from typing import Any

from torch.optim import Optimizer
from tqdm import tqdm

from adaptive_opt import AdaptiveOptimizer

from .faults import Faults
from .launch import ALONE, Ranks
from .tasks.base import Task, loss_of


@dataclass
class Outcome:
    """How a run ended."""

    metrics: dict[str, float]
    losses: list[float] = field(repr=False, default_factory=list)  # training loss of every step
    seconds: float = 0.0  # of training, without evaluation
    steps: int = 0
    overhead: float = 0.0  # probing, in gradient-equivalents a step
    treatment: float = 0.0  # replays of modes and treatments, likewise
    treatments: list[str] = field(default_factory=list)  # the log's sentences
    outcomes: list[str] = field(default_factory=list)  # of the treatments that have one: "kept", "reverted", "done"
    gradients: list[float] = field(repr=False, default_factory=list)  # gradient-equivalents spent up to each step, all told
    clock: list[float] = field(repr=False, default_factory=list)  # seconds up to each step

    @property
    def train_loss(self) -> float:
        """Mean training loss of the last 20 steps; batches of NaN are left out, and half of them or more make it NaN."""
        last = self.losses[-20:]
        finite = [loss for loss in last if math.isfinite(loss)]
        return fmean(finite) if 2 * len(finite) > len(last) else math.nan


def train(
    task: Task,
    optimizer: Optimizer,
    *,
    steps: int | None = None,
    faults: Faults | None = None,
    schedule: Any = None,
    title: str = "",
    until: Callable[[float], bool] | None = None,
    ranks: Ranks = ALONE,
) -> Outcome:
    """Train for `steps` (the task's own by default), or until `until(loss)` holds; of several processes this one's share."""
    total = task.steps if steps is None else steps
    losses, log, outcomes, spent, clock = [], [], [], [], []
    began = time.perf_counter()
    for step in tqdm(range(total), desc=title, leave=False, disable=not sys.stderr.isatty()):
        x, y = task.batch(step)
        if faults is not None:
            x = faults(x)
        x, y = ranks.share(x), ranks.share(y)
        optimizer.zero_grad()
        loss = loss_of(task, x, y)
        loss.backward()
        optimizer.step()
        if schedule is not None:
            schedule.step()
        losses.append(ranks.mean(loss))
        extra = 0.0
        if isinstance(optimizer, AdaptiveOptimizer) and (report := optimizer.report) is not None:
            log += [event.sentence() for event in report.events]
            outcomes += [event.outcome for event in report.events if event.outcome != "pending"]
            extra = report.probe_cost + report.treatment_cost
        spent.append(len(losses) + extra)
        clock.append(time.perf_counter() - began)
        if until is not None and until(losses[-1]):
            break
    seconds = time.perf_counter() - began
    out = Outcome(
        task.evaluate(), losses, seconds, len(losses), treatments=log, outcomes=outcomes, gradients=spent, clock=clock
    )
    if isinstance(optimizer, AdaptiveOptimizer) and optimizer.report is not None:
        out.overhead = optimizer.report.probe_cost / len(losses)
        out.treatment = optimizer.report.treatment_cost / len(losses)
    return out

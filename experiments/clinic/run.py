"""One run: a workload, an arm, a base, a seed; a row out."""

from __future__ import annotations

import copy
import math
import time
import warnings
from statistics import fmean
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils import clip_grad_norm_, get_total_norm

from adaptive_opt import AdaptiveOptimizer

from ..faults import Faults
from ..tasks.base import Task, loss_of
from .arms import ARMS, base_of
from .cost import Meter
from .events import Diary
from .records import Human, Job, Row, Workload
from .workloads import WORKLOADS

FLOOR = -6.0  # of "log10 X": a millionth of what chance gives counts as solved
STOPS = 20  # looks at the validation loss in a run that stops early
NOBODY = Human("")


def run(job: Job, steps: int | None = None, share: float = 1.0) -> Row:
    """The row of one run. Raises what the run raises.

    steps: gradient-equivalents that it may spend (default: the workload's own times `share`).
    """
    w, arm = WORKLOADS[job.workload], ARMS[job.arm]
    human = w.human if job.arm == "human" and w.human is not None else NOBODY
    task = (human.task or w.task)(job.seed)
    name, rate = human.base or (job.base, w.rates[job.base] * (w.factor if human.factor is None else human.factor))
    base = base_of(name, task.model, rate)
    twin = copy.deepcopy(task)
    meter = Meter(base, task.model, arm.bare)
    validate = getattr(task, "validation_loss", None) if w.validate else None
    optimizer = arm.make(base, task, validate, job.seed)
    torch.manual_seed(1000 + job.seed)  # batches and dropout; no arm draws from this generator
    budget = round(task.steps * share) if steps is None else steps
    began = time.process_time()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Full backward hook is firing")  # StabilityGuard's on the first layer
        losses, diary = _train(w, task, twin, optimizer, human, meter, job, budget, arm.treats)
    last = [x for x in losses[-20:] if math.isfinite(x)]
    train_loss = fmean(last) if 2 * len(last) > len(losses[-20:]) and not _lost(task) else math.nan
    value = measured(w, {**task.evaluate(), "train_loss": train_loss})
    treated = diary.summary()
    return {
        "workload": w.name,
        "group": w.group,
        "arm": job.arm,
        "base": job.base,
        "seed": job.seed,
        "budget": job.budget,
        "metric": w.metric,
        "higher": w.higher,
        "chance": 0.0 if w.metric.startswith("log10") else w.chance,
        "value": value,
        "train_loss": train_loss if math.isfinite(train_loss) else None,
        "steps": len(losses),
        "gradient_equivalents": round(meter.spent, 2),
        "passes": round(meter.passes, 2),
        "other": round(meter.other, 2),
        "timed": round(meter.timed, 2),
        "seconds": round(time.process_time() - began, 3),
        "ms_base": round(1e3 * meter.base_seconds / max(meter.gradients, 1), 3),
        "ms_gradient": round(1e3 * meter.one, 3),
        "interventions": treated.interventions,
        "reverted": treated.reverted,
        "gainless": treated.gainless,
        "skipped": treated.skipped,
        "void": treated.void,
        "events": treated.sentences,
    }


def _train(
    w: Workload, task: Task, twin: Task, optimizer: Any, human: Human, meter: Meter, job: Job, budget: int, treats: bool
) -> tuple[list[float], Diary]:
    """Cosine schedule over the budget: gradient-equivalents, or steps."""
    rates = [float(group["lr"]) for group in optimizer.param_groups]
    faults = Faults(w.faults[0], w.faults[1], seed=job.seed) if w.faults is not None else None
    losses: list[float] = []
    diary, best = Diary(), Best(task, budget) if human.best else None
    while (share := (len(losses) if job.budget == "steps" else meter.spent) / budget) < 1:
        for group, rate in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = rate * 0.5 * (1 + math.cos(math.pi * share))
        x, y = task.batch(len(losses))
        if faults is not None:
            x = faults(x)
        optimizer.zero_grad()
        meter.price(lambda: loss_of(twin, x, y).backward())
        with meter.gradient():
            loss = loss_of(task, x, y)
            loss.backward()
        with meter.step():
            if _cared_for(task, human):
                optimizer.step()
        losses.append(float(loss.detach()))
        if isinstance(optimizer, AdaptiveOptimizer) and optimizer.report is not None:
            meter.passes = optimizer.report.probe_cost + optimizer.report.treatment_cost
            diary.write(optimizer.report.events)
        if best is not None:
            best.look(len(losses))
        if not treats and not math.isfinite(losses[-1]) and _lost(task):
            break  # nobody brings these parameters back
    if best is not None:
        best.restore()
    return losses, diary


def _cared_for(task: Task, human: Human) -> bool:
    """Clips as the human does; False where the step is to be skipped."""
    if human.clip is None and not human.skip:
        return True
    grads = [p.grad for p in task.model.parameters() if p.grad is not None]
    if human.skip and not math.isfinite(float(get_total_norm(grads))):
        return False
    if human.clip is not None:
        clip_grad_norm_(task.model.parameters(), human.clip)
    return True


def _lost(task: Task) -> bool:
    return not all(bool(torch.isfinite(p).all()) for p in task.model.parameters())


class Best:
    """Early stopping: the parameters of the lowest validation loss so far."""

    def __init__(self, task: Any, steps: int):
        self.task, self.every = task, max(1, steps // STOPS)
        self.loss = math.inf
        self.kept: dict[str, Tensor] = {}

    def look(self, step: int) -> None:
        if step % self.every == 0 and (loss := self.task.validation_loss()) < self.loss:
            self.loss, self.kept = loss, {k: v.clone() for k, v in self.task.model.state_dict().items()}

    def restore(self) -> None:
        if self.kept:
            self.task.model.load_state_dict(self.kept)


def measured(w: Workload, metrics: dict[str, float]) -> float | None:
    """The workload's metric; None where it is not a number."""
    value = metrics[w.metric.removeprefix("log10 ")]
    if not math.isfinite(value):
        return None
    if w.metric.startswith("log10 "):
        return max(FLOOR, math.log10(max(value / w.chance, 1e-30)))
    return value

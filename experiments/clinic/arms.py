"""The arms: who takes the steps."""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import nn
from torch.optim import SGD, AdamW, Optimizer

from adaptive_opt import AdaptiveOptimizer, ConstantPolicy, LanczosProbe
from adaptive_opt.interventions import INTERVENTIONS
from adaptive_opt.policies import RandomPolicy, TrialPolicy

from ..tasks.base import Task, source_of

EVERY = tuple(INTERVENTIONS)


def base_of(name: str, model: nn.Module, lr: float) -> Optimizer:
    """AdamW with torch's defaults, or heavy ball."""
    return AdamW(model.parameters(), lr=lr) if name == "AdamW" else SGD(model.parameters(), lr=lr, momentum=0.9)


@dataclass(frozen=True)
class Arm:
    """make: (base optimizer, task, validation loss or None, seed) -> what is stepped."""

    make: Callable[[Optimizer, Task, Callable[[], float] | None, int], Any]
    bare: bool = False  # the base takes every step and nothing is charged
    treats: bool = False  # parameters that are not finite may come back


def ours(policy: Callable[[int], Any] | None = None, measures: bool = True) -> Callable[..., AdaptiveOptimizer]:
    """The wrapper with its defaults, or with another policy of a seed; one that never decides anything measures nothing."""

    def make(base: Optimizer, task: Task, validate: Callable[[], float] | None, seed: int) -> AdaptiveOptimizer:
        source = source_of(task)
        if policy is not None:
            source["policy"] = policy(seed)
        if not measures:
            source["probe"] = LanczosProbe(overhead=0)
        return AdaptiveOptimizer(base, task.model, validate=validate, **source)

    return make


def zclip() -> Any:
    """The class; without its callback, for which the package would load the whole of Lightning."""
    there = "lightning" in sys.modules
    sys.modules.setdefault("lightning", None)  # pyright: ignore[reportArgumentType]
    try:
        from zclip import ZClip
    finally:
        if not there:
            del sys.modules["lightning"]
    return ZClip


class Clipped:
    """ZClip (Kumar et al., 2025) between backward and step, as its README has it."""

    def __init__(self, base: Optimizer, model: nn.Module):
        self.base, self.model = base, model
        self.clip = zclip()(alpha=0.97, z_thresh=2.5)
        self.param_groups = base.param_groups

    def zero_grad(self) -> None:
        self.base.zero_grad()

    def step(self) -> None:
        self.clip.step(self.model)
        self.base.step()


def guarded(base: Optimizer, task: Task, validate: Any, seed: int) -> Any:
    """StabilityGuard with its defaults; what it prints and its files are switched off, they would cost it time."""
    from stabilityguard import GuardedOptimizer

    with tempfile.TemporaryDirectory() as folder:
        optimizer = GuardedOptimizer(base, task.model, log_dir=folder, verbose=False)
    log = optimizer._spike_logger
    log.enable_stdout = log.enable_file = False
    return optimizer


def constant(mode: str, treated: bool) -> Arm:
    """One mode from the first step to the last, with or without the interventions by the rules."""
    policy = ConstantPolicy(mode, EVERY if treated else ())
    return Arm(ours(lambda seed: policy, measures=treated), treats=treated)


ARMS: dict[str, Arm] = {
    "bare": Arm(lambda base, task, validate, seed: base, bare=True),
    "human": Arm(lambda base, task, validate, seed: base, bare=True),
    "rules": Arm(ours(), treats=True),
    **{mode + sign: constant(mode, treated=sign == "+") for mode in ("sgd", "sam", "kfac") for sign in ("", "+")},
    "random": Arm(ours(lambda seed: RandomPolicy(seed=seed, interventions=EVERY)), treats=True),
    "trial": Arm(ours(lambda seed: TrialPolicy(interventions=EVERY)), treats=True),
    "StabilityGuard": Arm(guarded),
    "ZClip": Arm(lambda base, task, validate, seed: Clipped(base, task.model)),
}

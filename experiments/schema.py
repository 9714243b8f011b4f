"""The config tree's dataclasses: made from the constructors themselves, so that Hydra checks every name and every type.

`schema(cls)` has a field for each argument of `cls(...)` that a YAML file can hold, with its type and default, and `_target_`.
A file of the group `task` opens with `/schema/task/NAME@_here_`; a name or a type that the constructor does not know is then
Hydra's own error, whether it stands in a file or on the command line.
"""

from __future__ import annotations

import inspect
import types
import typing
from collections.abc import Callable, Iterable, Sequence
from dataclasses import MISSING, dataclass, field, make_dataclass
from enum import Enum
from typing import Any

import torch
from hydra.core.config_store import ConfigStore

from adaptive_opt import ConstantPolicy, LanczosProbe, RandomPolicy, RoundRobinPolicy, RulePolicy, TrialPolicy
from adaptive_opt.interventions import INTERVENTIONS
from adaptive_opt.modes import MODES

from .tasks.canyon import Canyon
from .tasks.digits import Digits
from .tasks.mnist import MNIST
from .tasks.saddle import Saddle

TASKS: dict[str, type] = {"canyon": Canyon, "digits": Digits, "mnist": MNIST, "saddle": Saddle}
BASES: dict[str, type] = {
    "adam": torch.optim.Adam,
    "adamw": torch.optim.AdamW,
    "rmsprop": torch.optim.RMSprop,
    "sgd": torch.optim.SGD,
}
POLICIES: dict[str, type] = {
    "constant": ConstantPolicy,
    "random": RandomPolicy,
    "round_robin": RoundRobinPolicy,
    "rules": RulePolicy,
    "trial": TrialPolicy,
}
PLAIN = (bool, int, float, str)


class Schedule(Enum):
    """Of the learning rate, over the run."""

    constant = "constant"
    cosine = "cosine"


@dataclass
class Faults:
    """Broken batches, to see them healed."""

    rate: float = 0.0  # share of the steps
    kind: str = "scale"  # scale, nan, or mixed: the two in turn
    scale: float = 1000.0


@dataclass
class Telemetry:
    """What is written beside metrics.json and report.md."""

    jsonl: bool = True
    console: bool = True
    tensorboard: bool = False
    pictures: int = 0
    page: bool = False


@dataclass
class Measure:
    """What the run is judged by: a number of metrics.json, and the training loss at which the goal is reached."""

    metric: str = "train_loss"
    higher: bool = False  # whether more is better
    target: float | None = None  # training loss, median of the last 15 steps


@dataclass
class Trainer:
    """How the run is trained."""

    nproc: int = 1  # processes of this machine, each with its share of every batch (launch.py)


@dataclass
class Train:
    """The whole config."""

    task: Any = MISSING
    base: Any = MISSING
    probe: Any = MISSING
    policy: Any = MISSING
    mode: dict[str, Any] = field(default_factory=dict)
    intervention: dict[str, Any] = field(default_factory=dict)
    telemetry: Telemetry = field(default_factory=Telemetry)
    seed: int = 0
    steps: int | None = None
    threads: int = 1
    schedule: Schedule = Schedule.cosine
    validate: bool = False
    verify: bool = True
    resume: bool = False
    trainer: Trainer = field(default_factory=Trainer)
    faults: Faults = field(default_factory=Faults)
    measure: Measure = field(default_factory=Measure)
    workload: str | None = None
    arm: str | None = None


def schema(cls: Callable[..., Any], without: Iterable[str] = ("self", "seed")) -> type:
    """A dataclass of the arguments of `cls(...)` that are plain: numbers, texts, lists of them, None."""
    made = cls.__init__ if isinstance(cls, type) else cls
    hints = typing.get_type_hints(made)
    fields: list[Any] = [("_target_", str, f"{cls.__module__}.{cls.__qualname__}")]
    for name, parameter in inspect.signature(made).parameters.items():
        if name in without or parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
            continue
        value = parameter.default
        if value is parameter.empty or not _holds(value):
            continue
        kind = plain_type(hints.get(name, Any))
        default = field(default_factory=lambda value=value: list(value)) if isinstance(value, (list, tuple)) else value
        fields.append((name, kind, default))
    return make_dataclass(cls.__qualname__, fields)


def plain_type(hint: Any) -> Any:
    """The part of a type hint that YAML can hold: tensors drop out of unions, what is left of nothing is Any."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        kept = [kind for kind in map(plain_type, args) if kind is not Any]
        optional = type(None) in kept
        kept = [kind for kind in kept if kind is not type(None)]
        if len(kept) != 1:
            return Any
        return kept[0] | None if optional else kept[0]
    if origin in (list, tuple, Sequence):
        return list[plain_type(args[0])] if args else list[Any]  # pyright: ignore[reportInvalidTypeArguments]
    return hint if hint in (*PLAIN, type(None)) else Any


def register() -> None:
    """Put the schemas where the config files look for them."""
    store = ConfigStore.instance()
    store.store(name="schema", node=Train)
    groups: dict[str, dict[str, Any]] = {
        "task": TASKS,
        "policy": POLICIES,
        "probe": {"lanczos": LanczosProbe},
        "mode": MODES,
        "intervention": INTERVENTIONS,
    }
    for group, classes in groups.items():
        for name, cls in classes.items():
            without = ("self", "seed") if group == "task" else ("self",)
            store.store(group=f"schema/{group}", name=name, node=schema(cls, without))
    for name, cls in BASES.items():
        store.store(group="schema/base", name=name, node=_partial(schema(cls, ("self", "params"))))


def _partial(made: type) -> type:
    """The parameters come later, and a ListConfig in param_groups would make the checkpoint unloadable."""
    more = [("_partial_", bool, True), ("_convert_", str, "all")]
    return make_dataclass(made.__name__, more, bases=(made,))


def _holds(value: Any) -> bool:
    """Whether YAML can hold it."""
    if isinstance(value, (list, tuple)):
        return all(isinstance(x, PLAIN) for x in value)
    return value is None or isinstance(value, PLAIN)

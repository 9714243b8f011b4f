"""What these policies share: which modes can be entered, and the interventions that were allowed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from adaptive_opt.policy import ConstantPolicy
from adaptive_opt.records import Decision, Diagnosis, History

MODES = ("base", "sgd", "kfac", "sam")
REPLAYING = ("sam",)  # modes that evaluate the batch again


def checked(policy: str, modes: Sequence[str], steps: float, name: str) -> None:
    """Raises ValueError that quotes the call."""
    if isinstance(modes, str) or not modes or len(set(modes)) != len(modes) or not steps >= 1:
        raise ValueError(f"{policy}({name}={steps}, modes={modes!r}): 1 or more, and at least one mode, each named once")


def fitting(modes: Sequence[str], history: History) -> list[str]:
    """Those that are there and fit the base; the present one if none is.

    A mode that evaluates the batch again joins when a replay was found to be true, which the first reading asks for.
    """
    there = [m for m in modes if history.available is None or m in history.available]
    there = [m for m in there if history.can_replay or m not in REPLAYING]
    return there or [history.mode]


def with_interventions(
    mode: str, reason: str, interventions: Sequence[str], diagnosis: Diagnosis, history: History
) -> Decision:
    """This mode, and of the interventions what RulePolicy's table gives."""
    return replace(ConstantPolicy(mode, tuple(interventions)).decide(diagnosis, history), reason=reason)

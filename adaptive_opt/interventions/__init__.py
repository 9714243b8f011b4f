"""Interventions: done once, each with its own way back. One file an intervention."""

from collections.abc import Callable
from typing import Any

from adaptive_opt.interventions.auto_step import AutoStep
from adaptive_opt.interventions.base import Applied, Patient, Snapshot
from adaptive_opt.interventions.damp import Damp
from adaptive_opt.interventions.escape import Escape
from adaptive_opt.interventions.rollback import Rollback
from adaptive_opt.interventions.spectral import Spectral
from adaptive_opt.interventions.statistics import RunningStatistics

INTERVENTIONS: dict[str, Callable[[], Any]] = {"damp": Damp, "rollback": Rollback, "escape": Escape, "spectral": Spectral}

__all__ = [
    "INTERVENTIONS",
    "Applied",
    "AutoStep",
    "Damp",
    "Escape",
    "Patient",
    "Rollback",
    "RunningStatistics",
    "Snapshot",
    "Spectral",
]

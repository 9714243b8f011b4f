"""Treatments without a verdict, for ablations: nothing is judged, nothing is taken back."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from adaptive_opt import Decision, Diagnosis
from adaptive_opt.interventions import Applied, Patient
from adaptive_opt.policy import Policy
from adaptive_opt.records import History


@dataclass(frozen=True)
class UnverifiedPolicy:
    """Decides as `policy` does and expects nothing of a mode, so that the controller never puts it on trial."""

    policy: Policy

    def decide(self, diagnosis: Diagnosis, history: History) -> Decision:
        return replace(self.policy.decide(diagnosis, history), expects=None)


def unverified(treatment: Any) -> Any:
    """The same intervention, whose effect nobody waits for."""
    apply = treatment.apply

    def applied(patient: Patient) -> Applied | None:
        done = apply(patient)
        return None if done is None else replace(done, trial=0)

    treatment.apply = applied
    return treatment

"""Hold the step size at a fraction of its stability limit while the user's learning rate is well above it."""

from __future__ import annotations

from typing import Any

from adaptive_opt.interventions.base import Applied, Patient


class Damp:
    """Scales the effective learning rate; the user's param_groups and schedule keep their values.

    It engages when a reading finds the step more than twice above the limit (the diagnosis' threshold), holds it at
    `hold` times the limit from reading to reading, and lets go once the user's own step is below the limit.

    hold: EVIDENCE: 0.15 suits small batches, where the figure goes stale between readings; 0.5 is better without noise.
    trial: steps after which the loss must have fallen; if it has not, the fraction is halved, twice at most.
    """

    name = "damp"

    def __init__(self, hold: float = 0.15, trial: int = 50):
        if not 0 < hold <= 1 or trial < 1:
            raise ValueError(f"Damp(hold={hold}, trial={trial}): hold in (0, 1], trial of 1 or more")
        self.hold, self.trial = hold, trial
        self.scale = 1.0
        self.halved = 0
        self.engaged = False

    def apply(self, patient: Patient) -> Applied | None:
        """Called when the diagnosis says UNSTABLE: engage, or go on."""
        assert patient.reading is not None and patient.reading.stability is not None
        fresh, self.engaged = not self.engaged, True
        self._hold(patient.reading.stability)
        if not fresh:
            return None
        return Applied(f"holding the learning rate at {self.scale:.3g} of the user's", trial=self.trial)

    def follow(self, stability: float) -> bool:
        """A new reading while engaged; returns True when it lets go."""
        if self.engaged and stability <= 1.0:
            self.engaged, self.scale, self.halved = False, 1.0, 0
            return True
        if self.engaged:
            self._hold(stability)
        return False

    def press_on(self) -> bool:
        """The loss has not fallen: hold half of that. False when that was tried twice."""
        if self.halved >= 2:
            return False
        self.halved += 1
        self.scale /= 2
        return True

    def _hold(self, stability: float) -> None:
        self.scale = min(1.0, self.hold * 0.5**self.halved / max(stability, 1e-12))

    def state_dict(self) -> dict[str, Any]:
        return {"scale": self.scale, "halved": self.halved, "engaged": self.engaged}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.scale, self.halved, self.engaged = state["scale"], state["halved"], state["engaged"]

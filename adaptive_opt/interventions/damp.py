"""Hold the step size at a fraction of its stability limit while the user's learning rate is well above it."""

from __future__ import annotations

from typing import Any

from adaptive_opt.interventions.base import Applied, Patient
from adaptive_opt.records import Reading


class Damp:
    """Scales the effective learning rate; the user's param_groups and schedule keep their values.

    It engages when the diagnosis says UNSTABLE and follows every reading from then on. rule: "step" holds the step at
    `hold` / overshoot, the fraction of the coming step at which the quadratic model of the batch loss is lowest when hold
    is 0.5; "limit" holds it at `hold` / stability; "both" at the geometric mean. It lets go once the user's own step is
    neither above the limit nor overshoots.

    trial: steps after which the loss must have fallen; if it has not, the fraction is halved, twice at most.
    """

    name = "damp"

    def __init__(self, hold: float = 0.5, rule: str = "step", trial: int = 50):
        if not 0 < hold <= 1 or trial < 1 or rule not in ("step", "limit", "both"):
            raise ValueError(f"Damp(hold={hold}, rule={rule!r}, trial={trial}): hold in (0, 1], trial of 1 or more")
        self.hold, self.rule, self.trial = hold, rule, trial
        self.scale = 1.0
        self.halved = 0
        self.engaged = False

    def apply(self, patient: Patient) -> Applied | None:
        """Called when the diagnosis says UNSTABLE; readings while it is engaged go through `follow`."""
        if self.engaged or patient.reading is None:
            return None
        self.engaged = True
        self._hold(patient.reading)
        return Applied(f"holding the learning rate at {self.scale:.3g} of the user's", trial=self.trial)

    def follow(self, reading: Reading) -> bool:
        """A new reading while engaged; returns True when it lets go."""
        if not self.engaged or reading.stability is None:
            return False
        if reading.stability <= 1.0 and (reading.overshoot or 0.0) <= 1.0:
            self.engaged, self.scale, self.halved = False, 1.0, 0
            return True
        self._hold(reading)
        return False

    def press_on(self) -> bool:
        """The loss has not fallen: hold half of that. False when that was tried twice."""
        if self.halved >= 2:
            return False
        self.halved += 1
        self.scale /= 2
        return True

    def _hold(self, reading: Reading) -> None:
        limit = 0.15 / max(reading.stability or 0.0, 1e-12)
        step = limit if reading.overshoot is None else self.hold / max(reading.overshoot, 1e-12)
        wanted = {"step": step, "limit": limit, "both": (step * limit) ** 0.5}[self.rule]
        self.scale = min(1.0, wanted * 0.5**self.halved)

    def state_dict(self) -> dict[str, Any]:
        return {"scale": self.scale, "halved": self.halved, "engaged": self.engaged}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.scale, self.halved, self.engaged = state["scale"], state["halved"], state["engaged"]

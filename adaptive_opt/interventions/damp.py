"""Hold the step size at a fraction of its stability limit while the user's learning rate is well above it."""

from __future__ import annotations

import math
from typing import Any

from torch.optim import Optimizer

from adaptive_opt.family import family
from adaptive_opt.interventions.base import Applied, Patient
from adaptive_opt.metric import RULES
from adaptive_opt.records import Reading

MOMENTUM, PLAIN, ADAPTIVE = 0.15, 0.5, 1.0  # of the stability limit; measured: docs/evidence.md, "rates"
LET_GO = 2.0  # times the limit: not above what the diagnosis calls unstable
LOOKED = 0.3  # weight of one look ahead in the average of their logarithms
CONFIRMED = 25  # steps to the first reading that looks ahead ask for, then doubled: as rollback's snapshots


class Damp:
    """Scales the effective learning rate; the user's param_groups and schedule keep their values.

    It engages when the diagnosis says UNSTABLE and follows every reading and look ahead from then on. rule: "step" holds
    the step at `hold` / overshoot, the fraction of the coming step at which the quadratic model of the batch loss is lowest
    when hold is 0.5; "limit" holds it at `hold` / stability; "both" at the geometric mean. Once the user's own step is
    neither above the limit nor overshoots it lets go, and the learning rate returns by and by; where looks ahead say so, it
    asks for a reading to have the limit confirmed.

    trial: steps after which the loss must have fallen; if it has not, the fraction is halved, twice at most.
    """

    name = "damp"
    state = (
        "scale",
        "halved",
        "since",
        "readings",
        "stability",
        "overshoot",
        "fraction",
        "moved",
        "asked",
        "patience",
    )  # of a checkpoint
    looks = False  # ahead, between readings

    @property
    def watched(self) -> bool:
        """While it holds the step short, the whole budget of the readings goes into following it."""
        return self.scale < 1

    def __init__(self, hold: float = 0.5, rule: str = "both", trial: int = 50, calm: int = 30):
        if not 0 < hold <= 1 or trial < 1 or calm < 0 or rule not in ("step", "limit", "both"):
            raise ValueError(
                f"Damp(hold={hold}, rule={rule!r}, trial={trial}, calm={calm}): hold in (0, 1], trial of 1 or more"
            )
        self.hold, self.rule, self.trial, self.calm = hold, rule, trial, calm
        self.scale = 1.0
        self.halved = 0
        self.since: int | None = None  # step at which it engaged
        self.readings = 0  # since then
        self.moved = False  # the parameters jumped: what was averaged so far is of another place
        self.asked, self.patience = 0, CONFIRMED  # step at which a reading was asked for, and steps to the next such
        self.fraction = MOMENTUM
        self.stability = self.overshoot = 0.0  # logarithms, averaged over the readings since then

    @property
    def engaged(self) -> bool:
        return self.since is not None

    def apply(self, patient: Patient) -> Applied | None:
        """Called when the diagnosis says UNSTABLE; readings while it is engaged go through `follow`."""
        if self.engaged:
            return None
        readings = [r for r in (patient.reading, patient.recent) if r is not None and r.stability and r.overshoot]
        if not readings:
            return None
        r = max(readings, key=lambda r: r.overshoot or 0.0)  # the one that shows it
        self.since, self.readings, self.halved = patient.trend.step, 1, 0
        self.asked, self.patience = patient.trend.step, CONFIRMED
        self.fraction = fraction_of_limit(patient.ctx.base)
        self.stability, self.overshoot = _log(r.stability or 0.0), _log(r.overshoot or 0.0)
        self._hold()
        return Applied(f"holding the learning rate at {self.scale:.3g} of the user's", trial=self.trial)

    @staticmethod
    def can_look(base: Optimizer) -> bool:
        """Whether its coming step is known, so that a look ahead can go along it."""
        return RULES.get(family(base) or "") is not None

    def see(self, lr: float) -> None:
        """The learning rate that the user's schedule gives this step; what is held here is a share of it."""

    def look(self, step: int, overshoot: float) -> None:
        """What a look ahead saw of this step."""
        if self.since is not None:
            self.overshoot += (1.0 if self.moved else LOOKED) * (_log(overshoot) - self.overshoot)
            self.moved = False
            self._hold()

    def asks(self, step: int) -> bool:
        """For a reading, off the budget: by its looks ahead the user's step no longer overshoots."""
        if self.since is None or self.overshoot > 0 or step - self.since < self.calm or step - self.asked < self.patience:
            return False
        self.asked, self.patience = step, 2 * self.patience
        return True

    def follow(self, reading: Reading) -> str | None:
        """A new reading while engaged; returns what was done if that is worth a word: it let go."""
        if self.since is None or reading.stability is None or reading.step == self.since:
            return None
        self.readings += 1
        weight = 1.0 if self.moved else 0.5
        self.stability += weight * (_log(reading.stability) - self.stability)
        if reading.overshoot is not None:  # None: no descent or no upward curvature, which says nothing about the step's length
            self.overshoot += weight * (_log(reading.overshoot) - self.overshoot)
            self.moved = False
        calm = self.overshoot <= 0 and reading.stability <= LET_GO
        if calm and self.readings > 3 and reading.step - self.since >= self.calm:
            self.since, self.halved = None, 0
            return "let the learning rate return"
        self._hold()
        return None

    def good_step(self) -> None:
        """A step went well: a learning rate that was let go of returns by 2 % a step; at once, it would be a jolt."""
        if not self.engaged:
            self.scale = min(1.0, self.scale * 1.02)

    def press_on(self) -> bool:
        """The loss has not fallen: hold half of that. False when that was tried twice."""
        if self.halved >= 2:
            return False
        self.halved += 1
        self.scale /= 2
        return True

    def _hold(self) -> None:
        self.scale = min(1.0, self._length() * 0.5**self.halved)

    def _length(self) -> float:
        """What the rule allows the step to be, in units of the one that the averages are of."""
        limit, step = self.fraction / math.exp(self.stability), self.hold / math.exp(self.overshoot)
        return {"step": step, "limit": limit, "both": math.sqrt(step * limit)}[self.rule]

    def state_dict(self) -> dict[str, Any]:
        return {k: getattr(self, k) for k in self.state}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for k in self.state:  # an older checkpoint has not all of them
            setattr(self, k, state.get(k, getattr(self, k)))


def fraction_of_limit(base: Optimizer) -> float:
    """Momentum carries the noise of many batches; without it the step may go closer to the limit, RMSprop's up to it."""
    if has_momentum(base):
        return MOMENTUM
    return PLAIN if family(base) == "SGD" else ADAPTIVE


def has_momentum(base: Optimizer) -> bool:
    return any("betas" in group or group.get("momentum") for group in base.param_groups)


def _log(x: float) -> float:
    return math.log(max(x, 0.3))  # one flat batch must not set it loose

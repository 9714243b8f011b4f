"""Policies: a diagnosis and the history in, a decision out. Pure: the same input gives the same decision on every rank."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median
from typing import Protocol

from adaptive_opt.records import LEARNT, Condition, Decision, Diagnosis, History

LEVELS = 5  # medians of ten steps' losses, twice: the gain of a mode over the last hundred steps


class Policy(Protocol):
    """Decides what is done about a diagnosis."""

    def decide(self, diagnosis: Diagnosis, history: History) -> Decision: ...


@dataclass(frozen=True)
class Rule:
    """One row of the table: under this condition, that treatment, which must move that number."""

    condition: Condition
    treatment: str
    expects: str
    switch: bool = False  # the treatment is a mode, not an intervention
    urgent: bool = False  # treated at once, also while something else is on trial
    again: bool = False  # in that mode, it is given in a larger dose
    leaves: tuple[str, ...] = ()  # modes beside the base that are left for it
    alone: bool = False  # nothing else is done in that step, unless it finds nothing that helps
    needs: str = ""  # "replay", "validate" or nothing


TABLE: tuple[Rule, ...] = (
    Rule(Condition.NON_FINITE, "rollback", "a finite step", urgent=True),
    Rule(Condition.BROKEN, "rollback", "loss back at its usual level", urgent=True),
    # alone: what the other readings say is of other coordinates
    Rule(Condition.UNSCALED, "standardised", "loss after the trial", switch=True, needs="replay", alone=True),
    Rule(Condition.DRIFTING, "spectral", "loss after the trial"),  # before damp: the step's length is of the sick layers
    Rule(Condition.UNSTABLE, "damp", "loss falls", urgent=True),
    Rule(Condition.SADDLE, "escape", "loss on the next batch", needs="replay"),
    # before kfac: what is learnt by heart shall not be learnt faster
    Rule(Condition.SHARP, "sam", "the user's validation loss", switch=True, again=True, leaves=("kfac",), needs="validate"),
    Rule(Condition.ILL_CONDITIONED, "kfac", "progress a step", switch=True),
)


@dataclass(frozen=True)
class RulePolicy:
    """The table above, with dwell time and cool-down.

    dwell: steps that a mode stays at least before another is tried. One trial at a time; what is urgent is treated at
    once, and what calls for an intervention while a mode is only tried ends that trial. A treatment that was taken back waits
    twice as long each time (the controller keeps the date in `History.not_before`). A mode that was kept stays until the
    run breaks in it.

    tries: modes that are tried also where nothing stands out, once the base has taken `after` steps (at the run's start 25 at
    least: before that no agreement is known) and the gradients of successive batches agree: below a |cosine| of `agrees` there
    is more than twice as much noise in them as signal, and curvature is not what limits the run. Above it no number that a
    short run can afford tells whether they are faster (docs/evidence.md, "who need not try kfac"), their trial does. They are
    left when they gain no more. Where labels are learnt, none is tried once nearly all are, and one that is on is left when all
    are: what is gained from there on is confidence, and only validation would show whether it is true.
    """

    dwell: int = 50
    table: Sequence[Rule] = TABLE
    tries: Sequence[str] = ("kfac",)
    after: int = 25
    agrees: float = 0.3

    def decide(self, diagnosis: Diagnosis, history: History) -> Decision:
        mode, reason, expects = history.mode, "", None
        if diagnosis.has(Condition.HEALTHY):  # alone, then, as in almost every step
            return self._untried(history) or self._no_gain(history) or Decision(mode)
        chosen: list[tuple[str, str]] = []  # intervention, why
        taken = False  # what is not urgent is treated one at a time
        for rule in self.table:
            finding = diagnosis.find(rule.condition)
            if finding is None or (taken and not rule.urgent) or (rule.alone and chosen) or not self._allowed(rule, history):
                continue
            taken = taken or not rule.urgent
            if rule.alone:
                return Decision(rule.treatment, (), (), finding.evidence, rule.expects)
            if rule.switch:
                mode, reason, expects = rule.treatment, finding.evidence, rule.expects
            else:
                chosen.append((rule.treatment, finding.evidence))
        return Decision(mode, tuple(name for name, _ in chosen), tuple(why for _, why in chosen), reason, expects)

    def _no_gain(self, history: History) -> Decision | None:
        """Out of a mode that was tried once it gains no more: where the rest is noise the base settles lower."""
        levels = history.stays[-1].levels[-2 * LEVELS :] if history.stays else ()
        if history.mode not in self.tries or history.trial is not None:
            return None
        if history.nats is not None and history.nats < LEARNT:
            return Decision(reason=f"all labels are learnt, {history.mode} has nothing left to gain")
        if len(levels) < 2 * LEVELS:
            return None
        before, now = median(levels[:LEVELS]), median(levels[LEVELS:])
        if now < before:
            return None
        return Decision(
            reason=f"{history.mode} gains no more: loss {before:.4g} -> {now:.4g} over the last {20 * LEVELS} steps"
        )

    def _untried(self, history: History) -> Decision | None:
        """A mode whose trial nothing stands in the way of."""
        if (
            not history.free_to_try
            or history.trial is not None
            or history.step - history.mode_since < self.after
            or history.agreement is None
            or history.agreement < self.agrees
        ):
            return None
        for name in self.tries:
            there = history.available is None or name in history.available
            if there and history.step >= history.not_before.get(name, 0):
                agree = f"gradients of successive batches agree (|cosine| {history.agreement:.2f})"
                return Decision(name, reason=f"{agree}: {name} may be faster", expects="progress a step")
        return None

    def _allowed(self, rule: Rule, history: History) -> bool:
        if history.available is not None and rule.treatment not in history.available:
            return False
        if rule.needs == "replay" and not history.can_replay:
            return False
        if rule.needs == "validate" and not (history.can_validate and history.can_replay):
            return False
        if rule.urgent:
            return True
        if rule.alone:
            waits = history.step < history.not_before.get(rule.treatment, 0)
            return history.mode == "base" and history.trial is None and not waits
        busy = history.trial is not None and (rule.switch or history.trial not in self.tries)
        if busy or history.step < history.not_before.get(rule.treatment, 0):
            return False
        fits = history.mode in ("base", *rule.leaves) or (rule.again and history.mode == rule.treatment)
        return not rule.switch or (fits and history.step - history.mode_since >= self.dwell)


@dataclass(frozen=True)
class ConstantPolicy:
    """A baseline: one mode from the first step to the last, and only the interventions that are named.

    `ConstantPolicy("base")` with a probe on equals the bare optimizer bit for bit. With interventions, the conditions
    that RulePolicy's table gives for them apply.
    """

    mode: str = "base"
    interventions: tuple[str, ...] = ()

    def decide(self, diagnosis: Diagnosis, history: History) -> Decision:
        rows = [rule for rule in TABLE if rule.treatment in self.interventions]
        decision = RulePolicy(table=rows, tries=()).decide(diagnosis, history)
        return Decision(self.mode, decision.interventions, decision.reasons)

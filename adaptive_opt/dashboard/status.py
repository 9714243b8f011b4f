"""How a run is doing, in a colour and in words; pure, and shared by the page, the export and the terminal.

Red: something that ruins a run holds now, or its treatment still waits for the verdict. Amber: it is over but recent, a
treatment is in force, or something lesser holds. Green: nothing stands out. Grey: nothing to judge by.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from adaptive_opt.dashboard.log import Entry, entries, latest
from adaptive_opt.dashboard.words import number
from adaptive_opt.records import Condition, Finding, Reading, StepReport

NOW = 10  # steps for which what a single batch showed counts as now
RECENT = 100  # steps for which what was healed still colours the light
ORDER = {"red": 0, "amber": 1, "green": 2, "grey": 3}


@dataclass(frozen=True)
class Kind:
    """What a condition is called on the page, how bad it is, what treats it, and what to do where nothing did."""

    word: str
    light: str  # while it holds
    treatments: tuple[str, ...]
    advice: str
    reading: str = ""  # which readings show it: "full", "layers" (those that have them) or "any"; "": every step does


KINDS: dict[Condition, Kind] = {
    Condition.NON_FINITE: Kind(
        "NOT FINITE", "red", ("rollback",), "skip this batch; if the parameters are not finite either, go back to a checkpoint"
    ),
    Condition.BROKEN: Kind(
        "BROKEN STEP", "red", ("rollback",), "skip this batch; if it repeats, go back to a checkpoint and shorten the steps"
    ),
    Condition.UNSTABLE: Kind("UNSTABLE", "red", ("damp",), "lower the learning rate below its stability limit", "any"),
    Condition.SADDLE: Kind("AT A SADDLE", "red", ("escape",), "step along the most negative curvature", "full"),
    Condition.UNSCALED: Kind(
        "UNSCALED DATA",
        "amber",
        ("standardised",),
        "standardise the data: subtract each feature's mean, divide by its spread",
        "layers",
    ),
    Condition.DRIFTING: Kind("LAYERS DRIFTING", "red", ("spectral",), "bring the layers' sigma_rms back to 1", "layers"),
    Condition.ILL_CONDITIONED: Kind("ILL-CONDITIONED", "amber", ("kfac",), "precondition: mode kfac", "full"),
    Condition.SHARP: Kind("AT THE EDGE", "green", ("sam",), "nothing: training settles at the edge of stability", "any"),
}
CALLED = {name: kind for kind in KINDS.values() for name in kind.treatments}  # treatment -> what it treats


@dataclass(frozen=True)
class Alert:
    """One thing worth saying."""

    light: str
    word: str
    seen: str
    action: str  # taken, or recommended
    step: int

    def sentence(self) -> str:
        return f"{self.word}: {self.seen}" + (f"; {self.action}" if self.action else "")


@dataclass(frozen=True)
class Status:
    """The most urgent alert makes the light and the headline; `alerts` are all of them, most urgent first."""

    light: str
    headline: str
    alerts: tuple[Alert, ...] = ()


def status(reports: Sequence[StepReport]) -> Status:
    """Of the latest step. `reports` as Run.reports gives them: by step, the latest ones whole."""
    if not reports:
        return Status("grey", "NO STEPS YET: the run has not written a line that can be read")
    log = entries(r for r in reports if r.events)
    alerts = [*_findings(reports, log), *_treated(reports, log), *_others(reports[-1], log)]
    alerts.sort(key=lambda a: (ORDER[a.light], -a.step))
    worst = alerts[0] if alerts else None
    if worst is None or worst.light == "green":
        return Status("green", f"HEALTHY: nothing stands out at step {reports[-1].step:,}", tuple(alerts))
    return Status(worst.light, worst.sentence(), tuple(alerts))


def _findings(reports: Sequence[StepReport], log: Sequence[Entry]) -> list[Alert]:
    """What the diagnosis says now, untreated or with what was done about it in that very step."""
    now = reports[-1].step
    out = []
    for condition, kind in KINDS.items():
        shown = _latest_shown(reports, kind)
        finding = shown.diagnosis.find(condition) if shown is not None and shown.diagnosis is not None else None
        if shown is None or finding is None or (not kind.reading and now - shown.step > NOW):
            continue
        if any(e.event.name in kind.treatments and e.event.step >= shown.step for e in log):
            continue  # the entry tells it
        if condition is Condition.UNSTABLE and shown.lr_scale != 1:
            continue  # of the user's step: the one that is taken is another
        if reports[-1].mode in kind.treatments:
            continue  # what treats it is in force
        tried = latest(log, kind.treatments)
        if tried is not None and tried.event.outcome == "reverted":
            action = (
                f"{tried.event.name} was tried at step {tried.event.step:,} and taken back; it waits before it is tried again"
            )
        elif condition is Condition.SHARP:
            action = kind.advice
        else:
            action = f"recommended: {_advice(kind, condition, shown)}"
        out.append(Alert(kind.light, kind.word, short(condition, finding, shown.reading), action, shown.step))
    return out


def _treated(reports: Sequence[StepReport], log: Sequence[Entry]) -> list[Alert]:
    """The latest treatment of each kind, as long as it waits for its verdict, is in force, or is recent."""
    last = reports[-1]
    out, told = [], set()
    for entry in reversed(log):
        event, kind = entry.event, CALLED.get(entry.event.name)
        if kind is None or event.name in told:
            continue
        told.add(event.name)
        age = last.step - max(event.step, entry.at)
        severe = kind.light == "red"
        in_force = (event.name == "damp" and last.lr_scale != 1) or event.name == last.mode
        if event.outcome == "pending" or (age <= NOW and event.outcome != "kept"):
            light = "red" if severe and "let the learning rate return" not in event.done else "amber"
        elif age <= RECENT or in_force:
            light = "amber" if severe or age <= RECENT else "green"
        else:
            continue
        out.append(Alert(light, _word(entry, kind), _seen(entry, reports), _done(entry), event.step))
    return out


def _others(last: StepReport, log: Sequence[Entry]) -> list[Alert]:
    """Events that treat nothing: the gate that refused, a step that nobody may treat."""
    out = []
    gate = next((e for e in reversed(log) if e.event.name == "gate"), None)
    if gate is not None:
        out.append(Alert("amber", "NOTHING IS MEASURED", gate.event.seen, gate.event.done, gate.event.step))
    untreated = next((e for e in reversed(log) if e.event.name == "none"), None)
    if untreated is not None and last.loss is None:
        out.append(Alert("red", "NOT FINITE", untreated.event.seen, untreated.event.done, untreated.event.step))
    return out


def _latest_shown(reports: Sequence[StepReport], kind: Kind) -> StepReport | None:
    """The latest report that could show it."""
    for report in reversed(reports):
        if report.diagnosis is None:
            continue
        if not kind.reading:
            if report.diagnosis.findings and any(KINDS.get(f.condition) is kind for f in report.diagnosis.findings):
                return report
        elif report.reading is not None and _shows(report.reading, kind):
            return report
    return None


def _shows(reading: Reading, kind: Kind) -> bool:
    return {"any": True, "full": reading.kind == "full", "layers": bool(reading.layers)}[kind.reading]


def short(condition: Condition, finding: Finding, reading: Reading | None) -> str:
    """The evidence in few words, from the numbers where they are there."""
    if condition is Condition.SADDLE and reading is not None and reading.delta:
        least = f"at least {reading.delta} negative direction{'s' * (reading.delta != 1)}"
        return f"{least}, lambda_min {number(reading.lambda_min, reading.lambda_min_error)}, no progress"
    return finding.evidence


def _advice(kind: Kind, condition: Condition, report: StepReport) -> str:
    stability = report.reading.stability if report.reading is not None else None
    if condition is Condition.UNSTABLE and stability:
        return f"{kind.advice}, {report.lr / stability:.2g} on this batch"
    return kind.advice


def _word(entry: Entry, kind: Kind) -> str:
    """Rollback treats two conditions, and damp also says when it lets go."""
    if entry.event.name == "rollback" and ("nan" in entry.event.seen or "inf" in entry.event.seen):
        return KINDS[Condition.NON_FINITE].word
    return "STABLE AGAIN" if entry.event.name == "damp" and "return" in entry.event.done else kind.word


def _seen(entry: Entry, reports: Sequence[StepReport]) -> str:
    """In few words where the report of that step is kept, else in the event's own."""
    report = next((r for r in reversed(reports) if r.step == entry.event.step), None)
    for finding in report.diagnosis.findings if report is not None and report.diagnosis is not None else ():
        if report is not None and finding.evidence == entry.event.seen:
            return short(finding.condition, finding, report.reading)
    return entry.event.seen


def _done(entry: Entry) -> str:
    event = entry.event
    outcome = {"kept": ", kept", "reverted": ", taken back", "pending": ", on trial"}.get(event.outcome, "")
    return f"{event.done}{outcome}" + (f": {event.result}" if event.result else "")

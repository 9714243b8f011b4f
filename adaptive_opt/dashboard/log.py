"""The treatments of a run, one entry each: what was begun, and what came of it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from adaptive_opt.records import Event, StepReport

OUTCOMES = {"kept": "kept", "reverted": "taken back", "done": "done", "pending": "on trial"}


@dataclass(frozen=True)
class Entry:
    """An event with the last that is known of it."""

    event: Event
    at: int  # step of the report that told it

    def words(self) -> str:
        tail = f": {self.event.result}" if self.event.result else ""
        return f"{self.event.seen}; {self.event.done} ({OUTCOMES.get(self.event.outcome, self.event.outcome)}{tail})"


def entries(reports: Iterable[StepReport]) -> list[Entry]:
    """Oldest first. A verdict takes the place of the `pending` that it answers."""
    told: dict[tuple[int, str, str, int], Entry] = {}
    for report in reports:
        count: dict[tuple[int, str, str], int] = {}
        for event in report.events:
            key = (event.step, event.name, event.done)
            answers = (*key, 0) in told and told[(*key, 0)].event.outcome == "pending"
            i = 0 if answers else count.get(key, 0)
            count[key] = i + 1
            told[(*key, i)] = Entry(event, report.step)
    return sorted(told.values(), key=lambda e: e.event.step)


def latest(entries: Sequence[Entry], names: Sequence[str]) -> Entry | None:
    """The last entry of one of these treatments."""
    return next((e for e in reversed(entries) if e.event.name in names), None)

"""What was done in a run, counted from the events of its steps."""

from __future__ import annotations

import re
from collections.abc import Iterable

from adaptive_opt.interventions import INTERVENTIONS
from adaptive_opt.modes import MODES
from adaptive_opt.records import Event

from .records import Treated

PROGRESS = re.compile(r"progress (\S+) -> (\S+) of the loss a step")


class Diary:
    """The latest word on each treatment of a run."""

    def __init__(self) -> None:
        self.sentences: list[str] = []
        self._latest: dict[tuple[int, str], Event] = {}

    def write(self, events: Iterable[Event]) -> None:
        for event in events:
            self.sentences.append(event.sentence())
            if is_treatment(event):
                self._latest[event.step, event.name] = event

    def summary(self) -> Treated:
        last = self._latest.values()
        return Treated(
            interventions=sum(not void(e) for e in last),
            reverted=sum(e.outcome == "reverted" for e in last),
            gainless=sum(gainless(e) for e in last),
            skipped=sum(e.done == "skipped this batch" for e in last),
            void=sum(void(e) for e in last),
            sentences=self.sentences,
        )


def is_treatment(event: Event) -> bool:
    """Not a baseline's change of mode, nor a treatment that ends by itself, nor what is only said."""
    if event.name in INTERVENTIONS:
        return not event.done.startswith(("let the learning rate return", "took it for a change of the data"))
    return event.name in MODES and event.outcome != "done"


def void(event: Event) -> bool:
    return event.done == "found nothing that helps"


def gainless(event: Event) -> bool:
    """Kept, or let be, though the number that it was meant to move did not move that way."""
    if event.outcome == "kept" and (found := PROGRESS.search(event.result)):
        return float(found[2]) <= float(found[1])
    return event.outcome == "done" and " -> " in event.result  # a verdict that failed with nothing better to go back to

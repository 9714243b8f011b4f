"""A run as far as it has been read from its file, while it is written."""

from __future__ import annotations

import math
from pathlib import Path
from threading import Lock

from adaptive_opt.dashboard.kept import Kept
from adaptive_opt.dashboard.tail import Line, Tail
from adaptive_opt.records import StepReport

NOTES = 20


class Run:
    """Follows a run's steps.jsonl. `update` reads on, `reports` is what to draw; safe to use from several threads.

    until: the last step to be read, for a look back; None follows the file. What is kept: see `Kept`.
    """

    def __init__(self, path: str | Path, until: int | None = None):
        self.tail = Tail(path)
        self.until = until
        self.kept = Kept()
        self.version = 0  # grows with every change
        self.told = 0  # grows with every reading and event, and whenever steps are left out: all that the six panels show
        self.restarts: list[str] = []  # sentences
        self.lines = 0
        self._lock = Lock()

    def update(self, seconds: float = 0.2) -> bool:
        """Read on for at most `seconds`; True when something came."""
        before = self.version
        with self._lock:
            for line in self.tail.look(seconds):
                if line is None:
                    self.kept = Kept()
                    self._note("the file began anew")
                else:
                    self._add(line)
        return self.version != before

    def finish(self) -> Run:
        """Read all there is."""
        self.update(math.inf)
        return self

    @property
    def last(self) -> StepReport | None:
        return self.kept.last

    @property
    def reports(self) -> tuple[StepReport, ...]:
        """What is kept, by step. The same tuple as long as nothing came."""
        with self._lock:
            return self.kept.reports

    @property
    def notes(self) -> tuple[str, ...]:
        """What the reader has to say about the file itself."""
        notes = list(self.restarts)
        if self.tail.broken:
            notes.append(f"{self.tail.broken} lines of the file could not be read and are left out")
        if self.kept.events.dropped:
            notes.append(f"the {self.kept.events.dropped} oldest steps with events are left out")
        return tuple(notes)

    def _add(self, line: Line) -> None:
        report = line.report
        if self.until is not None and report.step > self.until:
            return
        self.version += 1
        self.lines += 1
        before = self.kept.add(report, line.size)
        if before is not None:  # resumed from a checkpoint
            self._note(f"resumed at step {report.step}: steps {report.step} to {before} of before are left out")
        self.told += report.reading is not None or bool(report.events)

    def _note(self, sentence: str) -> None:
        self.version += 1
        self.told += 1
        self.restarts = [*self.restarts[-NOTES + 1 :], sentence]

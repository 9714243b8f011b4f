"""A run as far as it has been read: every number that the figures need, in bounded memory, whatever its length."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from threading import Lock

from adaptive_opt.dashboard.tail import Line, Tail
from adaptive_opt.dashboard.thin import Even, Extremes, Latest
from adaptive_opt.records import StepReport

MIB = 1 << 20
NOTES = 20


class Run:
    """Follows a run's steps.jsonl. `update` reads on, `reports` is what to draw; safe to use from several threads.

    until: the last step to be read, for a look back; None follows the file. Kept: the latest 512 reports whole, 250 full and
    250 cheap readings spread over the run, the latest 1000 reports with events, and the lowest and highest loss of 600
    stretches of the run.
    """

    def __init__(self, path: str | Path, until: int | None = None):
        self.tail = Tail(path)
        self.until = until
        self.version = 0  # grows with every change
        self.told = 0  # grows with every reading and event, and whenever steps are left out: all that the six panels show
        self.restarts: list[str] = []  # sentences
        self.lines = 0
        self._lock = Lock()
        self._clear()

    def _clear(self) -> None:
        self.latest = Latest(512, 8 * MIB)
        self.full, self.cheap = Even(250, 24 * MIB), Even(250, 8 * MIB)
        self.events = Latest(1000, 8 * MIB)
        self.course = Extremes(600)
        self.last: StepReport | None = None
        self._sorted: tuple[int, tuple[StepReport, ...]] | None = None

    def update(self, seconds: float = 0.2) -> bool:
        """Read on for at most `seconds`; True when something came."""
        before = self.version
        with self._lock:
            for line in self.tail.look(seconds):
                if line is None:
                    self._clear()
                    self._note("the file began anew")
                else:
                    self._add(line)
        return self.version != before

    def finish(self) -> Run:
        """Read all there is."""
        self.update(math.inf)
        return self

    @property
    def reports(self) -> tuple[StepReport, ...]:
        """What is kept, by step. The same tuple as long as nothing came."""
        with self._lock:
            if self._sorted is None or self._sorted[0] != self.version:
                kept: dict[int, StepReport] = {}
                for part in (self.course, self.cheap, self.full, self.events, self.latest):  # the whole ones last
                    kept.update((r.step, r) for r in part.reports())
                self._sorted = self.version, tuple(kept[step] for step in sorted(kept))
            return self._sorted[1]

    @property
    def notes(self) -> tuple[str, ...]:
        """What the reader has to say about the file itself."""
        notes = list(self.restarts)
        if self.tail.broken:
            notes.append(f"{self.tail.broken} lines of the file could not be read and are left out")
        if self.events.dropped:
            notes.append(f"the {self.events.dropped} oldest steps with events are left out")
        return tuple(notes)

    def _add(self, line: Line) -> None:
        report = line.report
        if self.until is not None and report.step > self.until:
            return
        self.version += 1
        self.lines += 1
        if self.last is not None and report.step <= self.last.step:  # resumed from a checkpoint: these steps are taken again
            self._note(f"resumed at step {report.step}: steps {report.step} to {self.last.step} of before are left out")
            for part in (self.latest, self.full, self.cheap, self.events, self.course):
                part.drop_from(report.step)
        self.last = report
        self.latest.add(report, line.size)
        if report.reading is not None:
            (self.full if report.reading.kind == "full" else self.cheap).add(report, line.size)
        if report.events:
            self.events.add(report, line.size)
        self.told += report.reading is not None or bool(report.events)
        self.course.add(replace(report, reading=None, diagnosis=None, decision=None, events=()))

    def _note(self, sentence: str) -> None:
        self.version += 1
        self.told += 1
        self.restarts = [*self.restarts[-NOTES + 1 :], sentence]

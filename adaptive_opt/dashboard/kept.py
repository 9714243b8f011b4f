"""What is kept of a run: every number that its figures need, in bounded memory, whatever its length."""

from __future__ import annotations

from dataclasses import replace

from adaptive_opt.dashboard.thin import Even, Extremes, Latest
from adaptive_opt.records import StepReport
from adaptive_opt.telemetry import to_json

MIB = 1 << 20


class Kept:
    """The latest 512 reports whole, 250 full and 250 cheap readings spread over the run, the latest 1000 reports with
    events, and the lowest and highest loss of 600 stretches of the run.
    """

    def __init__(self) -> None:
        self.latest = Latest(512, 8 * MIB)
        self.full, self.cheap = Even(250, 24 * MIB), Even(250, 8 * MIB)
        self.events = Latest(1000, 8 * MIB)
        self.course = Extremes(600)
        self.last: StepReport | None = None
        self._sorted: tuple[StepReport, ...] | None = None

    def add(self, report: StepReport, size: int | None = None) -> int | None:
        """Take one more report, of `size` bytes as a line (None: they are counted).

        Steps that are taken again, after a resume, replace those of before; returns then which step was the last of those.
        """
        if size is None:  # a step in which nothing was measured takes little, and is not worth counting
            size = 1000 if report.reading is None else len(to_json(report))
        again = self.last.step if self.last is not None and report.step <= self.last.step else None
        if again is not None:
            for part in (self.latest, self.full, self.cheap, self.events, self.course):
                part.drop_from(report.step)
        self.last, self._sorted = report, None
        self.latest.add(report, size)
        if report.reading is not None:
            (self.full if report.reading.kind == "full" else self.cheap).add(report, size)
        if report.events:
            self.events.add(report, size)
        self.course.add(replace(report, reading=None, diagnosis=None, decision=None, events=()))
        return again

    @property
    def reports(self) -> tuple[StepReport, ...]:
        """By step. The same tuple as long as nothing came."""
        if self._sorted is None:
            kept: dict[int, StepReport] = {}
            for part in (self.course, self.cheap, self.full, self.events, self.latest):  # the whole ones last
                kept.update((r.step, r) for r in part.reports())
            self._sorted = tuple(kept[step] for step in sorted(kept))
        return self._sorted

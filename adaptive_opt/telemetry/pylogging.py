"""The steps' numbers to Python's own logging."""

from __future__ import annotations

import logging

from adaptive_opt.records import StepReport
from adaptive_opt.telemetry.console import line


class LoggingSink:
    """A line for every reading, and with `every=N` one every N steps, at `level`; the report itself is the record's `report`.

    Treatments are not repeated here: the optimizer tells them to the logger "adaptive_opt" itself.
    """

    def __init__(
        self, logger: str | logging.Logger = "adaptive_opt.steps", level: int = logging.INFO, every: int | None = None
    ):
        if every is not None and every < 1:
            raise ValueError(f"LoggingSink(every={every}): a number of steps, 1 or more, or None for readings only")
        self.logger = logging.getLogger(logger) if isinstance(logger, str) else logger
        self.level, self.every = level, every

    def __call__(self, report: StepReport) -> None:
        if report.reading is not None or (self.every is not None and report.step % self.every == 0):
            self.logger.log(self.level, "%s", line(report), extra={"report": report})

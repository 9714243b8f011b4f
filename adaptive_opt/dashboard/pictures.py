"""The six panels of a run as pictures, for loggers that take no Plotly figure, such as TensorBoard."""

from __future__ import annotations

import logging
import tempfile
from pathlib import Path

from adaptive_opt.dashboard.kept import Kept
from adaptive_opt.dashboard.panels import PANELS
from adaptive_opt.dashboard.picture import NoBrowser, figures_picture
from adaptive_opt.records import StepReport

LOG = logging.getLogger("adaptive_opt")


class Pictures:
    """Called with every StepReport; gives a PNG of the six panels every `every` steps, None in between.

    Chromium or Chrome draws it, in about two seconds in which training waits. Where there is none, or it fails, a warning
    says so once and no picture is drawn any more; training goes on. width: pixels.
    """

    def __init__(self, every: int = 1000, width: int = 1280):
        if every < 1 or width < 400:
            raise ValueError(f"Pictures(every={every}, width={width}): every must be 1 step or more, width 400 pixels or more")
        self.every, self.width = every, width
        self.kept = Kept()
        self._failed = False

    def __call__(self, report: StepReport) -> bytes | None:
        self.kept.add(report)
        if self._failed or (report.step + 1) % self.every:
            return None
        try:
            with tempfile.TemporaryDirectory() as folder:
                path = Path(folder) / "panels.png"
                figures_picture({p.title: p.draw(self.kept.reports) for p in PANELS}, path, self.width)
                return path.read_bytes()
        except (NoBrowser, RuntimeError, OSError) as error:
            self._failed = True
            LOG.warning("no pictures of the panels: %s", error)
            return None

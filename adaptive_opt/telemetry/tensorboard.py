"""Readings and treatments to TensorBoard (extra `tensorboard`)."""

from __future__ import annotations

from collections.abc import Callable
from io import BytesIO
from pathlib import Path

import numpy as np
from torch.utils.tensorboard import SummaryWriter

from adaptive_opt.records import StepReport
from adaptive_opt.telemetry.scalars import scalars


class TensorBoardSink:
    """Loss and effective learning rate at every step, a reading's numbers when there is one, events as text.

    pictures: called with every report, gives a PNG or None; `adaptive_opt.dashboard.pictures.Pictures(every=1000)` gives the
    dashboard's six panels (extra `dashboard`, and Chromium or Chrome).
    """

    def __init__(self, run_dir: str | Path, pictures: Callable[[StepReport], bytes | None] | None = None):
        self.writer = SummaryWriter(str(run_dir))
        self.pictures = pictures

    def __call__(self, report: StepReport) -> None:
        for name, value in scalars(report).items():
            self.writer.add_scalar(name, value, report.step)
        for event in report.events:
            self.writer.add_text("events", event.sentence(), report.step)
        picture = self.pictures(report) if self.pictures is not None else None
        if picture is not None:
            from PIL import Image  # comes with tensorboard

            pixels = np.asarray(Image.open(BytesIO(picture)).convert("RGB"))  # (height, width, 3)
            self.writer.add_image("panels", pixels, report.step, dataformats="HWC")

    def close(self) -> None:
        self.writer.close()

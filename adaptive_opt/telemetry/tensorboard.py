"""Readings and treatments to TensorBoard (extra `tensorboard`)."""

from __future__ import annotations

from pathlib import Path

from torch.utils.tensorboard import SummaryWriter

from adaptive_opt.records import StepReport

SCALARS = (
    "kappa",
    "kappa_effective",
    "epsilon",
    "delta",
    "lambda_max",
    "lambda_min",
    "stability",
    "overshoot",
    "trace",
)


class TensorBoardSink:
    """Loss and effective learning rate at every step, a reading's numbers when there is one, events as text."""

    def __init__(self, run_dir: str | Path):
        self.writer = SummaryWriter(str(run_dir))

    def __call__(self, report: StepReport) -> None:
        if report.loss is not None:
            self.writer.add_scalar("train/loss", report.loss, report.step)
        self.writer.add_scalar("train/lr_effective", report.lr * report.lr_scale, report.step)
        if report.reading is not None:
            for name in SCALARS:
                value = getattr(report.reading, name)
                if value is not None:
                    self.writer.add_scalar(f"reading/{name}", value, report.step)
            for layer in report.reading.layers:
                self.writer.add_scalar(f"sigma_rms/{layer.name}", layer.sigma_rms, report.step)
        for event in report.events:
            self.writer.add_text("events", event.sentence(), report.step)

    def close(self) -> None:
        self.writer.close()

"""Readings and treatments to Weights & Biases (package `wandb`)."""

from __future__ import annotations

from typing import Any

from adaptive_opt.records import StepReport
from adaptive_opt.telemetry.scalars import scalars


class WandbSink:
    """Logs into a run that `wandb.init()` gave, under "adaptive/", against a step count of its own: yours is left alone."""

    def __init__(self, run: Any):
        self.run = run
        run.define_metric("adaptive/step", hidden=True)
        run.define_metric("adaptive/*", step_metric="adaptive/step")

    def __call__(self, report: StepReport) -> None:
        line: dict[str, Any] = {f"adaptive/{name}": value for name, value in scalars(report).items()}
        if report.events:
            line["adaptive/events"] = "; ".join(event.sentence() for event in report.events)
        self.run.log({"adaptive/step": report.step, **line})

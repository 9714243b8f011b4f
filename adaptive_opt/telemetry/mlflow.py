"""Readings and treatments to MLflow (package `mlflow` or `mlflow-skinny`)."""

from __future__ import annotations

from mlflow.tracking import MlflowClient  # pyright: ignore[reportMissingImports]

from adaptive_opt.records import StepReport
from adaptive_opt.telemetry.scalars import scalars


class MlflowSink:
    """Logs metrics into the run with this id; each treatment is a tag "adaptive.event.STEP.NUMBER" of one sentence.

    every: loss and learning rate every so many steps (a server is asked each time); readings and treatments always.
    """

    def __init__(self, run_id: str, every: int = 10, client: MlflowClient | None = None):
        if every < 1:
            raise ValueError(f"MlflowSink(every={every}): a number of steps, 1 or more")
        self.run_id, self.every = run_id, every
        self.client = MlflowClient() if client is None else client

    def __call__(self, report: StepReport) -> None:
        if report.reading is not None or report.step % self.every == 0:
            for name, value in scalars(report).items():
                self.client.log_metric(self.run_id, f"adaptive/{name}", value, step=report.step)
        for n, event in enumerate(report.events):
            self.client.set_tag(self.run_id, f"adaptive.event.{report.step}.{n}", event.sentence())

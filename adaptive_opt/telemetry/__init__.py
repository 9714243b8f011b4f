"""StepReport <-> one JSON line, and sinks: whatever is called with every StepReport."""

from importlib import import_module

from adaptive_opt.telemetry.console import ConsoleSink
from adaptive_opt.telemetry.jsonl import JsonlSink, describe_run, from_json, read_reports, to_json
from adaptive_opt.telemetry.pylogging import LoggingSink
from adaptive_opt.telemetry.scalars import scalars

__all__ = ["ConsoleSink", "JsonlSink", "LoggingSink", "describe_run", "from_json", "read_reports", "scalars", "to_json"]
EXTRAS = {"TensorBoardSink": "tensorboard", "WandbSink": "wandb", "MlflowSink": "mlflow"}  # imported when asked for


def __getattr__(name: str) -> object:
    if name in EXTRAS:
        return getattr(import_module(f"adaptive_opt.telemetry.{EXTRAS[name]}"), name)
    raise AttributeError(f"module 'adaptive_opt.telemetry' has no attribute {name!r}")

"""StepReport <-> one JSON line, and sinks: whatever is called with every StepReport."""

from adaptive_opt.telemetry.console import ConsoleSink
from adaptive_opt.telemetry.jsonl import JsonlSink, describe_run, from_json, read_reports, to_json

__all__ = ["ConsoleSink", "JsonlSink", "describe_run", "from_json", "read_reports", "to_json"]


def __getattr__(name: str) -> object:
    if name == "TensorBoardSink":  # its package is an extra: imported when asked for
        from adaptive_opt.telemetry.tensorboard import TensorBoardSink

        return TensorBoardSink
    raise AttributeError(f"module 'adaptive_opt.telemetry' has no attribute {name!r}")

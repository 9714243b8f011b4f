"""One line of JSON a step, readable while training goes on; and run.json, what the run was."""

from __future__ import annotations

import json
import math
import platform
import subprocess
import sys
import time
import weakref
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from importlib import metadata
from pathlib import Path
from typing import Any

from adaptive_opt.records import Condition, Decision, Diagnosis, Event, Finding, Reading, StepReport

SCHEMA = 1


class JsonlSink:
    """Writes every StepReport as one line of `run_dir/steps.jsonl`, flushed line by line, and `run_dir/run.json` at once.

    config: anything plain that describes the run. A file that exists is continued, after a resume for example.
    """

    def __init__(self, run_dir: str | Path, config: Mapping[str, Any] | None = None, seed: int | None = None):
        self.path = Path(run_dir) / "steps.jsonl"
        self.path.parent.mkdir(parents=True, exist_ok=True)
        described = self.path.parent / "run.json"
        if self.path.exists() and described.exists():  # a run that goes on keeps its beginning
            run = json.loads(described.read_text())
            run["resumed"] = [*run.get("resumed", []), describe_run(config, seed)]
        else:
            run = describe_run(config, seed)
        described.write_text(json.dumps(run, indent=2) + "\n")
        self._file = self.path.open("a", buffering=1)
        self.close = weakref.finalize(self, self._file.close)  # at the latest when the sink is gone

    def __call__(self, report: StepReport) -> None:
        self._file.write(to_json(report) + "\n")


def describe_run(config: Mapping[str, Any] | None = None, seed: int | None = None) -> dict[str, Any]:
    """Config, versions, git revision, seed and start of a run, as plain data."""
    versions = {name: _version(name) for name in ("adaptive-opt", "torch", "numpy", "scipy")}
    return {
        "schema": SCHEMA,
        "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "command": sys.argv,
        "seed": seed,
        "config": plain(dict(config)) if config is not None else None,
        "versions": {"python": platform.python_version(), **versions},
        "git": _revision(),
    }


def to_json(report: StepReport) -> str:
    """One line. A number that is NaN or infinite is null: JSON has neither."""
    return json.dumps(plain({"schema": SCHEMA, **asdict(report)}), allow_nan=False)


def from_json(line: str) -> StepReport:
    """The report back from its line. Raises ValueError on anything else, with what is wrong."""
    try:
        d = json.loads(line)
        if d.pop("schema") != SCHEMA:
            raise ValueError(f"schema {SCHEMA} expected")
        for name, build in (("reading", Reading.from_dict), ("diagnosis", _diagnosis), ("decision", _decision)):
            d[name] = None if d[name] is None else build(d[name])
        return StepReport(**{**d, "events": tuple(Event(**e) for e in d["events"])})
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"not a StepReport line ({error}): {line[:80]!r}") from error


def read_reports(run_dir: str | Path) -> Iterator[StepReport]:
    """The reports of a run, also of one that is being written; lines that are not whole yet, or broken, are passed over."""
    with (Path(run_dir) / "steps.jsonl").open() as lines:
        for line in lines:
            try:
                yield from_json(line)
            except ValueError:
                continue


def _diagnosis(d: dict[str, Any]) -> Diagnosis:
    nan = {"value", "threshold"}
    found = [{k: math.nan if v is None and k in nan else v for k, v in f.items()} for f in d["findings"]]
    return Diagnosis(d["step"], tuple(Finding(**{**f, "condition": Condition(f["condition"])}) for f in found))


def _decision(d: dict[str, Any]) -> Decision:
    return Decision(**{**d, "interventions": tuple(d["interventions"]), "reasons": tuple(d["reasons"])})


def plain(x: Any) -> Any:
    """The same in what JSON knows: NaN and infinity are null, anything strange is its text."""
    if isinstance(x, Mapping):
        return {str(k): plain(v) for k, v in x.items()}
    if isinstance(x, (list, tuple)):
        return [plain(v) for v in x]
    if isinstance(x, float):
        return x if math.isfinite(x) else None
    return x if x is None or isinstance(x, (str, int, bool)) else str(x)


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _revision() -> str | None:
    try:
        out = subprocess.run(["git", "describe", "--always", "--dirty"], capture_output=True, text=True, timeout=5, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return out.stdout.strip() or None

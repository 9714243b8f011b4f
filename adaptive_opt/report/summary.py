"""What a run folder holds, read once: whatever is broken in it is said, and the rest is used."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

from adaptive_opt.dashboard.log import Entry, entries
from adaptive_opt.dashboard.run import Run
from adaptive_opt.dashboard.runs import FILE
from adaptive_opt.records import Reading, StepReport
from adaptive_opt.telemetry.jsonl import SCHEMA

LAST = 20  # steps whose median is the loss at the end


class Unreadable(Exception):
    """The folder cannot be used; the message says why."""


@dataclass(frozen=True)
class Summary:
    """One run as far as its folder tells it."""

    name: str
    reports: tuple[StepReport, ...]  # what `Run` keeps of steps.jsonl; () for a bare optimizer's run
    log: tuple[Entry, ...]  # treatments, each with the last that is known of it
    metrics: dict[str, Any] = field(default_factory=dict)  # metrics.json, {} while the run is not done
    run: dict[str, Any] = field(default_factory=dict)  # run.json: config, seed, versions, command
    notes: tuple[str, ...] = ()  # what is wrong with the folder

    @property
    def steps(self) -> int:
        return self.reports[-1].step + 1 if self.reports else int(self.metrics.get("steps", 0))

    @property
    def loss(self) -> float | None:
        """Training loss at the end: the median of the last 20 steps; None when the last of them were not finite."""
        if not self.reports:
            return self.metrics.get("train_loss")
        if self.reports[-1].loss is None:
            return None
        return median(r.loss for r in self.reports[-LAST:] if r.loss is not None)

    @property
    def readings(self) -> list[Reading]:
        """All that were kept, oldest first."""
        return [r.reading for r in self.reports if r.reading is not None]

    def last(self, name: str) -> float | None:
        """The latest measured value of a number."""
        return next((v for r in reversed(self.readings) if (v := getattr(r, name)) is not None), None)

    @property
    def outcomes(self) -> Counter[str]:
        """How many treatments were kept, reverted, done, or are pending."""
        return Counter(entry.event.outcome for entry in self.log)

    def share(self, cost: str) -> float | None:
        """`probe_cost` or `treatment_cost` in gradient-equivalents a step; None of a bare optimizer's run."""
        return getattr(self.reports[-1], cost) / self.steps if self.reports and self.steps else None


def summary(run_dir: str | Path, metrics: Mapping[str, Any] | None = None) -> Summary:
    """Read a run folder. metrics: what metrics.json is going to be, while it is not written yet.

    Raises Unreadable, with the reason, where there is nothing to use: no such folder, no run in it, another schema version.
    """
    folder = Path(run_dir)
    if not folder.is_dir():
        raise Unreadable(f"{run_dir}: no such folder")
    notes: list[str] = []
    run = _json(folder / "run.json", notes)
    found = dict(metrics) if metrics is not None else _json(folder / "metrics.json", notes)
    for name, said in (("run.json", run), ("metrics.json", found)):
        if said.get("schema", SCHEMA) != SCHEMA:
            raise Unreadable(f"{run_dir}: {name} has schema {said['schema']!r}, and this version reads {SCHEMA}")
    reports: tuple[StepReport, ...] = ()
    if (folder / FILE).is_file():
        read = Run(folder / FILE).finish()
        reports = read.reports
        notes += read.notes
        if not reports and read.tail.broken:
            raise Unreadable(f"{run_dir}: none of the {read.tail.broken} lines of {FILE} is one of schema {SCHEMA}")
    if not reports and not found:
        why = _failure(folder) or f"no metrics.json, and no line in {FILE}"
        raise Unreadable(f"{run_dir}: {why}")
    if not found:
        notes.append(_failure(folder) or "no metrics.json: the run is not finished, or was not started by the experiments")
    log = tuple(entries(r for r in reports if r.events))
    return Summary(folder.resolve().name, reports, log, found, run, tuple(notes))


def _failure(folder: Path) -> str | None:
    """The last line of what the run said when it failed."""
    try:
        lines = (folder / "failed.txt").read_text(errors="replace").strip().splitlines()
    except OSError:
        return None
    return f"the run failed: {lines[-1]}" if lines else "the run failed"


def _json(path: Path, notes: list[str]) -> dict[str, Any]:
    try:
        d = json.loads(path.read_text())
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        notes.append(f"{path.name} cannot be read ({error})")
        return {}
    if not isinstance(d, dict):
        notes.append(f"{path.name} holds no names and values")
        return {}
    return d

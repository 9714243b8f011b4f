"""A run's folder, written in the order of its life.

run.json          config, seed, versions, command, git revision             at the start
environment.json  machine, thread counts, every installed package           at the start
steps.jsonl       one line a step (the wrapped optimizer's JsonlSink)        while it runs
metrics.json      how it ended; nothing in it depends on the clock: the same seed gives the same bytes
curve.csv         step, loss, gradient-equivalents so far; the same bytes again
timing.json       seconds: the whole, and at every step
report.md         readings, treatments and outcome in words
failed.txt        instead of the last four: why it ended without an outcome
"""

from __future__ import annotations

import csv
import functools
import json
import os
import platform
import traceback
from collections import Counter
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from adaptive_opt.report import report
from adaptive_opt.telemetry import describe_run
from adaptive_opt.telemetry.jsonl import plain

from .loop import Outcome

SCHEMA = 1
WRITTEN = ("steps.jsonl", "metrics.json", "curve.csv", "timing.json", "report.md", "failed.txt")


def begin(run_dir: Path, config: Mapping[str, Any], seed: int) -> None:
    """Say what the run is; whatever an earlier attempt left is removed."""
    run_dir.mkdir(parents=True, exist_ok=True)
    for name in WRITTEN:
        (run_dir / name).unlink(missing_ok=True)
    _write(run_dir / "run.json", describe_run(config, seed))
    _write(run_dir / "environment.json", environment())


def finish(run_dir: Path, outcome: Outcome) -> None:
    """Write the outcome; metrics.json comes last: where it is, all is."""
    with (run_dir / "curve.csv").open("w", newline="") as file:
        rows = csv.writer(file, lineterminator="\n")
        rows.writerow(("step", "loss", "gradients"))
        rows.writerows(zip(range(outcome.steps), map(repr, outcome.losses), map(repr, outcome.gradients), strict=True))
    _write(run_dir / "timing.json", {"seconds": outcome.seconds, "at": [round(t, 6) for t in outcome.clock]})
    numbers = {
        "schema": SCHEMA,
        "steps": outcome.steps,
        "start_loss": outcome.losses[0],
        "final_loss": outcome.losses[-1],
        "train_loss": outcome.train_loss,
        **outcome.metrics,
        "gradients": outcome.gradients[-1],
        "probing": outcome.overhead,
        "treatment": outcome.treatment,
        "treatments": dict(Counter(outcome.outcomes)),
    }
    _write(run_dir / "metrics.tmp", numbers)
    (run_dir / "report.md").write_text(report(run_dir, numbers))
    (run_dir / "metrics.tmp").rename(run_dir / "metrics.json")


def fail(run_dir: Path, error: BaseException) -> None:
    """Say why there is no outcome."""
    (run_dir / "failed.txt").write_text("".join(traceback.format_exception(error)))


def finished(run_dir: Path, config: Mapping[str, Any]) -> Outcome | None:
    """The outcome of a run that was done with this very config in this folder; None otherwise."""
    try:
        if json.loads((run_dir / "run.json").read_text())["config"] != plain(dict(config)):
            return None
        numbers = json.loads((run_dir / "metrics.json").read_text())
        timing = json.loads((run_dir / "timing.json").read_text())
        with (run_dir / "curve.csv").open() as file:
            rows = [(float(row["loss"]), float(row["gradients"])) for row in csv.DictReader(file)]
    except (OSError, ValueError, KeyError):
        return None
    known = {"schema", "steps", "start_loss", "final_loss", "train_loss", "gradients", "probing", "treatment", "treatments"}
    return Outcome(
        metrics={k: float("nan") if v is None else v for k, v in numbers.items() if k not in known},
        losses=[loss for loss, _ in rows],
        gradients=[spent for _, spent in rows],
        clock=timing["at"],
        seconds=timing["seconds"],
        steps=numbers["steps"],
        overhead=numbers["probing"],
        treatment=numbers["treatment"],
    )


def environment() -> dict[str, Any]:
    """The machine and everything that is installed."""
    return {
        "platform": platform.platform(),
        "machine": platform.machine(),
        "cpus": os.cpu_count(),
        "torch_threads": torch.get_num_threads(),
        "omp_num_threads": os.environ.get("OMP_NUM_THREADS"),
        "cuda": torch.version.cuda,
        "packages": packages(),
    }


@functools.cache
def packages() -> dict[str, str]:
    """Name and version of everything installed: 0.3 s, so once for all runs of a process."""
    return dict(sorted((d.name, d.version) for d in metadata.distributions() if d.name))


def _write(path: Path, numbers: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(plain(numbers), indent=2) + "\n")

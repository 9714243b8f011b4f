"""The runs below a folder: what is done is read, what is not is named with the reason."""

from __future__ import annotations

import csv
import json
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

from ..folder import SCHEMA

SMOOTH = 15  # steps whose median loss has to reach the target


@dataclass(frozen=True)
class RunRow:
    """One finished run."""

    workload: str
    arm: str
    seed: int
    metric: str  # which number of metrics.json judges it
    higher: bool  # whether more of it is better
    value: float  # of the metric; of a loss, its log10, so that a mean over seeds means something
    finite: bool  # False: it ended with NaN, and the value is that of its start
    steps: int
    gradients: float  # gradient-equivalents, all told
    seconds: float
    kept: int  # treatments
    reverted: int
    steps_to_target: float | None = None  # None: there is no target; infinite: it was not reached
    gradients_to_target: float | None = None
    seconds_to_target: float | None = None


@dataclass(frozen=True)
class Found:
    """What lies below a folder."""

    rows: tuple[RunRow, ...]
    skipped: tuple[tuple[str, str], ...] = field(default=())  # folder, why it is not counted


def find(folder: Path) -> Found:
    """Every run below `folder`. Raises ValueError where there is no such folder."""
    if not folder.is_dir():
        raise ValueError(f"{folder}: no such folder; give one with runs of experiments/train.py in it")
    rows, skipped = [], []
    for here, below, files in os.walk(folder):
        below.sort()
        if not {"run.json", "metrics.json"} & set(files):
            continue
        name = Path(here).relative_to(folder).as_posix()
        try:
            rows.append(read(Path(here)))
        except Skipped as why:
            skipped.append((name, str(why)))
    double = _twice(rows)
    return Found(tuple(double.values()), tuple(skipped))


class Skipped(Exception):
    """The folder holds no finished run that can be read."""


def read(run_dir: Path) -> RunRow:
    """One run's row. Raises Skipped with the reason."""
    failed = run_dir / "failed.txt"
    if failed.exists():
        lines = failed.read_text(errors="replace").strip().splitlines()
        raise Skipped(f"failed: {lines[-1] if lines else 'no reason was written'}")
    run, metrics = _json(run_dir / "run.json"), _json(run_dir / "metrics.json")
    if metrics.get("schema") != SCHEMA:
        raise Skipped(f"metrics.json has schema {metrics.get('schema')!r}, and this version reads {SCHEMA}")
    try:
        return _row(run_dir, run["config"], run["seed"], metrics)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise Skipped(f"something is missing in it ({type(error).__name__}: {error})") from error


def _row(run_dir: Path, config: dict[str, Any], seed: int, metrics: dict[str, Any]) -> RunRow:
    measure = config["measure"]
    value, finite = metrics[measure["metric"]], metrics["train_loss"] is not None
    loss = "loss" in measure["metric"]
    if loss:
        finite = finite and value is not None
        value = math.log10(max(value if finite else metrics["start_loss"], 1e-300))
    steps, gradients, seconds = to_target(run_dir, measure["target"])
    told = metrics["treatments"]
    return RunRow(
        workload=config["workload"] or config["task"]["_target_"].rpartition(".")[2],
        arm=config["arm"] or _arm(config["policy"]),
        seed=int(seed),
        metric=f"log10 {measure['metric']}" if loss else measure["metric"],
        higher=measure["higher"],
        value=float(value),
        finite=finite,
        steps=int(metrics["steps"]),
        gradients=float(metrics["gradients"]),
        seconds=float(_json(run_dir / "timing.json")["seconds"]),
        kept=told.get("kept", 0),
        reverted=told.get("reverted", 0),
        steps_to_target=steps,
        gradients_to_target=gradients,
        seconds_to_target=seconds,
    )


def to_target(run_dir: Path, target: float | None) -> tuple[float | None, float | None, float | None]:
    """Steps, gradient-equivalents and seconds until the median loss of 15 steps is at the target; infinite: never."""
    if target is None:
        return None, None, None
    try:
        with (run_dir / "curve.csv").open() as file:
            rows = [(float(row["loss"]), float(row["gradients"])) for row in csv.DictReader(file)]
    except OSError as error:
        raise Skipped(f"curve.csv cannot be read ({error.strerror})") from error
    at = first_below([loss for loss, _ in rows], target)
    if at is None:
        return math.inf, math.inf, math.inf
    return at + 1, rows[at][1], float(_json(run_dir / "timing.json")["at"][at])


def first_below(losses: Sequence[float], target: float) -> int | None:
    """The first step at which the median of the last 15 losses is at or below the target."""
    for i in range(SMOOTH - 1, len(losses)):
        window = losses[i - SMOOTH + 1 : i + 1]
        if all(map(math.isfinite, window)) and median(window) <= target:
            return i
    return None


def _arm(policy: dict[str, Any]) -> str:
    """What to call an arm that has no name: the policy, and its mode where it is a constant one."""
    target = policy.get("_target_")
    return "bare" if target is None else " ".join([target.rpartition(".")[2], *filter(None, [policy.get("mode")])])


def _twice(rows: Sequence[RunRow]) -> dict[tuple[str, str, int], RunRow]:
    """One row for each workload, arm and seed: a later folder takes the place of an earlier one."""
    return {(r.workload, r.arm, r.seed): r for r in rows}


def _json(path: Path) -> dict[str, Any]:
    try:
        d = json.loads(path.read_text())
    except FileNotFoundError as error:
        raise Skipped("not finished" if path.name == "metrics.json" else f"no {path.name}") from error
    except (OSError, ValueError) as error:
        raise Skipped(f"{path.name} cannot be read ({error})") from error
    if not isinstance(d, dict):
        raise Skipped(f"{path.name} holds no names and values")
    return d

"""One run as a page of Markdown: what came out, what was measured, what was done about it, what it cost."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from statistics import median
from typing import Any

from adaptive_opt.dashboard.log import OUTCOMES
from adaptive_opt.dashboard.status import status
from adaptive_opt.dashboard.words import WORDS, number
from adaptive_opt.records import Reading
from adaptive_opt.report.summary import Summary, summary

NUMBERS = ("kappa", "kappa_effective", "epsilon", "delta", "lambda_max", "lambda_min", "stability", "overshoot")
LEFT_OUT = ("schema", "treatments")


def report(run_dir: str | Path, metrics: Mapping[str, Any] | None = None) -> str:
    """The page of a run folder. Raises Unreadable where there is nothing to report."""
    s = summary(run_dir, metrics)
    parts = [_head(s), _outcome(s), _readings(s), _layers(s), _treatments(s), _notes(s)]
    return "\n\n".join(part for part in parts if part) + "\n"


def table(head: list[str], rows: list[list[str]]) -> str:
    """Markdown; a bar in a cell would end it."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)


def _head(s: Summary) -> str:
    versions = s.run.get("versions") or {}
    known = [
        f"seed {s.run['seed']}" if s.run.get("seed") is not None else "",
        f"started {s.run['started']}" if s.run.get("started") else "",
        f"torch {versions['torch']}" if versions.get("torch") else "",
        f"revision {s.run['git']}" if s.run.get("git") else "",
    ]
    labels = [str(label) for label in ((s.run.get("config") or {}).get(k) for k in ("workload", "arm")) if label]
    title = f"# {', '.join(labels) or s.name}"
    return "\n\n".join(part for part in (title, ", ".join(k for k in known if k)) if part)


def _outcome(s: Summary) -> str:
    said = status(s.reports).headline if s.reports else "The base optimizer alone: nothing was measured."
    rows = [[k, number(v)] for k, v in s.metrics.items() if k not in LEFT_OUT and not isinstance(v, (str, dict))]
    if not rows:
        rows = [["steps", f"{s.steps:,}"], ["training loss at the end", number(s.loss)]]
    return f"## Outcome\n\nAt the last step: {said}\n\n{table(['', 'value'], rows)}"


def _readings(s: Summary) -> str:
    full = [r for r in s.readings if r.kind == "full"]
    if not s.readings:
        return ""
    rows = [row for name in NUMBERS if (row := _row(s.readings, name))]
    count = f"{len(full)} full and {len(s.readings) - len(full)} cheap readings"
    spent = s.share("probe_cost")
    cost = "" if spent is None else f", {spent:.1%} of the gradient work"
    head = ["", "first", "median", "last", "what it says"]
    return f"## Readings\n\n{count}{cost}.\n\n{table(head, rows)}" if rows else f"## Readings\n\n{count}{cost}."


def _row(readings: list[Reading], name: str) -> list[str]:
    values = [v for r in readings if (v := getattr(r, name)) is not None]
    return [name, number(values[0]), number(median(values)), number(values[-1]), WORDS[name].says] if values else []


def _layers(s: Summary) -> str:
    with_layers = [r for r in s.readings if r.layers]
    if not with_layers:
        return ""
    first, last = with_layers[0], with_layers[-1]
    then = {layer.name: layer for layer in first.layers}
    rows = [
        [
            layer.name or "the model",
            number(then[layer.name].sigma_rms) if layer.name in then else "",
            number(layer.sigma_rms, layer.sigma_rms_error),
            number(layer.sigma_max),
            number(layer.gain),
        ]
        for layer in last.layers
    ]
    head = ["layer", f"sigma_rms at step {first.step:,}", f"at step {last.step:,}", "sigma_max", "gain"]
    return f"## Layers\n\n{table(head, rows)}"


def _treatments(s: Summary) -> str:
    if not s.reports:
        return ""
    if not s.log:
        return "## Treatments\n\nNone: there was no reason to."
    counts = ", ".join(f"{n} {OUTCOMES.get(outcome, outcome)}" for outcome, n in sorted(s.outcomes.items()))
    spent = s.share("treatment_cost")
    cost = "" if spent is None else f"; replays for them took {spent:.1%} of the gradient work"
    return f"## Treatments\n\n{counts}{cost}.\n\n" + "\n".join(_told(s))


def _told(s: Summary) -> Iterator[str]:
    for entry in s.log:
        yield f"- step {entry.event.step:,}, **{entry.event.name}**: {entry.words()}"


def _notes(s: Summary) -> str:
    return "## About the folder\n\n" + "\n".join(f"- {note}" for note in s.notes) if s.notes else ""

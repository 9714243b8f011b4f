"""Several runs side by side: where their configs differ, what was measured, what was done, what came out."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from statistics import median
from typing import Any

from adaptive_opt.dashboard.words import number
from adaptive_opt.report.single import table
from adaptive_opt.report.summary import Summary

KNOWN = ("schema", "steps", "treatments", "probing", "treatment", "train_loss")  # rows of their own, or no row


def compare(runs: Sequence[Summary]) -> str:
    """A Markdown table with a column a run; rows in which nothing is known are left out."""
    names = _names(runs)
    rows: list[list[str]] = []
    for label, value in (*_config(runs), *_numbers(runs)):
        cells = [value(s) for s in runs]
        if any(cells):
            rows.append([label, *(cell or "-" for cell in cells)])
    return table(["", *names], rows)


def _names(runs: Sequence[Summary]) -> list[str]:
    """The folders' names, numbered where two are the same."""
    names = [s.name for s in runs]
    return [f"{name} ({names[: i + 1].count(name)})" if names.count(name) > 1 else name for i, name in enumerate(names)]


def _config(runs: Sequence[Summary]) -> Iterator[tuple[str, Callable[[Summary], str]]]:
    """The keys in which the configs differ."""
    flat = {id(s): dict(_flat(s.run.get("config") or {})) for s in runs}
    keys = list(dict.fromkeys(key for d in flat.values() for key in d))
    for key in keys:
        if len({str(d.get(key)) for d in flat.values()}) > 1:
            yield key, lambda s, key=key: "" if flat[id(s)].get(key) is None else str(flat[id(s)][key])


def _flat(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in tree.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _numbers(runs: Sequence[Summary]) -> Iterator[tuple[str, Callable[[Summary], str]]]:
    yield "steps", lambda s: f"{s.steps:,}"
    yield "training loss at the end", lambda s: "not finite" if s.loss is None else number(s.loss)
    for key in dict.fromkeys(k for s in runs for k, v in s.metrics.items() if _number(v) and k not in KNOWN):
        yield key, lambda s, key=key: number(s.metrics[key]) if _number(s.metrics.get(key)) else ""
    yield "readings, full + cheap", _readings
    yield "kappa_effective, median", lambda s: _median(s, "kappa_effective")
    for name in ("epsilon", "delta", "stability"):
        yield f"{name}, last", lambda s, name=name: "" if s.last(name) is None else number(s.last(name))
    yield "treatments kept / taken back / done", _outcomes
    yield "probing, share of the gradient work", lambda s: _share(s, "probe_cost")
    yield "treatments' replays, likewise", lambda s: _share(s, "treatment_cost")
    yield "what is wrong with the folder", lambda s: "; ".join(s.notes)


def _number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _readings(s: Summary) -> str:
    full = sum(r.kind == "full" for r in s.readings)
    return f"{full} + {len(s.readings) - full}" if s.reports else ""


def _median(s: Summary, name: str) -> str:
    values = [v for r in s.readings if (v := getattr(r, name)) is not None]
    return number(median(values)) if values else ""


def _outcomes(s: Summary) -> str:
    return " / ".join(str(s.outcomes[outcome]) for outcome in ("kept", "reverted", "done")) if s.reports else ""


def _share(s: Summary, cost: str) -> str:
    share = s.share(cost)
    return "" if share is None else f"{share:.1%}"

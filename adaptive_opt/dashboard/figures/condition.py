"""The condition number: what is certified, what the steps feel, and where the rules act."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import median

import plotly.graph_objects as go

from adaptive_opt.dashboard.figures.style import (
    BLUE,
    GREY,
    SKY,
    VERMILLION,
    blank,
    having,
    limit,
    nothing,
    readings,
    series,
    ticks,
)
from adaptive_opt.diagnosis import Thresholds
from adaptive_opt.records import StepReport


def condition(reports: Sequence[StepReport]) -> go.Figure:
    """kappa and kappa_effective over the steps, with the median of three and the threshold of the rules.

    kappa is a bound and has no error; the band around the median is the range of the three readings it is taken from.
    """
    fig = blank(y="condition number", log=True)
    full = readings(reports, full=True)
    bound, felt = having(full, "kappa"), having(full, "kappa_effective")
    if not bound and not felt:
        return nothing(fig, "kappa comes with full readings, and this run has none yet")
    if felt:
        _trend(fig, [r.step for r in felt], [r.kappa_effective or 1.0 for r in felt])
    if bound:
        series(
            fig, [r.step for r in bound], [r.kappa for r in bound], "kappa", GREY, "kappa ≥", symbol="triangle-up", line="dot"
        )
    steps = [r.step for r in (*bound, *felt)]
    act = Thresholds().kappa_effective
    limit(fig, steps, act, f"the rules act above {act:g}", VERMILLION)
    return ticks(fig)


def _trend(fig: go.Figure, steps: list[int], values: list[float]) -> None:
    windows = [values[max(0, i - 2) : i + 1] for i in range(len(values))]
    low, high = [min(w) for w in windows], [max(w) for w in windows]
    fig.add_trace(
        go.Scatter(
            x=[*steps, *reversed(steps)],
            y=[*high, *reversed(low)],
            fill="toself",
            fillcolor="rgba(86,180,233,0.22)",
            line={"width": 0},
            name="range of three",
            hoverinfo="skip",
        )
    )
    series(fig, steps, values, "kappa_effective", SKY, line=None)
    series(fig, steps, [median(w) for w in windows], "kappa_effective", BLUE, "median of three", symbol="diamond")

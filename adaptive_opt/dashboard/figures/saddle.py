"""The saddle-point detector: how negative the curvature is, in how many directions, and where the loss stalled there."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import plotly.graph_objects as go

from adaptive_opt.dashboard.figures.style import (
    BLUE,
    GREEN,
    GREY,
    ORANGE,
    SKY,
    VERMILLION,
    axis,
    blank,
    having,
    limit,
    nothing,
    readings,
    series,
)
from adaptive_opt.dashboard.log import entries
from adaptive_opt.dashboard.words import lines
from adaptive_opt.diagnosis import Thresholds
from adaptive_opt.records import Condition, Reading, StepReport
from adaptive_opt.signals import Signals

NONE = 0.1  # where a count of zero is drawn


def saddle(reports: Sequence[StepReport]) -> go.Figure:
    """Above: lambda_min as a share of epsilon, with its error and the threshold. Below: delta, its estimate and error."""
    fig = blank()
    full = having(readings(reports, full=True), "lambda_min")
    full = [r for r in full if r.epsilon]
    if not full:
        return nothing(fig, "negative curvature is looked for in full readings, and this run has none yet")
    steps = [r.step for r in full]
    axis(fig, "yaxis", "% of epsilon", domain=[0.53, 1.0])
    axis(fig, "yaxis2", "directions", log=True, domain=[0.0, 0.43], anchor="x", **_counts(full))
    fig.update_layout(xaxis_anchor="y2")
    shares = [100 * (r.lambda_min or 0.0) / (r.epsilon or 1.0) for r in full]
    errors = [100 * (r.lambda_min_error or 0.0) / (r.epsilon or 1.0) for r in full]
    series(fig, steps, shares, "lambda_min", BLUE, "lambda_min", error=errors)
    threshold = Thresholds().negative
    limit(fig, steps, -100 * threshold, f"negative below -{threshold:.0%}")
    _saddles(fig, reports, full)
    counted = having(full, "delta_estimate")
    if counted:
        at, error = [r.step for r in counted], [r.delta_stderr for r in counted]
        series(fig, at, [r.delta_estimate for r in counted], "delta_estimate", SKY, error=error, symbol="square", line="dot",
               yaxis="y2", floor=NONE)  # fmt: skip
    delta = [r.delta for r in full]
    series(fig, steps, delta, "delta", ORANGE, "delta ≥", symbol="triangle-up", yaxis="y2", floor=NONE)
    return fig


def _counts(full: Sequence[Reading]) -> dict[str, Any]:
    """A logarithmic axis of counts that shows a zero: one estimate of thousands must not hide a certified three."""
    most = max([1.0, *((r.delta_estimate or 0.0) + (r.delta_stderr or 0.0) for r in full), *(r.delta or 0 for r in full)])
    decades = math.ceil(math.log10(most))
    every = max(1, math.ceil(decades / 3))
    tens = [10.0**k for k in range(0, decades + 1, every)]
    return {
        "tickvals": [NONE, *tens],
        "ticktext": ["0", *(f"{t:,.0f}" if t < 1e5 else f"{t:.0e}" for t in tens)],
        "range": [math.log10(NONE) - 0.15, math.log10(most) + 0.2],
    }


def stalled(reports: Sequence[StepReport]) -> bool:
    """Whether the loss stands still now, by the very signal that the controller asks, over the steps that are kept whole."""
    signals, steps = Signals(), reports[-200:]
    for i, r in enumerate(steps):
        if i and r.step != steps[i - 1].step + 1:
            signals = Signals()  # a gap: thinned out
        if any(e.name in ("escape", "rollback", "spectral") and e.outcome != "kept" for e in r.events):
            signals.forget()  # the parameters were moved
        trend = signals.judge(r.step, r.loss, r.grad_norm)
        if trend.finite and r.loss is not None:
            signals.remember(trend)
    return signals.judge(reports[-1].step, None, None).stalled if reports else False


def _saddles(fig: go.Figure, reports: Sequence[StepReport], full: Sequence[Reading]) -> None:
    """A mark where the diagnosis said saddle, with what came of it."""
    shares = {r.step: 100 * (r.lambda_min or 0.0) / (r.epsilon or 1.0) for r in full}
    found = [r.step for r in reports if r.diagnosis is not None and r.diagnosis.has(Condition.SADDLE) and r.step in shares]
    came = {e.event.step: e for e in entries(r for r in reports if r.events) if e.event.name == "escape"}
    for name, colour, symbol, chosen in (
        ("saddle: escaped", GREEN, "star", [s for s in found if s in came and came[s].event.outcome == "kept"]),
        ("saddle: taken back", VERMILLION, "x", [s for s in found if s in came and came[s].event.outcome == "reverted"]),
        ("saddle", GREY, "star-open", [s for s in found if s not in came or came[s].event.outcome not in ("kept", "reverted")]),
    ):
        if chosen:
            fig.add_trace(
                go.Scatter(
                    x=chosen,
                    y=[shares[s] for s in chosen],
                    mode="markers",
                    name=name,
                    marker={"color": colour, "symbol": symbol, "size": 13, "line": {"width": 1, "color": "#ffffff"}},
                    hovertemplate="step %{x:,} · "
                    + lines("the loss had stalled where curvature is negative: a saddle, or a ridge")
                    + "<extra></extra>",
                )
            )

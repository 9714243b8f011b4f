"""Several runs over each other: loss, the step against its limit, and the condition number that the steps feel."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape

import plotly.graph_objects as go

from adaptive_opt.dashboard.figures.style import (
    BLUE,
    GREEN,
    ORANGE,
    PURPLE,
    SKY,
    VERMILLION,
    axis,
    blank,
    having,
    nothing,
    readings,
    ticks,
)
from adaptive_opt.records import StepReport

COLOURS = (BLUE, VERMILLION, GREEN, ORANGE, PURPLE, SKY)
DASHES = ("solid", "dash", "dot", "dashdot", "longdash", "longdashdot")  # colour alone must not tell them apart
ROWS = (("yaxis", "loss", [0.7, 1.0]), ("yaxis2", "times the limit", [0.36, 0.64]), ("yaxis3", "kappa_effective", [0.0, 0.3]))


def compare(runs: Mapping[str, Sequence[StepReport]], height: int = 520) -> go.Figure:
    """One colour and dash a run, six runs at most: with more of them nobody tells them apart."""
    fig = blank(height)
    if not any(runs.values()):
        return nothing(fig, "none of these runs has logged a step yet")
    for name, title, domain in ROWS:
        axis(fig, name, title, log=True, domain=domain, anchor="x")
    fig.update_layout(xaxis_anchor="y3")
    for (name, reports), colour, dash in zip(runs.items(), COLOURS, DASHES, strict=False):
        felt, limit = (having(readings(reports), field) for field in ("kappa_effective", "stability"))
        known = [(r.step, r.loss) for r in reports if r.loss is not None and r.loss > 0]
        for i, (axis_name, points) in enumerate(
            (
                ("y", known),
                ("y2", [(r.step, r.stability) for r in limit]),
                ("y3", [(r.step, r.kappa_effective) for r in felt]),
            )
        ):
            fig.add_trace(
                go.Scatter(
                    x=[p[0] for p in points],
                    y=[p[1] for p in points],
                    yaxis=axis_name,
                    name=escape(name),
                    legendgroup=name,
                    showlegend=i == 0,
                    mode="lines" if i == 0 else "lines+markers",
                    line={"color": colour, "dash": dash, "width": 1.5},
                    marker={"size": 5},
                    text=[escape(name)] * len(points),
                    hovertemplate="%{text}<br>step %{x:,} · %{y:.3g}<extra></extra>",
                )
            )
    return ticks(fig)

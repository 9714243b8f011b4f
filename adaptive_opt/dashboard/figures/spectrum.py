"""The spectral density of the Hessian at the latest full reading: bulk, outliers, and the negative side."""

from __future__ import annotations

import math
from collections.abc import Sequence

import plotly.graph_objects as go

from adaptive_opt.dashboard.figures.style import BLUE, GREEN, GREY, ORANGE, VERMILLION, blank, nothing, readings
from adaptive_opt.dashboard.words import WORDS, lines, number
from adaptive_opt.records import Reading, StepReport

OUTLIER = 3.0  # root mean squares of the spectrum from zero: a spike beyond it stands apart from the bulk
WIDTH = 0.12  # of the smoothing, in units of the bent axis


def spectrum(reports: Sequence[StepReport]) -> go.Figure:
    """Ritz values as spikes, their weights smoothed to a density, on an axis that is linear near zero and bent beyond.

    Horizontal bars are the residuals: an eigenvalue lies within each. Values between plus and minus delta_tol * epsilon
    count as zero.
    """
    fig = blank(x="eigenvalue (axis bent: linear near 0)", y="share of eigenvalues", log=True)
    full = [r for r in readings(reports, full=True) if r.ritz_values and r.epsilon]
    if not full:
        return nothing(fig, "the spectrum comes with full readings, and this run has none yet")
    r = full[-1]
    zero = (r.delta_tol or 0.01) * (r.epsilon or 1.0)
    floor = min([w for w in r.ritz_weights if w > 1e-9] or [1e-9]) / 2
    _density(fig, r, zero, floor)
    _spikes(fig, r, zero, floor)
    reach = _bent(r.epsilon or 1.0, zero) * 1.12
    ends = _ticks(r.epsilon or 1.0, zero)
    low = min(_bent(min(r.ritz_values), zero) * 1.3, -reach * 0.2)
    fig.update_layout(
        xaxis={
            "tickvals": [_bent(t, zero) for t in ends if _bent(t, zero) >= low],
            "ticktext": [f"{t:.2g}" for t in ends if _bent(t, zero) >= low],
            "range": [low, reach],
        },
        yaxis={"range": [math.log10(floor), 0.3], "dtick": max(1, math.ceil(-math.log10(floor) / 5))},
    )
    for at, name in ((r.lambda_min_outer, "none below (99 %)"), (r.lambda_max_outer, "none above (99 %)")):
        if at is not None:
            fig.add_trace(
                go.Scatter(
                    x=[_bent(at, zero)] * 2, y=[floor, 1], mode="lines", name=name, line={"color": GREY, "dash": "dot"},
                    hovertemplate=f"{name}: {at:.3g}<extra></extra>",
                )
            )  # fmt: skip
            fig.update_layout(xaxis_range=[min(low, _bent(at, zero) * 1.1), max(reach, _bent(at, zero) * 1.1)])
    return fig


def outliers(r: Reading) -> list[float]:
    """The Ritz values that stand more than three root mean squares of the spectrum from zero."""
    rms = math.sqrt(sum(w * v * v for v, w in zip(r.ritz_values, r.ritz_weights, strict=False)))
    return [v for v in r.ritz_values if abs(v) > OUTLIER * rms]


def _bent(x: float, zero: float) -> float:
    return math.asinh(x / zero)


def _spikes(fig: go.Figure, r: Reading, zero: float, floor: float) -> None:
    far = set(outliers(r))
    residuals = r.ritz_residuals or (None,) * len(r.ritz_values)
    points = list(zip(r.ritz_values, r.ritz_weights, residuals, strict=False))
    for name, colour, symbol, which in (
        ("negative", VERMILLION, "triangle-down", lambda v: v < -zero),
        ("about zero", GREY, "circle", lambda v: abs(v) <= zero),
        ("bulk", BLUE, "circle", lambda v: v > zero and v not in far),
        ("outliers", ORANGE, "diamond", lambda v: v > zero and v in far),
    ):
        chosen = [p for p in points if which(p[0])]
        if not chosen:
            continue
        stems_x: list[float | None] = [x for v, _, _ in chosen for x in (_bent(v, zero), _bent(v, zero), None)]
        stems_y: list[float | None] = [y for _, w, _ in chosen for y in (floor, max(w, floor), None)]
        fig.add_trace(
            go.Scatter(x=stems_x, y=stems_y, mode="lines", line={"color": colour, "width": 1.5}, hoverinfo="skip",
                       showlegend=False)
        )  # fmt: skip
        up = [_bent(v + (e or 0), zero) - _bent(v, zero) for v, _, e in chosen]
        down = [_bent(v, zero) - _bent(v - (e or 0), zero) for v, _, e in chosen]
        fig.add_trace(
            go.Scatter(
                x=[_bent(v, zero) for v, _, _ in chosen],
                y=[max(w, floor) for _, w, _ in chosen],
                customdata=[[number(v, e), number(w)] for v, w, e in chosen],
                mode="markers",
                name=name,
                marker={"color": colour, "symbol": symbol, "size": 8},
                error_x={"type": "data", "array": up, "arrayminus": down, "color": colour, "thickness": 1.2, "width": 4},
                hovertemplate=f"step {r.step:,} · <b>%{{customdata[0]}}</b>, share %{{customdata[1]}}<br>"
                f"{lines(WORDS['spectrum'].says)}<extra>{name}</extra>",
            )
        )


def _density(fig: go.Figure, r: Reading, zero: float, floor: float) -> None:
    """The weights, each smoothed over the bent axis: a picture, not a measurement."""
    centres = [_bent(v, zero) for v in r.ritz_values]
    span = max(abs(c) for c in centres) * 1.12
    grid = [-span + 2 * span * i / 300 for i in range(301)]
    width = WIDTH * max(span / 3, 1.0)
    smooth = [
        sum(w * math.exp(-0.5 * ((x - c) / width) ** 2) for c, w in zip(centres, r.ritz_weights, strict=False)) for x in grid
    ]
    for sign, colour, fill in ((-1, VERMILLION, "rgba(213,94,0,0.18)"), (1, GREEN, "rgba(0,114,178,0.16)")):
        side = [(x, max(y, floor)) for x, y in zip(grid, smooth, strict=True) if x * sign >= 0]
        fig.add_trace(
            go.Scatter(
                x=[side[0][0], *(x for x, _ in side), side[-1][0]],
                y=[floor, *(y for _, y in side), floor],
                fill="toself",
                fillcolor=fill,
                line={"width": 0, "color": colour},
                mode="lines",
                hoverinfo="skip",
                showlegend=False,
            )
        )


def _ticks(epsilon: float, zero: float) -> list[float]:
    """0, the width of what counts as zero, and epsilon, on both sides, with one between."""
    right = [zero * 2, math.sqrt(zero * 2 * epsilon), epsilon]
    return [-t for t in reversed(right)] + [0.0] + right

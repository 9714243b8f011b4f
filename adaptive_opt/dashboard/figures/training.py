"""Loss and learning rate, with every treatment marked: kept, taken back, done, on trial."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from html import escape
from statistics import median

import numpy as np
import plotly.graph_objects as go

from adaptive_opt.dashboard.figures.style import BLUE, GREEN, GREY, ORANGE, PURPLE, SKY, VERMILLION, axis, blank, nothing, ticks
from adaptive_opt.dashboard.log import Entry, entries
from adaptive_opt.dashboard.words import WORDS, lines
from adaptive_opt.records import StepReport

MARKS = {  # outcome -> name, colour, symbol
    "kept": ("treatment kept", GREEN, "star"),
    "reverted": ("taken back", VERMILLION, "x"),
    "pending": ("on trial", VERMILLION, "circle-open"),
    "done": ("done", PURPLE, "diamond"),
}
SMOOTH = 15  # reports: the running median


def training(reports: Sequence[StepReport], height: int = 380) -> go.Figure:
    """Above the loss of single batches and its running median, below the learning rate; treatments on both."""
    fig = blank(height)
    if not reports:
        return nothing(fig, "no step was logged yet")
    known = [(r.step, r.loss) for r in reports if r.loss is not None]
    log = all(loss > 0 for _, loss in known) and bool(known)
    axis(fig, "yaxis", "loss", log, domain=[0.42, 1.0])
    axis(fig, "yaxis2", "learning rate", True, domain=[0.0, 0.36], anchor="x")
    fig.update_layout(xaxis_anchor="y2")
    _loss(fig, known)
    steps, lr = [r.step for r in reports], [r.lr for r in reports]
    held = [r.lr * r.lr_scale for r in reports]
    _curve(fig, steps, lr, "the user's lr", GREY, "dash", "lr", yaxis="y2")
    _curve(fig, steps, held, "effective lr", ORANGE, "solid", "lr", yaxis="y2")
    told = entries(r for r in reports if r.events)
    for outcome in MARKS:
        _marks(fig, [e for e in told if e.event.outcome == outcome], outcome, known, steps, held)
    return ticks(fig)


def _loss(fig: go.Figure, known: list[tuple[int, float]]) -> None:
    steps, losses = [s for s, _ in known], [x for _, x in known]
    smooth = [median(losses[max(0, i - SMOOTH + 1) : i + 1]) for i in range(len(losses))]
    _curve(fig, steps, losses, "loss", SKY, "solid", "loss", width=0.8, opacity=0.55)
    _curve(fig, steps, smooth, f"median of {SMOOTH}", BLUE, "solid", "loss")


def _curve(
    fig: go.Figure,
    x: list[int],
    y: list[float],
    name: str,
    colour: str,
    dash: str,
    word: str,
    width: float = 1.8,
    yaxis: str = "y",
    opacity: float = 1.0,
) -> None:
    fig.add_trace(
        go.Scatter(
            x=np.asarray(x),
            y=np.asarray(y, dtype=float),
            name=name,
            mode="lines",
            line={"color": colour, "width": width, "dash": dash},
            yaxis=yaxis,
            opacity=opacity,
            hovertemplate=f"step %{{x:,}} · <b>{name}</b> %{{y:.3g}}<br>{lines(WORDS[word].says)}<extra></extra>",
        )
    )


def _marks(
    fig: go.Figure, told: list[Entry], outcome: str, known: list[tuple[int, float]], steps: list[int], held: list[float]
) -> None:
    """At the step of the treatment, on the loss and on the learning rate."""
    if not told:
        return
    name, colour, symbol = MARKS[outcome]
    words = [lines(escape(f"{e.event.name}: {e.words()}"), 56) for e in told]
    at = [e.event.step for e in told]
    marker = {"color": colour, "symbol": symbol, "size": 12, "line": {"width": 1, "color": "#ffffff"}}
    if outcome == "pending":
        marker["line"] = {"width": 2.5, "color": colour}
    logged = [s for s, _ in known]
    losses = [known[max(0, bisect_right(logged, s) - 1)][1] for s in at] if known else []
    rates = [held[max(0, bisect_right(steps, s) - 1)] for s in at]
    for y, axis_name in ((losses, "y"), (rates, "y2")):
        if y:
            fig.add_trace(
                go.Scatter(
                    x=at, y=y, mode="markers", name=name, marker=marker, text=words, yaxis=axis_name, legendgroup=name,
                    showlegend=axis_name == "y", hovertemplate="step %{x:,} · %{text}<extra></extra>",
                )
            )  # fmt: skip

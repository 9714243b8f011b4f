"""What all figures share: colours that the colour-blind can tell apart, axes, hover labels, and what an empty one says."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from html import escape
from typing import Any

import plotly.graph_objects as go

from adaptive_opt.dashboard.words import WORDS, lines
from adaptive_opt.records import Reading, StepReport

# Okabe and Ito (2008)
BLUE, ORANGE, GREEN, VERMILLION, SKY, PURPLE = "#0072B2", "#E69F00", "#009E73", "#D55E00", "#56B4E9", "#CC79A7"
GREY = "#808890"
INK, GRID = "#5b6470", "rgba(128,136,144,0.28)"  # the page's style sheet replaces INK by the theme's own
HEIGHT = 250


def blank(height: int = HEIGHT, x: str = "step", y: str = "", log: bool = False) -> go.Figure:
    """An empty figure in the house style: transparent, so that it stands on light and on dark."""
    hover = {"bgcolor": "#20262e", "bordercolor": "#20262e", "font": {"color": "#ffffff", "size": 12}, "align": "left"}
    return go.Figure(
        layout={
            "template": "none",
            "height": height,
            "margin": {"l": 56, "r": 12, "t": 8, "b": 42},  # fixed: measuring the labels draws everything twice
            "paper_bgcolor": "rgba(0,0,0,0)",
            "plot_bgcolor": "rgba(0,0,0,0)",
            "font": {"family": "system-ui, sans-serif", "size": 12, "color": INK},
            "hoverlabel": hover,
            "legend": {"orientation": "h", "x": 0, "y": 1.02, "yanchor": "bottom", "font": {"size": 11}, "itemwidth": 30},
            "hovermode": "closest",
            "uirevision": "kept",  # a new line must not undo the reader's zoom
            "xaxis": _axis(x),
            "yaxis": _axis(y, log),
        }
    )


def axis(fig: go.Figure, name: str, title: str = "", log: bool = False, **more: Any) -> None:
    """Another axis in the house style."""
    fig.update_layout({name: _axis(title, log, **more)})


def _axis(title: str, log: bool = False, **more: Any) -> dict[str, Any]:
    return {
        "title": {"text": title, "standoff": 6, "font": {"size": 11}},
        "type": "log" if log else "linear",
        "gridcolor": GRID,
        "zeroline": False,
        "linecolor": GRID,
        "tickfont": {"size": 10 if log else 11},  # plotly draws powers a quarter larger
        "exponentformat": "power",
        "nticks": 6,
        **more,
    }


def ticks(fig: go.Figure) -> go.Figure:
    """Whole powers of ten on logarithmic axes where there are enough of them, else 1, 2 and 5 written out."""
    traces: Any = fig.data
    for axis in fig.select_yaxes(lambda a: a.type == "log"):
        mine = axis.plotly_name.replace("axis", "")
        mine = [t.y for t in traces if (t.yaxis or "y") == mine and t.y is not None]
        values = [math.log10(y) for ys in mine for y in ys if y is not None and y > 0]
        low, high = (min(values), max(values)) if values else (-1.0, 1.0)
        if high - low > 1.5:
            axis.dtick = max(1, math.ceil((high - low) / 4))
        else:
            axis.tickvals = [m * 10.0**k for k in range(math.floor(low) - 1, math.ceil(high) + 1) for m in (1, 2, 5)]
            axis.ticktext = [f"{t:.1g}" for t in axis.tickvals]
            middle, half = (low + high) / 2, max((high - low) / 2 * 1.15, 0.35)
            axis.range = [middle - half, middle + half]
    return fig


def series(
    fig: go.Figure,
    x: Sequence[Any],
    y: Sequence[Any],
    word: str,
    colour: str,
    name: str | None = None,
    error: Sequence[float | None] | None = None,
    symbol: str = "circle",
    line: str | None = "solid",
    floor: float | None = None,
    yaxis: str = "y",
) -> None:
    """One number over the steps, with its error bars, and a hover that says what it is and what it is not.

    floor: where smaller values are drawn, on a logarithmic axis that shall show a zero.
    """
    says = WORDS[word]
    unit = f" {escape(says.unit)}" if says.unit not in ("", "at least", "at most") else ""
    bound = {"at least": "≥ ", "at most": "≤ "}.get(says.unit, "")
    spread = " ± %{error_y.array:.2g}" if error is not None else ""
    fig.add_trace(
        go.Scatter(
            x=list(x),
            y=[v if v is None or floor is None else max(v, floor) for v in y],
            name=escape(name or says.label),
            mode="markers" if line is None else "lines+markers",
            marker={"color": colour, "symbol": symbol, "size": 6},
            line={"color": colour, "width": 1.6, "dash": line or "solid"},
            error_y=bars(error, colour),
            yaxis=yaxis,
            customdata=list(y),
            hovertemplate=f"step %{{x:,}} · <b>{says.label}</b> {bound}%{{customdata:.3g}}{spread}{unit}<br>{lines(says.says)}"
            "<extra></extra>",
        )
    )


def bars(error: Sequence[float | None] | None, colour: str) -> dict[str, Any] | None:
    """Error bars, none where there is no error."""
    if error is None:
        return None
    return {"type": "data", "array": [0.0 if e is None else e for e in error], "color": colour, "thickness": 1.2, "width": 3}


def limit(fig: go.Figure, x: Sequence[float], at: float, name: str, colour: str = GREY, dash: str = "dash") -> None:
    """A threshold over the width of the data, named in the legend, where it can overlap nothing."""
    ends = [min(x), max(x)] if x else []
    if ends and ends[0] == ends[1]:
        ends = [ends[0] - 1, ends[1] + 1]
    fig.add_trace(
        go.Scatter(
            x=ends,
            y=[at] * len(ends),
            name=name,
            mode="lines",
            line={"color": colour, "width": 1.4, "dash": dash},
            hovertemplate=f"{name}<extra></extra>",
        )
    )


def nothing(fig: go.Figure, why: str) -> go.Figure:
    """Says in the middle of an empty figure that nothing was measured, and why."""
    fig.update_layout(xaxis_visible=False, yaxis_visible=False, showlegend=False)
    fig.add_annotation(
        text=lines(f"not measured: {escape(why)}", 40), x=0.5, y=0.5, xref="paper", yref="paper", showarrow=False, font_size=13
    )
    return fig


def readings(reports: Iterable[StepReport], full: bool = False) -> list[Reading]:
    """The readings, or the full ones, oldest first."""
    return [r.reading for r in reports if r.reading is not None and (not full or r.reading.kind == "full")]


def having(readings: Iterable[Reading], name: str) -> list[Reading]:
    """Those in which a number was measured."""
    return [r for r in readings if getattr(r, name) is not None]

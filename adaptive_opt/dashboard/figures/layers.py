"""Each layer's factor on the signal over the steps: a map in which white (or grey) keeps the signal."""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape

import plotly.graph_objects as go

from adaptive_opt.dashboard.figures.style import HEIGHT, blank, nothing, readings
from adaptive_opt.dashboard.words import WORDS, lines, number
from adaptive_opt.diagnosis import Thresholds
from adaptive_opt.records import LayerReading, StepReport

MAP = [[0.0, "#0072B2"], [0.25, "#56B4E9"], [0.5, "#d9d9d9"], [0.75, "#E69F00"], [1.0, "#D55E00"]]  # Okabe and Ito's ends
NAME = 14  # characters of a layer's name on the axis


def layers(reports: Sequence[StepReport]) -> go.Figure:
    """sigma_rms of every layer, on a logarithmic scale of colours from 1/10 (blue) to 10 (orange)."""
    fig = blank(HEIGHT)
    seen = [r for r in readings(reports) if r.layers]
    if not seen:
        return nothing(fig, "layers come with the first reading and with full ones, on a model whose layers are called")
    names = list(dict.fromkeys(layer.name for r in seen for layer in r.layers))
    table = [{layer.name: layer for layer in r.layers} for r in seen]
    rows = [[_colour(t.get(name)) for t in table] for name in names]
    hover = [[_says(name, t.get(name)) for t in table] for name in names]
    fig.add_trace(
        go.Heatmap(
            x=[f"{r.step:,}" for r in seen],  # one column a reading: what lies between was not measured
            y=list(range(len(names))),
            z=rows,
            text=hover,
            colorscale=MAP,
            zmin=-1,
            zmax=1,
            xgap=1 if len(seen) <= 40 else 0,
            ygap=1,
            hovertemplate=f"step %{{x}} · %{{text}}<br>{lines(WORDS['sigma_rms'].says)}<extra></extra>",
            colorbar={
                "thickness": 9, "tickvals": [-1, 0, 1], "ticktext": ["≤0.1", "1", "≥10"], "tickfont": {"size": 10}, "len": 1.0,
                "outlinewidth": 0,
            },
        )
    )  # fmt: skip
    every = math.ceil(len(names) / 13)
    shown = list(range(0, len(names), every))
    fig.update_layout(
        margin_l=8,
        xaxis={"type": "category", "nticks": 5, "tickangle": 0, "showgrid": False},
        yaxis={
            "tickvals": shown, "ticktext": [escape(_short(names[i])) for i in shown], "tickfont": {"size": 10},
            "autorange": "reversed", "showgrid": False, "automargin": True,
        },
    )  # fmt: skip
    return fig


def worst(reports: Sequence[StepReport]) -> LayerReading | None:
    """The layer that is furthest from keeping the signal, in the latest reading that has layers."""
    seen = [r for r in readings(reports) if r.layers]
    return max(seen[-1].layers, key=lambda layer: layer.distance) if seen else None


def worries(layer: LayerReading) -> bool:
    return layer.distance > math.log(Thresholds().layer_band)


def called(name: str) -> str:
    """A model that is one layer has a layer without a name."""
    return name or "the model itself"


def _short(name: str) -> str:
    name = called(name)
    return name if len(name) <= NAME else f"{name[:5]}…{name[-(NAME - 6) :]}"


def _colour(layer: LayerReading | None) -> float | None:
    if layer is None:
        return None
    return math.log10(layer.sigma_rms) if layer.sigma_rms > 0 else -9.0


def _says(name: str, layer: LayerReading | None) -> str:
    if layer is None:
        return f"{escape(called(name))}: not measured"
    parts = [
        f"<b>{escape(called(name))}</b> ({escape(layer.kind)})",
        f"sigma_rms {number(layer.sigma_rms, layer.sigma_rms_error)}",
        f"sigma_max ≥ {number(layer.sigma_max, layer.sigma_max_error)}",
        f"sigma_min ≤ {number(layer.sigma_min, layer.sigma_min_error)}",
        f"gradient gain {number(layer.gain)}",
    ]
    if layer.drift is not None:
        parts.append(f"{math.exp(max(-700.0, min(layer.drift, 700.0))):.3g} times what it was at first")
    return "<br>".join(parts)

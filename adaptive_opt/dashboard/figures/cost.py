"""What probing and treatments have cost so far, against the run's own gradient work."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import plotly.graph_objects as go

from adaptive_opt.dashboard.figures.style import BLUE, ORANGE, blank, nothing
from adaptive_opt.dashboard.words import WORDS, lines
from adaptive_opt.records import StepReport


def cost(reports: Sequence[StepReport], height: int = 380) -> go.Figure:
    """Gradient-equivalents a step, spent up to each step, in percent of one gradient."""
    fig = blank(height, y="% of gradient work")
    if not reports:
        return nothing(fig, "no step was logged yet")
    steps = np.asarray([r.step for r in reports])
    for word, colour, dash, spent in (
        ("probing", BLUE, "solid", [r.probe_cost for r in reports]),
        ("treatment", ORANGE, "dash", [r.treatment_cost for r in reports]),
    ):
        fig.add_trace(
            go.Scatter(
                x=steps,
                y=100 * np.asarray(spent) / (steps + 1),
                name=WORDS[word].label,
                mode="lines",
                line={"color": colour, "width": 1.8, "dash": dash},
                hovertemplate="up to step %{x:,} · <b>%{y:.3g} %</b> " + f"{WORDS[word].label}<br>"
                f"{lines(WORDS[word].says)}<extra></extra>",
            )
        )
    settled = max(20, reports[-1].step // 10)
    late = [100 * max(r.probe_cost, r.treatment_cost) / (r.step + 1) for r in reports if r.step >= settled]
    if late:
        fig.update_layout(yaxis_range=[0, 1.15 * max(*late, 1.0)])  # the first readings are financed by the steps to come
    return fig

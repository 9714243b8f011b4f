"""Reports in, a Plotly figure out: pure, one figure a file. The page, the export and whoever logs figures use the same.

Every function takes a sequence of StepReports by step, as `read_reports` or `Run.reports` gives them, and returns a
`plotly.graph_objects.Figure`. What was not measured says so inside the figure.
"""

from __future__ import annotations

from collections.abc import Sequence

import plotly.graph_objects as go

from adaptive_opt.dashboard.figures.compare import compare
from adaptive_opt.dashboard.figures.condition import condition
from adaptive_opt.dashboard.figures.cost import cost
from adaptive_opt.dashboard.figures.layers import layers
from adaptive_opt.dashboard.figures.lipschitz import lipschitz
from adaptive_opt.dashboard.figures.saddle import saddle
from adaptive_opt.dashboard.figures.sharpness import sharpness
from adaptive_opt.dashboard.figures.spectrum import spectrum
from adaptive_opt.dashboard.figures.training import training
from adaptive_opt.records import StepReport

__all__ = ["compare", "condition", "cost", "layers", "lipschitz", "saddle", "sharpness", "six", "spectrum", "training"]


def six(reports: Sequence[StepReport]) -> dict[str, go.Figure]:
    """The six panels by name: what a logger writes in one go. wandb.log takes the figures as they are."""
    draw = (condition, spectrum, saddle, layers, sharpness, lipschitz)
    return {f.__name__: f(reports) for f in draw}

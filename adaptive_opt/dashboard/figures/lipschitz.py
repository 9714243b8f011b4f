"""End to end: how much the model can stretch a change of its input at most, and how much it does on the batch."""

from __future__ import annotations

from collections.abc import Sequence

import plotly.graph_objects as go

from adaptive_opt.dashboard.figures.style import BLUE, ORANGE, blank, having, nothing, readings, series, ticks
from adaptive_opt.records import StepReport


def lipschitz(reports: Sequence[StepReport]) -> go.Figure:
    """The chain rule's bound, and the local norm of the whole Jacobian with its error."""
    fig = blank(y="stretching, at most / at least", log=True)
    seen = readings(reports)
    bound, local = having(seen, "lipschitz_bound"), having(seen, "lipschitz_local")
    if not bound and not local:
        return nothing(fig, why(reports))
    if bound:
        series(fig, [r.step for r in bound], [r.lipschitz_bound for r in bound], "lipschitz_bound", ORANGE, "bound ≤",
               symbol="triangle-down", line="dot")  # fmt: skip
    if local:
        steps, error = [r.step for r in local], [r.lipschitz_local_error for r in local]
        series(fig, steps, [r.lipschitz_local for r in local], "lipschitz_local", BLUE, "local ≥", error=error)
    return ticks(fig)


def why(reports: Sequence[StepReport]) -> str:
    """Why there is none."""
    told = [note for r in reversed(readings(reports)) for note in r.notes if note.startswith("lipschitz")]
    return told[0].partition(": ")[2] if told else "no reading of this run holds the whole model's Jacobian"

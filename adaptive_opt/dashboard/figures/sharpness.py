"""The step against its stability limit, and the score that it makes."""

from __future__ import annotations

from collections.abc import Sequence

import plotly.graph_objects as go

from adaptive_opt.dashboard.figures.style import (
    BLUE,
    GREEN,
    GREY,
    PURPLE,
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
from adaptive_opt.records import Reading, StepReport


def sharpness(reports: Sequence[StepReport]) -> go.Figure:
    """stability with its error and overshoot over the steps, both of the user's own step, with edge and threshold.

    Where the effective learning rate is not the user's, the stability of the step as it is taken is drawn beside it.
    """
    fig = blank(y="times the limit", log=True)
    seen = [r for r in having(readings(reports), "stability") if (r.stability or 0) > 0]
    if not seen:
        return nothing(fig, why(reports))
    steps = [r.step for r in seen]
    over = [r for r in having(seen, "overshoot") if (r.overshoot or 0) > 0]
    if over:
        series(fig, [r.step for r in over], [r.overshoot for r in over], "overshoot", PURPLE, symbol="square", line="dot")
    series(fig, steps, [r.stability for r in seen], "stability", BLUE, error=[r.stability_error for r in seen])
    held = [
        (r.step, r.reading.stability * r.lr_scale) for r in reports if r.lr_scale != 1 and r.reading and r.reading.stability
    ]
    if held:
        series(fig, [s for s, _ in held], [v for _, v in held], "stability", GREEN, "as held", symbol="diamond", line=None)
    limit(fig, steps, 1.0, "edge of stability", GREY, "dot")
    unstable = Thresholds().unstable
    limit(fig, steps, unstable, f"the rules look above {unstable:g}", VERMILLION)
    return ticks(fig)


def why(reports: Sequence[StepReport]) -> str:
    """Why there is no stability."""
    told = [note for r in readings(reports)[-1:] for note in r.notes if note.startswith("stability")]
    if told:
        return told[0].partition(": ")[2]
    return "the readings of this run do not hold it" if readings(reports) else "this run has no reading yet"


def advice(r: Reading, lr: float) -> str:
    """What the score implies, in words; `lr` is the user's, which `stability` belongs to."""
    if r.stability is None:
        return "No advice: the step's stability was not measured."
    t, s = Thresholds(), r.stability
    if s > t.unstable and (r.overshoot or 0) > 1:
        return f"Too far: {s:.3g} times the limit, and this step overshoots. Lower the learning rate below {lr / s:.2g}."
    if s > t.unstable:
        return f"Above the limit of {lr / s:.2g}, but this step does not overshoot: healthy starts look so. Watch the loss."
    if s > t.sharp:
        return "At the edge of stability: normal, and no alarm. A flatter minimum would need a validation loss and SAM."
    return f"Room: the step is at {100 * s:.2g} % of its limit, which would be a learning rate of {lr / s:.2g} on this batch."

"""A run as one HTML file that needs nothing else: figures, numbers, log, style and Plotly's own script inside."""

from __future__ import annotations

import json
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Any

from dash import html
from plotly.offline import get_plotlyjs

from adaptive_opt.dashboard import content
from adaptive_opt.dashboard.page import ASSETS, GRAPH
from adaptive_opt.dashboard.panels import BELOW, PANELS, Panel
from adaptive_opt.dashboard.render import to_html
from adaptive_opt.dashboard.run import Run
from adaptive_opt.dashboard.status import status
from adaptive_opt.records import StepReport

POLICY = "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; img-src data: blob:; font-src data:"
FRAME = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="{policy}">
<title>{title}</title>
<style>{style}</style>
<script>{plotly}</script>
</head>
<body>
{body}
<script>{figures}</script>
<script>{keys}</script>
</body>
</html>
"""
DRAW = """
Promise.all([{calls}]).then(() => {{ document.documentElement.dataset.drawn = document.documentElement.scrollHeight; }});
"""


def export(run: Run, name: str, path: str | Path) -> None:
    """Write what is kept of a run to `path`. Raises OSError when it cannot be written."""
    Path(path).write_text(document(run, name), encoding="utf-8")


def document(run: Run, name: str) -> str:
    """The whole file as text."""
    reports = run.reports
    state = status(reports)
    drawn = {p.key: p.draw(reports) for p in (*PANELS, *BELOW)}
    last = f" · as it was at step {run.until:,}" if run.until is not None else ""
    body = html.Div(
        [
            html.Header([html.H1("adaptive_opt"), html.P(name, className="name")]),
            html.Div(content.bar(state), id="status", className=f"status {state.light}", role="status"),
            html.P(content.facts(reports, run.lines, run.notes) + last, className="facts"),
            html.Main(
                [
                    html.Div([_section(p, i, reports, drawn[p.key]) for i, p in enumerate(PANELS, 1)], className="six"),
                    html.Div(
                        [
                            *(_section(p, i, reports, drawn[p.key]) for i, p in enumerate(BELOW, 7)),
                            content.logbook(content.log(reports)),
                        ],
                        className="below",
                    ),
                ]
            ),
            content.help_text(),
        ],
        className="page",
    )
    calls = ",\n".join(f'Plotly.newPlot("graph-{key}", {figure_json(content.bare(figure))})' for key, figure in drawn.items())
    return FRAME.format(
        policy=escape(POLICY),
        title=escape(f"adaptive_opt: {name}"),
        style=(ASSETS / "dashboard.css").read_text(encoding="utf-8"),
        plotly=get_plotlyjs(),
        body=to_html(body),
        figures=DRAW.format(calls=calls),
        keys=(ASSETS / "dashboard.js").read_text(encoding="utf-8"),
    )


def figure_json(figure: Any) -> str:
    """A figure with its configuration as JSON that can stand in a script: no text in it can end the script."""
    plain = json.loads(figure.to_json())
    text = json.dumps({"data": plain["data"], "layout": plain["layout"], "config": GRAPH})
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026").replace("\u2028", "\\u2028")


def _section(panel: Panel, number: int, reports: Sequence[StepReport], figure: Any) -> Any:
    graph = html.Div(id=f"graph-{panel.key}", className="graph")
    chips, legend = content.chips(panel.chips(reports)), content.legend(figure)
    return content.section(panel, number, graph, chips, legend, panel.note(reports))

"""The live page: a Dash app that asks once a second whether the run has gone on, and draws only then."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dash import Dash, Input, Output, State, dcc, html, no_update
from dash.exceptions import PreventUpdate
from flask import request

from adaptive_opt.dashboard import content, figures
from adaptive_opt.dashboard.follower import Follower
from adaptive_opt.dashboard.panels import BELOW, PANELS, Panel
from adaptive_opt.dashboard.status import Status, status
from adaptive_opt.records import StepReport

EVERY = 1000  # milliseconds between questions
COMPARED = 6
ASSETS = Path(__file__).parent / "assets"
GRAPH: Any = {"displayModeBar": False, "responsive": True}
PAGE = """<!DOCTYPE html>
<html lang="en">
<head>{%metas%}<title>{%title%}</title>{%favicon%}{%css%}</head>
<body>{%app_entry%}<footer>{%config%}{%scripts%}{%renderer%}</footer></body>
</html>"""


def page(follower: Follower, first: str | None = None) -> Dash:
    """The app over a folder's runs; `first` is the one shown at first, else the newest."""
    app = Dash(
        "adaptive_opt",
        title="adaptive_opt",
        update_title="",
        serve_locally=True,
        assets_folder=str(ASSETS),
        index_string=PAGE,
        meta_tags=[{"name": "viewport", "content": "width=device-width, initial-scale=1"}],
        add_log_handler=False,
    )
    app.layout = lambda: layout(follower, first)
    _callbacks(app, follower)

    @app.server.before_request
    def _opened() -> None:
        if request.path == "/":
            follower.opened()

    return app


@dataclass(frozen=True)
class View:
    """A run as far as it has been read; `now` is what a page remembers of what it shows."""

    state: Status
    reports: Sequence[StepReport]
    facts: str
    now: list[Any]  # name, version, what is still to be read, number of readings and events


def look(follower: Follower, name: str | None) -> View:
    """The run of that name; in words what is wrong when there is none."""
    try:
        run = follower.get(name or "")
    except ValueError as error:
        why = f"NO RUN: {error}" if name else f"NO RUN YET in {follower.runs.folder}: waiting for a steps.jsonl"
        return View(Status("grey", why), (), "", [name, -1, 0.0, -1])
    now = [name, run.version, run.tail.behind, run.told]
    reports = run.reports
    return View(status(reports), reports, content.facts(reports, run.lines, run.notes, run.tail.behind), now)


def layout(follower: Follower, first: str | None) -> Any:
    """The whole page as it is now; the callbacks go on with it."""
    names = follower.names()
    chosen = first or (names[0] if names else None)
    view = look(follower, chosen)
    filled = [_filled(p, i, view.reports) for i, p in enumerate((*PANELS, *BELOW), 1)]  # drawn once, not empty and again
    return html.Div(
        [
            html.A("to the numbers", href="#panel-condition", className="skip"),
            html.Header(
                [
                    html.H1("adaptive_opt"),
                    html.Div(
                        [
                            _chooser(
                                "run", "run", dcc.Dropdown(id="run", options=_options(follower), value=chosen, clearable=False)
                            ),
                            _chooser(
                                "compared", "compare with", dcc.Dropdown(id="compared", options=_options(follower), multi=True)
                            ),
                            html.Button("pause", id="pause", title="stop asking for new lines (key P)"),
                        ],
                        className="choosers",
                    ),
                ]
            ),
            html.Div(
                content.bar(view.state),
                id="status",
                className=f"status {view.state.light}",
                role="status",
                **{"aria-live": "polite"},  # type: ignore[arg-type]
            ),
            html.P([html.Span(view.facts, id="facts"), html.Span(id="age")], className="facts"),
            html.Main(
                [
                    html.Div(filled[: len(PANELS)], className="six"),
                    html.Section(
                        [
                            html.H2("Compared", id="title-compare"),
                            html.Div(className="legend", id="legend-compare"),
                            _graph("compare", figures.compare({})),
                        ],
                        id="panel-compare",
                        className="panel compare",
                        hidden=True,
                        **{"aria-labelledby": "title-compare"},  # type: ignore[arg-type]
                    ),
                    html.Div(
                        [*filled[len(PANELS) :], content.logbook(content.log(view.reports))],
                        className="below",
                    ),
                ]
            ),
            content.help_text(),
            dcc.Interval(id="tick", interval=EVERY),
            dcc.Store(id="shown", data=view.now),
        ],
        className="page",
    )


def _chooser(name: str, label: str, dropdown: Any) -> Any:
    return html.Div([html.Label(label, htmlFor=name), dropdown], className=f"chooser {name}")


def _filled(panel: Panel, number: int, reports: Sequence[StepReport]) -> Any:
    figure = panel.draw(reports)
    chips, legend = content.chips(panel.chips(reports)), content.legend(figure)
    return content.section(panel, number, _graph(panel.key, figure), chips, legend, panel.note(reports))


def _graph(key: str, figure: Any) -> Any:
    """Of a fixed height: a figure that takes its height from a panel that takes its height from the figure may have none."""
    height = {"height": f"{figure.layout.height}px"}
    return dcc.Graph(id=f"graph-{key}", figure=content.bare(figure), config=GRAPH, className="graph", style=height)


def _options(follower: Follower) -> list[dict[str, str]]:
    return [{"label": follower.runs.label(name), "value": name} for name in follower.names()]


def _callbacks(app: Dash, follower: Follower) -> None:
    every = (*PANELS, *BELOW)

    @app.callback(
        Output("status", "children"),
        Output("status", "className"),
        Output("facts", "children"),
        Output("log", "children"),
        *(Output(f"graph-{p.key}", "figure") for p in every),
        *(Output(f"chips-{p.key}", "children") for p in every),
        *(Output(f"legend-{p.key}", "children") for p in every),
        *(Output(f"note-{p.key}", "children") for p in every),
        Output("shown", "data"),
        Input("tick", "n_intervals"),
        Input("run", "value"),
        State("shown", "data"),
    )
    def draw(_tick: int | None, name: str | None, shown: Sequence[Any] | None) -> tuple[Any, ...]:
        """Everything about the chosen run, if it has gone on since it was drawn."""
        view = look(follower, name)
        before = list(shown or (None,) * 4)
        if before == view.now:
            raise PreventUpdate
        same = before[0] == name and before[3] == view.now[3]  # no reading came: the six need not be drawn again
        drawn = {p.key: p.draw(view.reports) for p in (BELOW if same else every)}

        def fresh(p: Panel) -> bool:
            return p.key in drawn or p.key in ("saddle", "sharpness")  # a stall and a held step change without a reading

        return (
            content.bar(view.state),
            f"status {view.state.light}",
            view.facts,
            no_update if same else content.log(view.reports),
            *(content.bare(drawn[p.key]) if p.key in drawn else no_update for p in every),
            *(content.chips(p.chips(view.reports)) if fresh(p) else no_update for p in every),
            *(content.legend(drawn[p.key]) if p.key in drawn else no_update for p in every),
            *(p.note(view.reports) if fresh(p) else no_update for p in every),
            view.now,
        )

    @app.callback(
        Output("age", "children"),
        Output("run", "options"),
        Output("compared", "options"),
        Output("run", "value"),
        Input("tick", "n_intervals"),
        State("run", "options"),
        State("run", "value"),
    )
    def look_around(_tick: int | None, known: list[Any], name: str | None) -> tuple[Any, ...]:
        """How old the last line is, and runs that have come since."""
        options = _options(follower)
        new = options if options != known else no_update
        value = options[0]["value"] if name is None and options else no_update
        return age(follower, name), new, new, value

    @app.callback(
        Output("graph-compare", "figure"),
        Output("legend-compare", "children"),
        Output("panel-compare", "hidden"),
        Input("tick", "n_intervals"),
        Input("run", "value"),
        Input("compared", "value"),
        State("graph-compare", "figure"),
    )
    def compare(_tick: int | None, name: str | None, others: list[str] | None, drawn: Any) -> tuple[Any, ...]:
        """The chosen runs over each other; hidden while none is chosen."""
        names = [n for n in dict.fromkeys([name, *(others or [])]) if n in follower.names()][:COMPARED]
        if not others or not names:
            return no_update, no_update, True
        runs = {n: follower.get(n) for n in names}
        mark = "/".join(f"{n}:{run.version}" for n, run in runs.items())
        if drawn and drawn["layout"].get("meta") == mark:
            raise PreventUpdate
        fig = figures.compare({follower.runs.label(n): run.reports for n, run in runs.items()})
        return content.bare(fig).update_layout(meta=mark), content.legend(fig), False

    @app.callback(
        Output("tick", "disabled"),
        Output("pause", "children"),
        Input("pause", "n_clicks"),
        prevent_initial_call=True,
    )
    def pause(clicks: int) -> tuple[bool, str]:
        """Stop, and go on."""
        return clicks % 2 == 1, "go on" if clicks % 2 else "pause"


def age(follower: Follower, name: str | None) -> str:
    """How long ago the file was written to: a run that ended and one that hangs look alike."""
    try:
        written = follower.get(name or "").tail.written
    except ValueError:
        return ""
    if written is None or follower.until is not None:
        return f" · as it was at step {follower.until:,}" if follower.until is not None else ""
    seconds = max(0, int(time.time() - written))
    if seconds < 60:
        return f" · last line {seconds} s ago"
    ago = f"{seconds // 60} min" if seconds < 7200 else f"{seconds // 3600} h"
    return f" · last line {ago} ago: the run has ended, or hangs"

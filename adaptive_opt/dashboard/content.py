"""A run as page components: the same tree is served live and written into the export. Text is text: nothing is markup."""

from __future__ import annotations

from collections.abc import Sequence
from html import unescape
from typing import Any

from dash import html

from adaptive_opt.dashboard.log import OUTCOMES, entries
from adaptive_opt.dashboard.panels import Chip, Panel
from adaptive_opt.dashboard.status import Status
from adaptive_opt.dashboard.words import number
from adaptive_opt.records import StepReport

SHOWN = 200  # events in the log
GLYPHS = {
    "circle": "●", "triangle-up": "▲", "triangle-down": "▼", "square": "■", "diamond": "◆", "star": "★", "star-open": "☆",
    "x": "✖", "circle-open": "○",
}  # fmt: skip
MARKS = {"kept": "✓", "reverted": "✗", "done": "◆", "pending": "○"}


def bar(status: Status) -> list[Any]:
    """The inside of the status bar: the light in a word too, the headline, and the other alerts."""
    headed = next((a for a in status.alerts if a.sentence() == status.headline), None)
    when = [] if headed is None else [html.Span(f"step {headed.step:,}", className="when")]
    others = [a for a in status.alerts if a.sentence() != status.headline]
    rest = html.Ul(
        [html.Li([html.B(f"step {a.step:,} "), a.sentence()], className=a.light) for a in others], className="alerts"
    )
    return [
        html.Div([html.Span(status.light.upper(), className="light"), *when, html.Span(status.headline, className="headline")]),
        *([rest] if others else []),
    ]


def facts(reports: Sequence[StepReport], lines: int, notes: Sequence[str], behind: float = 0.0) -> str:
    """The line below the status bar."""
    reading = [f"still reading the file: {1 - behind:.0%}"] if behind > 0.001 else []
    if not reports:
        return " · ".join([*reading, *notes])
    r = reports[-1]
    parts = [
        f"step {r.step:,}",
        f"loss {number(r.loss)}",
        f"mode {r.mode}",
        f"lr {number(r.lr * r.lr_scale)}",
        f"{lines:,} lines",
    ]
    return " · ".join([*parts, *reading, *notes])


def chips(items: Sequence[Chip]) -> list[Any]:
    """Numbers that explain themselves when pointed at or focused."""
    return [
        html.Span(
            [
                html.Span(c.label, className="label"),
                html.Span(c.value, className="value"),
                *([] if c.share is None else [_bar(c.share)]),
                html.Span(c.says, className="tip", role="tooltip"),
            ],
            className="chip",
            tabIndex=0,
        )
        for c in items
    ]


def _bar(share: float) -> Any:
    width = f"{100 * min(1.0, max(0.0, share)):.0f}%"
    return html.Span(html.Span(style={"width": width}), className="meter", **{"aria-hidden": "true"})  # type: ignore[arg-type]


def legend(figure: Any) -> list[Any]:
    """Which line is which, as text that wraps: a figure's own legend takes half of a narrow one."""
    out, told = [], set()
    for t in figure.data:
        if not t.name or t.showlegend is False or t.name in told:
            continue
        told.add(t.name)
        mode, filled = t.mode or "", t.fill is not None
        colour = (t.fillcolor if filled else t.marker.color if "markers" in mode else t.line.color) or "currentColor"
        dash = {"solid": "solid", None: "solid"}.get(t.line.dash, "dashed" if "dash" in str(t.line.dash) else "dotted")
        line = [html.Span(className=f"line {dash}")] if "lines" in mode and not filled else []
        glyph = ["▬"] if filled else [GLYPHS.get(t.marker.symbol, "●")] if "markers" in mode else []
        swatch = html.Span([*line, *glyph], className="swatch", style={"color": colour}, **{"aria-hidden": "true"})  # type: ignore[arg-type]
        out.append(html.Span([swatch, unescape(t.name)], className="entry"))
    return out


def bare(figure: Any) -> Any:
    """The figure without its own legend."""
    return figure.update_layout(showlegend=False)


def section(
    panel: Panel, number: int | None, graph: Any, inside: Sequence[Any] = (), entries_of: Sequence[Any] = (), note: str = ""
) -> Any:
    """One panel; `number` is the key that jumps to it."""
    key = [html.Span(str(number), className="key", title=f"press {number} to come here")] if number else []
    return html.Section(
        [
            html.H2([*key, panel.title], id=f"title-{panel.key}"),
            html.Div(list(inside), className="chips", id=f"chips-{panel.key}"),
            html.Div(list(entries_of), className="legend", id=f"legend-{panel.key}"),
            graph,
            html.P(note, className="note", id=f"note-{panel.key}"),
        ],
        className=f"panel {panel.key}",
        id=f"panel-{panel.key}",
        tabIndex=-1,
        **{"aria-labelledby": f"title-{panel.key}"},  # type: ignore[arg-type]
    )


def log(reports: Sequence[StepReport]) -> list[Any]:
    """Every treatment and its outcome, latest first."""
    told = entries(r for r in reports if r.events)
    if not told:
        return [html.P("Nothing was treated: there was no reason to.", className="note")]
    more = [html.P(f"and {len(told) - SHOWN:,} older ones", className="note")] if len(told) > SHOWN else []
    rows = [
        html.Li(
            [
                html.Span(MARKS.get(e.event.outcome, "·"), className=f"mark {e.event.outcome}", **{"aria-hidden": "true"}),  # type: ignore[arg-type]
                html.Div(
                    [
                        html.Span(
                            [
                                f"step {e.event.step:,} ",
                                html.B(e.event.name),
                                " ",
                                OUTCOMES.get(e.event.outcome, e.event.outcome),
                            ],
                            className="what",
                        ),
                        html.Span(f"{e.event.seen}; {e.event.done}" + (f" → {e.event.result}" if e.event.result else "")),
                    ]
                ),
            ]
        )
        for e in reversed(told[-SHOWN:])
    ]
    return [html.Ol(rows, className="log"), *more]


def logbook(inside: Sequence[Any] = ()) -> Any:
    return html.Section(
        [html.H2("Log of events", id="title-log"), html.Div(list(inside), id="log", tabIndex=0, className="scroll")],
        className="panel logbook",
        id="panel-log",
        tabIndex=-1,
        **{"aria-labelledby": "title-log"},  # type: ignore[arg-type]
    )


def help_text() -> Any:
    """What the keys do, and what the colours mean."""
    return html.Details(
        [
            html.Summary("Help"),
            html.P(
                "Point at a number, or move to it with Tab, to read what it means and what it does not. Keys: 1 to 6 jump to a "
                "panel, 7 to the loss, 8 to the cost, L to the log, P pauses. Red: something that ruins a run holds now, or "
                "its treatment still waits for its verdict. Amber: over but recent, held by a treatment, or lesser. Green: "
                "nothing stands out. Every number belongs to one batch."
            ),
        ],
        className="help",
    )

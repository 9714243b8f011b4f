"""Page components as static HTML, for the export: every text and attribute is escaped."""

from __future__ import annotations

from html import escape
from typing import Any

ATTRIBUTES = {"className": "class", "tabIndex": "tabindex", "htmlFor": "for"}
VOID = {"br", "hr", "img", "input", "meta"}


def to_html(part: Any) -> str:
    """A tree of dash.html components, strings and lists as HTML. Raises TypeError on anything else."""
    if part is None:
        return ""
    if isinstance(part, (str, int, float)):
        return escape(str(part))
    if isinstance(part, (list, tuple)):
        return "".join(to_html(p) for p in part)
    plain = part.to_plotly_json()
    if plain["namespace"] != "dash_html_components":
        raise TypeError(f"{plain['type']} has no static form")
    tag = plain["type"].lower()
    given = {k: v for k, v in plain["props"].items() if k != "children" and v is not None}
    if "style" in given:
        given["style"] = ";".join(f"{k}:{v}" for k, v in given["style"].items())
    attributes = "".join(f' {ATTRIBUTES.get(k, k)}="{escape(str(v))}"' for k, v in given.items())
    inside = to_html(plain["props"].get("children"))
    return f"<{tag}{attributes}>" if tag in VOID else f"<{tag}{attributes}>{inside}</{tag}>"

"""A run's steps.jsonl as figures, a live page, one file to send around, and text. See docs/dashboard.md.

Reading a run and putting its state into words needs nothing beyond the standard library; what draws needs the extra
`dashboard` and is imported when asked for.
"""

from __future__ import annotations

from importlib.util import find_spec

EXTRA = 'drawing needs Dash and Plotly, which are not installed: pip install "adaptive-opt[dashboard]"'


def drawable() -> bool:
    """Whether the extra `dashboard` is installed."""
    return find_spec("dash") is not None and find_spec("plotly") is not None


def __getattr__(name: str) -> object:
    if name == "figures":
        if not drawable():
            raise ImportError(EXTRA)
        from importlib import import_module

        return import_module("adaptive_opt.dashboard.figures")
    raise AttributeError(f"module 'adaptive_opt.dashboard' has no attribute {name!r}")

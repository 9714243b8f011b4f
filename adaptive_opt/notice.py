"""Warnings that point to the caller's own line, however many wrappers lie between."""

from __future__ import annotations

import sys
import warnings

BETWEEN = {"accelerate", "adaptive_opt", "contextlib", "lightning", "pytorch_lightning", "torch", "transformers"}


def warn(message: str) -> None:
    """A UserWarning at the first frame outside of this package, torch and the frameworks that call `step` for the user."""
    level, frame = 1, sys._getframe()
    while frame.f_back is not None and frame.f_globals.get("__name__", "").partition(".")[0] in BETWEEN:
        level, frame = level + 1, frame.f_back
    warnings.warn(message, UserWarning, stacklevel=level)

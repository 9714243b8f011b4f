"""The wrapper inside of what a framework made of it."""

from __future__ import annotations

from typing import Any

from adaptive_opt.optimizer import AdaptiveOptimizer


def wrapper_in(optimizer: Any) -> AdaptiveOptimizer:
    """The AdaptiveOptimizer in Accelerate's or Lightning's optimizer. Raises TypeError when there is none."""
    found = optimizer
    while hasattr(found, "optimizer"):  # also Lightning's, which is a copy of the wrapper's attributes that ages
        found = found.optimizer
    if not isinstance(found, AdaptiveOptimizer):
        raise TypeError(f"wrapper_in({type(optimizer).__name__}): there is no AdaptiveOptimizer in it")
    return found

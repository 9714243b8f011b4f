"""What is run: one file a kind of sickness. Settings are the customary ones, and they are the same for every arm."""

from __future__ import annotations

from . import broken, drift, healthy, ill_conditioned, saddles, sharp

WORKLOADS = {w.name: w for group in (ill_conditioned, saddles, sharp, drift, broken, healthy) for w in group.WORKLOADS}

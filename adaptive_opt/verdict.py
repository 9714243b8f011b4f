"""What a Reading of a finished model means, in words: where it is, how sharp it is, which layer worries. Pure."""

from __future__ import annotations

import math
from dataclasses import dataclass

from adaptive_opt.records import LayerReading, Reading

# Definitions rather than thresholds of a treatment: nothing acts on them.
STATIONARY = 0.01  # of the loss: what the best gradient step is sure to gain, |g|^2 / (2 epsilon) (Nesterov, 2004, 1.2.3)
NUDGE = 0.01  # of |w|: the change of the weights whose worst effect is called flat or sharp
FLAT, SHARP = 0.01, 1.0  # of the loss: it changes by a hundredth at most; it doubles
BAND = 10.0  # a layer's sigma_rms outside [1/10, 10] worries, as in diagnosis.Thresholds


@dataclass(frozen=True)
class Verdict:
    """Words for a Reading, and the sentences that give the reasons."""

    place: str  # "minimum", "saddle", "slope" (no stationary point), or "unknown"
    shape: str  # "flat", "sharp", "neither", or "unknown"
    layer: str | None  # the layer that worries, by name
    sentences: tuple[str, ...]


def verdict(r: Reading) -> Verdict:
    """Minimum or saddle, flat or sharp, and the layer furthest from keeping its signal."""
    place, where = _place(r)
    shape, how = _shape(r)
    layer, which = _layer(r.layers)
    return Verdict(place, shape, layer, tuple(s for s in (where, how, which) if s))


def _place(r: Reading) -> tuple[str, str]:
    if r.epsilon is None or r.lambda_min is None or r.lambda_min_error is None or not math.isfinite(r.grad_norm):
        return "unknown", "Where the model stands is not known: its curvature was not measured."
    if r.epsilon == 0:
        return "unknown", "The loss has no curvature at all here: it is linear in the parameters, or does not depend on them."
    gain = r.grad_norm**2 / (2 * r.epsilon)
    floor = (r.delta_tol or 0.0) * r.epsilon
    share = gain / abs(r.loss) if r.loss else math.inf if gain else 0.0
    if share > STATIONARY:
        return "slope", (
            f"A slope, not yet a stationary point: the best gradient step is sure to lower the loss by {gain:.2g}, "
            f"{_share(share)} of it."
        )
    if r.lambda_min + r.lambda_min_error < -floor:
        return "saddle", (
            f"A saddle: the gradient is all but zero and at least {r.delta} direction{_s(r.delta)} of the loss "
            f"curve{'s' if r.delta == 1 else ''} down (lambda_min = {r.lambda_min:.3g} +- {r.lambda_min_error:.1g}). Nets that "
            "train well show such directions too; it is a trap only where training has stalled."
        )
    sure = r.lambda_min_outer is not None and r.lambda_min_outer >= -floor
    seen = "with probability 0.99 there is none" if sure else "none was found, which is no proof"
    return "minimum", (
        f"A minimum: the gradient is all but zero, and of directions that curve down by more than {floor:.2g} {seen}."
    )


def _shape(r: Reading) -> tuple[str, str]:
    if r.lambda_max is None or r.weight_norm is None or not r.loss or not math.isfinite(r.loss):
        return "unknown", ""
    rise = max(r.lambda_max, 0.0) * (NUDGE * r.weight_norm) ** 2 / 2
    share = rise / abs(r.loss)
    shape = "flat" if share <= FLAT else "sharp" if share >= SHARP else "neither"
    words = {"flat": "Flat", "sharp": "Sharp", "neither": "Neither flat nor sharp"}[shape]
    return shape, (
        f"{words}: changing the weights by {NUDGE:.0%} of their norm in the worst direction adds {rise:.2g} to the loss, "
        f"{_share(share)} of it."
    )


def _layer(layers: tuple[LayerReading, ...]) -> tuple[str | None, str]:
    if not layers:
        return None, ""
    worst = max(layers, key=lambda layer: layer.distance)
    name = worst.name or "the model"
    if worst.distance <= math.log(BAND):
        return None, f"No layer worries; the furthest from keeping its signal is {name} (sigma_rms {worst.sigma_rms:.3g})."
    does = "stretches" if worst.sigma_rms > 1 else "shrinks"
    return worst.name, f"Layer {name} worries: it {does} its signal to {worst.sigma_rms:.3g} times what it was (sigma_rms)."


def _share(x: float) -> str:
    return f"{x:.2g} times all" if x >= 1 else f"{100 * x:.2g} %"


def _s(count: int | None) -> str:
    return "" if count == 1 else "s"

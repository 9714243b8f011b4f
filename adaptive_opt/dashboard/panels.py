"""The panels of the page: six on the curvature, one on the course of training, one on the cost. Pure."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from statistics import median
from typing import Any

from adaptive_opt.dashboard import figures
from adaptive_opt.dashboard.figures.layers import called, worries, worst
from adaptive_opt.dashboard.figures.saddle import stalled
from adaptive_opt.dashboard.figures.sharpness import advice, why
from adaptive_opt.dashboard.figures.spectrum import outliers
from adaptive_opt.dashboard.figures.style import having, readings
from adaptive_opt.dashboard.words import NOT_MEASURED, WORDS, number
from adaptive_opt.records import Reading, StepReport

Reports = Sequence[StepReport]


@dataclass(frozen=True)
class Chip:
    """A number as it stands on the page: what it is called, its value with error and unit, and what it means."""

    label: str
    value: str
    says: str
    share: float | None = None  # 0..1, drawn as a bar below the value


@dataclass(frozen=True)
class Panel:
    """A figure, the numbers above it, and the sentence below it."""

    key: str
    title: str
    draw: Callable[[Reports], Any]
    chips: Callable[[Reports], list[Chip]]
    note: Callable[[Reports], str]


def chip(word: str, x: float | None, error: float | None = None, label: str = "", unit: str | None = None) -> Chip:
    w = WORDS[word]
    sign = {"at least": "≥ ", "at most": "≤ "}.get(w.unit, "") if x is not None else ""
    tail = w.unit if unit is None else unit
    tail = "" if tail in ("at least", "at most") or x is None else f" {tail}"
    return Chip(label or w.label, f"{sign}{number(x, error)}{tail}".rstrip(), w.says)


def _last(reports: Reports, name: str) -> Reading | None:
    """The latest reading that has this number."""
    found = having(readings(reports), name)
    return found[-1] if found else None


def _measured(r: Reading | None) -> str:
    """When and on what."""
    if r is None:
        return ""
    samples = "" if r.batch_size is None else f", on {r.batch_size} samples"
    share = "" if r.fraction == 1 else f" ({r.fraction:.0%} of the batch)"
    how = {"exact": "", "exact_rebuilt": ""}.get(r.backend, f", {r.backend.replace('_', ' ')}: approximate")
    which = "" if r.curvature == "hessian" else f", {r.curvature.replace('_', '-')} instead of the Hessian"
    return f"Measured at step {r.step:,}{samples}{share}{how}{which}."


def _not_since(reports: Reports, latest: Reading) -> str:
    """Why the latest reading says nothing of the coming step."""
    return "" if latest.stability is not None else f" Not measured since: {why(reports)}."


# ---- one function a panel ---------------------------------------------------------------------------------------------


def _condition(reports: Reports) -> list[Chip]:
    felt = [r.kappa_effective for r in having(readings(reports), "kappa_effective") if r.kappa_effective]
    three = felt[-3:]
    spread = f" ({number(min(three))} to {number(max(three))})" if len(three) > 1 else ""
    r = _last(reports, "kappa")
    mid = Chip("median of three", f"{number(median(three))}{spread}" if three else NOT_MEASURED, WORDS["kappa_effective"].says)
    return [chip("kappa", r and r.kappa), chip("kappa_effective", felt[-1] if felt else None), mid]


def _condition_note(reports: Reports) -> str:
    felt = [r.kappa_effective for r in having(readings(reports), "kappa_effective") if r.kappa_effective]
    since = _not_since(reports, full[-1]) if (full := readings(reports, full=True)) and felt else ""
    if not felt:
        return ""
    if len(felt) < 4:
        return f"Trend: too few readings yet. {_measured(_last(reports, 'kappa'))}{since}".strip()
    before, now = median(felt[-6:-3]), median(felt[-3:])
    way = "rising" if now > 1.25 * before else "falling" if now < before / 1.25 else "steady"
    trend = f"Trend: {way}, {number(before)} → {number(now)} (medians of three)."
    return f"{trend} {_measured(_last(reports, 'kappa'))}{since}"


def _spectrum(reports: Reports) -> list[Chip]:
    r = _last(reports, "lambda_max")
    if r is None:
        return [chip("lambda_max", None), chip("lambda_min", None), chip("trace", None)]
    return [
        chip("lambda_max", r.lambda_max, r.lambda_max_error, unit=""),
        chip("lambda_min", r.lambda_min, r.lambda_min_error, unit=""),
        chip("trace", r.trace, r.trace_stderr, unit=""),
        Chip("outliers", str(len(outliers(r))), "Ritz values more than three root mean squares of the spectrum from zero."),
    ]


def _spectrum_note(reports: Reports) -> str:
    r = _last(reports, "lambda_max")
    return f"{_measured(r)} Unit of eigenvalues: loss per squared weight." if r is not None else ""


def _saddle(reports: Reports) -> list[Chip]:
    r = _last(reports, "lambda_min")
    still = "yes" if stalled(reports) else "no"
    if r is None:
        return [
            chip("delta", None),
            chip("delta_estimate", None),
            chip("lambda_min", None),
            Chip("stall", still, WORDS["stall"].says),
        ]
    return [
        chip("delta", r.delta),
        chip("delta_estimate", r.delta_estimate, r.delta_stderr, label="estimated", unit=""),
        chip("lambda_min", r.lambda_min, r.lambda_min_error, unit=""),
        Chip("stall", still, WORDS["stall"].says),
    ]


def _saddle_note(reports: Reports) -> str:
    r = _last(reports, "lambda_min")
    negative = r is not None and r.delta
    if negative and stalled(reports):
        says = "Stalled where curvature is negative: a saddle."
    elif negative:
        says = "Negative curvature without a stall is everywhere in healthy nets: no saddle."
    else:
        says = "No negative direction was found." if r is not None else ""
    return f"{says} {_measured(r)}".strip()


def _layers(reports: Reports) -> list[Chip]:
    layer = worst(reports)
    if layer is None:
        return [chip("sigma_rms", None), chip("sigma_max", None), chip("chain", None)]
    latest = [r for r in readings(reports) if r.layers][-1]
    logs = [math.log(x.sigma_rms) if x.sigma_rms > 0 else -math.inf for x in latest.layers]
    product = math.exp(max(-700.0, min(sum(logs), 700.0)))
    return [
        Chip("furthest layer", called(layer.name), "The layer whose sigma_rms is furthest from 1, which keeps the signal."),
        chip("sigma_rms", layer.sigma_rms, layer.sigma_rms_error),
        chip("sigma_max", layer.sigma_max, layer.sigma_max_error),
        chip("chain", product, label=f"product of {len(logs)}"),
    ]


def _layers_note(reports: Reports) -> str:
    layer = worst(reports)
    if layer is None:
        return ""
    name = called(layer.name)
    told = f"Layer {name} worries" if worries(layer) else f"No layer worries; {name} is furthest"
    r = [r for r in readings(reports) if r.layers][-1]
    return f"{told}: it multiplies the signal by {number(layer.sigma_rms)}. Measured at step {r.step:,}, on 8 samples."


def _sharpness(reports: Reports) -> list[Chip]:
    r = _last(reports, "stability")
    if r is None:
        return [chip("sharpness_score", None), chip("stability", None), chip("overshoot", None)]
    return [
        replace(chip("sharpness_score", r.sharpness_score), share=(r.sharpness_score or 0.0) / 100),
        chip("stability", r.stability, r.stability_error, unit=""),
        chip("overshoot", r.overshoot),
    ]


def _sharpness_note(reports: Reports) -> str:
    told = [(r.reading, r) for r in reports if r.reading is not None and r.reading.stability is not None]
    if not told:
        return ""
    reading, report = told[-1]
    held = f" As it is held now, the step is at {number((reading.stability or 0) * reports[-1].lr_scale)} of the limit."
    since = _not_since(reports, readings(reports)[-1])
    return f"{advice(reading, report.lr)}{held if reports[-1].lr_scale != 1 else ''} {_measured(reading)}{since}"


def _lipschitz(reports: Reports) -> list[Chip]:
    b, r = _last(reports, "lipschitz_bound"), _last(reports, "lipschitz_local")
    return [
        chip("lipschitz_bound", b and b.lipschitz_bound),
        chip("lipschitz_local", r and r.lipschitz_local, r and r.lipschitz_local_error),
    ]


def _lipschitz_note(reports: Reports) -> str:
    b, r = _last(reports, "lipschitz_bound"), _last(reports, "lipschitz_local")
    if b is not None and r is not None and r.lipschitz_local:
        return f"The bound is {number((b.lipschitz_bound or 0) / r.lipschitz_local)} times what is there. {_measured(r)}"
    return _measured(r or b)


def _training(reports: Reports) -> list[Chip]:
    if not reports:
        return []
    r = reports[-1]
    return [
        chip("loss", r.loss),
        chip("lr", r.lr * r.lr_scale),
        chip("lr", r.lr, label="the user's lr"),
        *([] if r.lr_limit is None else [chip("lr", r.lr_limit, label=f"limit, {r.lr_limit_age} steps old")]),
        Chip("mode", r.mode, "How steps are taken until further notice: base is the wrapped optimizer as it is."),
    ]


def _cost(reports: Reports) -> list[Chip]:
    if not reports:
        return []
    last = reports[-1]
    share = 100 / (last.step + 1)
    r = readings(reports)[-1:]
    probing = chip("probing", last.probe_cost * share, unit="%")
    treatment = chip("treatment", last.treatment_cost * share, unit="%")
    one = Chip("last reading", f"{number(r[0].cost)} gradients, {number(1000 * r[0].seconds)} ms" if r else NOT_MEASURED,
               "What the latest reading cost: gradient-equivalents at fixed prices, and wall time.")  # fmt: skip
    return [probing, treatment, one]


def _nothing_to_add(reports: Reports) -> str:
    return ""


PANELS: tuple[Panel, ...] = (
    Panel("condition", "Condition number", figures.condition, _condition, _condition_note),
    Panel("spectrum", "Hessian spectral density", figures.spectrum, _spectrum, _spectrum_note),
    Panel("saddle", "Saddle-point detector", figures.saddle, _saddle, _saddle_note),
    Panel("layers", "Layers: Jacobian singular values", figures.layers, _layers, _layers_note),
    Panel("sharpness", "Sharpness", figures.sharpness, _sharpness, _sharpness_note),
    Panel("lipschitz", "End-to-end Lipschitz", figures.lipschitz, _lipschitz, _lipschitz_note),
)
BELOW: tuple[Panel, ...] = (
    Panel("training", "Loss and learning rate", figures.training, _training, _nothing_to_add),
    Panel("cost", "Cost of probing", figures.cost, _cost, _nothing_to_add),
)

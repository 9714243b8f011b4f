"""diagnose: a reading and the free signals in, the conditions that hold out. Pure; thresholds are dimensionless."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import StatisticsError, correlation, median

from adaptive_opt.records import RAW, Condition, Diagnosis, Finding, LayerReading, Look, Reading, Trend, chains

FEW = 3  # looks at the validation loss whose median is a level
LEAST_GAIN = 0.1  # of the first validation loss: a run that starts well trained has gained little, and its noise stays
ERRORS = 2.0  # standard errors that a slope must exceed to be seen


@dataclass(frozen=True)
class Thresholds:
    """Where a number becomes a condition. Sources: docs/evidence.md, "thresholds"."""

    unstable: float = 2.0  # times the stability limit; around 1 is normal (Cohen et al., 2021)
    overshoot: float = 2.0  # and this very step raises the quadratic model's loss, while the loss is seen to rise,
    overshoot_alone: float = 5.0  # or raises it so far that waiting for the loss would be too late
    sharp: float = 0.8  # of the stability limit
    by_heart: float = 0.1  # of what the validation loss had gained is gone again, while the training loss falls ("validation")
    negative: float = 0.01  # |lambda_min| / epsilon, from which an eigenvalue counts as negative
    kappa_effective: float = 50.0  # median of the last three; char-GPT reads 12 to 20, all that gain from K-FAC more
    layer_band: float = 10.0  # a layer's sigma_rms outside [1/10, 10] ...
    chain_band: float = 1000.0  # ... or the product over all layers outside [1/1000, 1000]
    chain_least: int = 3  # layers: a short branch beside a skip connection may have any scale
    copies: float = 0.5  # of a layer's units are exact copies of others
    lost: float = 0.5  # share of all progress that is gone again


def diagnose(
    trend: Trend,
    reading: Reading | None = None,
    kappas: Sequence[float] = (),
    first_layers: Sequence[LayerReading] | None = None,
    recent: Reading | None = None,
    looks: Sequence[Look] | None = None,
    thresholds: Thresholds = Thresholds(),
) -> Diagnosis:
    """Which conditions hold in this step, most urgent first.

    `reading` is this step's, or None when nothing was measured; `kappas` the last few effective condition numbers;
    `first_layers` the layers of the run's first reading (None: this is the first); `recent` the reading before, if it is
    fresh: what it foresaw may have happened by now; `looks` the validation losses in a step with a new one, none in another;
    None where there is no such loss. Where there is, it alone shows what is sharp: many a healthy run stays at the edge of
    stability.
    """
    t = thresholds
    found: list[Finding] = []
    if not trend.finite:
        found.append(Finding(Condition.NON_FINITE, math.nan, math.nan, f"loss {trend.loss}, gradient norm {trend.grad_norm}"))
    elif trend.spike:
        usual = max(trend.usual_grad_norm or 0.0, 1e-30)
        ratio = (trend.grad_norm or 0.0) / usual
        found.append(Finding(Condition.BROKEN, ratio, 5.0, f"loss {_g(trend.loss)} and a gradient {ratio:.3g} times the usual"))
    elif trend.outlier is not None:
        o = trend.outlier
        sentence = f"the batch of step {o.step} lost {o.factor:.3g} times as much as the others at the same parameters"
        found.append(Finding(Condition.BROKEN, o.factor, o.threshold, sentence))
    elif trend.poison is not None:
        o = trend.poison
        sentence = f"the batch of step {o.step} brought the running statistics {o.factor:.3g} times the usual"
        found.append(Finding(Condition.BROKEN, o.factor, o.threshold, sentence))
    elif trend.lost > t.lost:
        found.append(Finding(Condition.BROKEN, trend.lost, t.lost, f"{trend.lost:.0%} of all progress is gone again"))
    proven = trend.finite and not trend.spike and trend.outlier is None
    unstable = _unstable(reading, recent, trend, t) if proven else None
    if unstable is not None:
        found.append(unstable)
    if reading is not None:
        found += _of_reading(reading, trend, kappas, first_layers, t)
    if reading is not None and looks is None:
        found += _at_the_edge(reading, t)
    learned = memorising(looks, t) if looks and proven else None
    if learned is not None:
        found.append(learned)
    if not found:
        found.append(Finding(Condition.HEALTHY, 0.0, 0.0, "nothing stands out"))
    return Diagnosis(trend.step, tuple(found))


def _of_reading(
    r: Reading, trend: Trend, kappas: Sequence[float], first: Sequence[LayerReading] | None, t: Thresholds
) -> list[Finding]:
    found: list[Finding] = []
    copied = _copied(r.layers, t)
    if trend.stalled and r.lambda_min is not None and r.epsilon and r.lambda_min < -t.negative * r.epsilon:
        size = -r.lambda_min / r.epsilon
        sentence = f"no progress where lambda_min = {r.lambda_min:.3g} ({size:.0%} of epsilon), at least {r.delta} negative"
        found.append(Finding(Condition.SADDLE, size, t.negative, sentence))
    elif copied is not None:
        found.append(copied)
    if first is None:
        found += [_unscaled(layer) for layer in r.layers if layer.raw][:1]
    drift = _drift(r.layers, first, t) if copied is None else None  # of one unit many times over a scale says nothing
    if drift is not None:
        found.append(drift)
    if len(kappas) >= 3 and median(kappas[-3:]) > t.kappa_effective:
        k = median(kappas[-3:])
        found.append(
            Finding(Condition.ILL_CONDITIONED, k, t.kappa_effective, f"kappa_effective is {k:.3g}, median of the last three")
        )
    return found


def _at_the_edge(r: Reading, t: Thresholds) -> list[Finding]:
    if r.stability is None or not t.sharp < r.stability <= t.unstable:
        return []
    return [Finding(Condition.SHARP, r.stability, t.sharp, f"training runs at {r.stability:.2g} of the stability limit")]


def memorising(looks: Sequence[Look], t: Thresholds = Thresholds()) -> Finding | None:
    """What only validation shows: its loss rises from its lowest level while the training loss falls on.

    Levels are medians of three looks. The rise since the lowest must be `by_heart` of all that validation had gained since the
    first look, and seen: two standard errors of a line through the looks since then, as must the fall of the training loss.
    """
    first = looks[0].validation
    seen = [look for look in looks if math.isfinite(look.validation) and look.training is not None]
    if len(seen) < 2 * FEW or not math.isfinite(first):
        return None
    levels = [median(look.validation for look in seen[i : i + FEW]) for i in range(len(seen) - FEW + 1)]
    low = min(range(len(levels)), key=levels.__getitem__)
    since = seen[low:]
    if len(since) < 2 * FEW:
        return None
    gained = max(first - levels[low], LEAST_GAIN * abs(first))
    lost = (levels[-1] - levels[low]) / gained if gained > 0 else 0.0
    rises, falls = (
        _slope([look.step for look in since], [getattr(look, name) for look in since]) for name in ("validation", "training")
    )
    if lost <= t.by_heart or rises < ERRORS or falls > -ERRORS:
        return None
    sentence = (
        f"learns by heart: since step {since[0].step} the validation loss rose from {levels[low]:.4g} to {levels[-1]:.4g}, "
        f"{lost:.0%} of what it had gained, and the training loss fell from {since[0].training:.4g} to {since[-1].training:.4g}"
    )
    return Finding(Condition.SHARP, lost, t.by_heart, sentence)


def _slope(steps: Sequence[int], values: Sequence[float]) -> float:
    """Of a line through the values, in standard errors of itself."""
    try:
        r = correlation(steps, values)
    except StatisticsError:  # they are all the same
        return 0.0
    return r * math.sqrt((len(steps) - 2) / max(1 - r * r, 1e-12))


def _copied(layers: Sequence[LayerReading], t: Thresholds) -> Finding | None:
    """Units that are one and the same get one and the same gradient: a saddle that no gradient leaves."""
    worst = max(layers, key=lambda layer: layer.copies or 0.0, default=None)
    if worst is None or not (worst.copies or 0.0) >= t.copies:
        return None
    sentence = f"{worst.copies:.0%} of the units of layer {worst.name} are copies of others, and their gradients too"
    return Finding(Condition.SADDLE, worst.copies or 0.0, t.copies, sentence)


def _unstable(reading: Reading | None, recent: Reading | None, trend: Trend, t: Thresholds) -> Finding | None:
    """A step that is far too long by its own reading, or too long by a reading that the loss bears out."""
    for r in (reading, recent if trend.rising else None):
        if r is None or r.stability is None or r.overshoot is None or r.stability <= t.unstable:
            continue
        if r.overshoot > t.overshoot_alone or (r.overshoot > t.overshoot and trend.rising):
            when = "is" if r is reading else f"of step {r.step} was"
            risen = ", and the loss has risen" if r is not reading else ""
            sentence = (
                f"the step {when} {r.stability:.3g} times its stability limit and overshoots {r.overshoot:.3g} times{risen}"
            )
            return Finding(Condition.UNSTABLE, r.stability, t.unstable, sentence)
    return None


def _unscaled(layer: LayerReading) -> Finding:
    size = layer.fed or 0.0
    sentence = f"the data fed to layer {layer.name} has features as large as {size:.3g} (root mean square)"
    return Finding(Condition.UNSCALED, size, RAW, sentence)


def _drift(layers: Sequence[LayerReading], first: Sequence[LayerReading] | None, t: Thresholds) -> Finding | None:
    """A layer of a chain, or a chain as a whole, outside its band; after the first reading only if it moved on outwards."""
    known = [layer for layer in layers if layer.sigma_rms > 0 and not layer.raw]
    recurrent = _forgets(known, first, t)
    if recurrent is not None:
        return recurrent
    before = {layer.name: math.log(layer.sigma_rms) for layer in first or () if layer.sigma_rms > 0}
    for chain in chains(known, t.chain_least):
        logs = {layer.name: math.log(layer.sigma_rms) for layer in chain}
        *inner, last = logs
        candidates = inner if inner and logs[last] < 0 else logs  # a head may start as small as one likes
        worst = max(candidates, key=lambda name: abs(logs[name]))
        whole, whole_before = sum(logs.values()), sum(before.get(name, 0.0) for name in logs)
        moved_on = first is None or abs(logs[worst]) > abs(before.get(worst, 0.0)) * 1.1
        chain_moved = first is None or abs(whole) > abs(whole_before) * 1.1
        if abs(logs[worst]) > math.log(t.layer_band) and moved_on:
            value = math.exp(logs[worst])
            sentence = f"layer {worst} multiplies the signal by {value:.3g} (sigma_rms)"
            return Finding(Condition.DRIFTING, value, t.layer_band, sentence)
        if abs(whole) > math.log(t.chain_band) and chain_moved:
            value = math.exp(min(whole, 700.0))
            sentence = f"the {len(chain)} layers together multiply the signal by {value:.3g} (product of sigma_rms)"
            return Finding(Condition.DRIFTING, value, t.chain_band, sentence)
    return None


def _forgets(known: Sequence[LayerReading], first: Sequence[LayerReading] | None, t: Thresholds) -> Finding | None:
    """A recurrent matrix that kills or blows up the signal of its sequence; later than at first only if it moved on."""
    before = {r.name: r.times * r.distance for r in first or ()}
    for r in known:
        moved_on = first is None or r.times * r.distance > 1.1 * before.get(r.name, 0.0)
        if r.kind == "recurrent" and r.times * r.distance > math.log(t.chain_band) and moved_on:
            total = math.exp(min(max(r.times * math.log(r.sigma_rms), -700.0), 700.0))
            sentence = f"{r.name} multiplies the signal by {r.sigma_rms:.3g} {r.times} times, by {total:.3g} in all (sigma_rms)"
            return Finding(Condition.DRIFTING, total, t.chain_band, sentence)
    return None


def _g(x: float | None) -> str:
    return "unknown" if x is None else f"{x:.3g}"

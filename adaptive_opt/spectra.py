"""The numbers of a Reading that come from Lanczos runs on one operator: a full reading's and a cheap one's."""

from __future__ import annotations

import math
from collections import deque
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from adaptive_opt.curvature import (
    Operator,
    RitzPair,
    Shares,
    Spectrum,
    condition_number_bound,
    count_below,
    effective_condition_number,
    ends,
    estimate_below,
    lanczos_within,
    outer_ends,
    scaled,
    top_ritz_pair,
    trace_estimate,
)
from adaptive_opt.curvature.lanczos import Matvec
from adaptive_opt.curvature.vectors import dot
from adaptive_opt.memory import ProbeMemory
from adaptive_opt.metric import Metric
from adaptive_opt.records import Reading

COLD, WARM = 6, 3  # Lanczos steps of a cheap reading, from a random start and from the last Ritz vector
REMEMBERED = 5  # products that a cheap reading draws its Ritz pairs from: what a warm one makes, and no more vectors
ALIKE = 0.99  # cosine from which two directions are one
ASYMMETRIC = 0.05  # of epsilon; rounding in bfloat16 stays below it


@dataclass(frozen=True)
class Spectra:
    """Lanczos runs with these hyperparameters; see LanczosProbe for what they mean."""

    num_steps: int
    tol: float | None
    delta_tol: float
    vectors: int | None  # bytes that the vectors of a run may take
    shares: Shares | None = None  # of several processes, among which they may be dealt out

    def full(self, H: Operator, m: Metric | None, memory: ProbeMemory, draft: Reading, notes: list[str]) -> Reading:
        """Both ends, the counts and the condition numbers: one run on H, one in the optimizer's metric."""
        h = self._run(H, _random(H.gradient, memory), self.num_steps)
        memory.bottom = h.ritz_vector(0) if h.ritz_values[0] < 0 else None
        memory.below = None
        if h.method != "two-pass":  # there a Ritz vector costs a second pass
            memory.sharpest = _finite(h.ritz_vector(-1), memory.sharpest)
            memory.below = _below(h, H.gradient, self.delta_tol)
        draft = self._of_hessian(h, draft, notes)
        if m is None or not bool(m.root.any()):
            return draft
        A = scaled(H, m.root)
        start = m.averaged if bool(m.averaged.any()) else _random(m.averaged, memory)
        a = self._run(A, start, self.num_steps)
        if a.method != "two-pass":
            memory.top = _finite(a.ritz_vector(-1), memory.top)
        if not len(a.weights):
            notes.append("kappa_effective: not with a restarted basis")
        return replace(
            _stability(draft, float(a.ritz_values[-1]), float(a.residuals[-1]), m),
            kappa_effective=_number(effective_condition_number(a)) if len(a.weights) else None,
            overshoot=_overshoot(m, H.gradient, A(m.momentum)),
        )

    def cheap(self, H: Operator, m: Metric | None, memory: ProbeMemory, draft: Reading, notes: list[str]) -> Reading:
        """lambda_max and, where the coming step is known, stability and overshoot, from warm starts.

        Every product serves both metrics: where H maps x to Hx, A = D H D maps D^-1 x to D H x. So three Lanczos steps in the
        optimizer's metric and the product with the momentum that overshoot needs give the largest Ritz value in either. After
        a full reading, which knows H's own top vector, one product more follows that, unless the two metrics share it. (Two
        Lanczos steps were too few: RMSprop at 100 times its rate was not rescued.)
        """
        seen: deque[tuple[Tensor, Tensor]] = deque(maxlen=REMEMBERED)

        def product(v: Tensor) -> Tensor:
            seen.append((v, H(v)))
            return seen[-1][1]

        sharpest = _fitting(memory.sharpest, H.gradient)
        if m is None or not bool(m.root.any()):
            h = self._run(H, _random(H.gradient, memory) if sharpest is None else sharpest, WARM + 1)
            memory.sharpest = _finite(h.ritz_vector(-1), memory.sharpest)
            return replace(draft, lambda_max=float(h.ritz_values[-1]), lambda_max_error=float(h.residuals[-1]))
        A = scaled(product, m.root)
        warm = _fitting(memory.top, m.root)
        same = warm is not None and sharpest is not None and _cosine(m.root * warm, sharpest) > ALIKE
        a = self._run(A, _cold(m.root, m.momentum, memory) if warm is None else warm, COLD if warm is None else WARM)
        draft = replace(draft, overshoot=_overshoot(m, H.gradient, A(m.momentum)))
        if sharpest is not None and not same:
            product(sharpest)
        top = _larger(a, _in_metric(seen, m.root))
        memory.top = _finite(top.vector, memory.top)
        pair = _larger(None, list(seen))
        if sharpest is not None:
            memory.sharpest = _finite(pair.vector, memory.sharpest)
        return replace(_stability(draft, top.value, top.residual, m), lambda_max=pair.value, lambda_max_error=pair.residual)

    def _of_hessian(self, h: Spectrum, draft: Reading, notes: list[str]) -> Reading:
        epsilon = h.epsilon
        threshold = -self.delta_tol * epsilon
        asymmetry = h.asymmetry / epsilon if epsilon > 0 else 0.0
        if asymmetry > ASYMMETRIC:
            notes.append(
                f"curvature: the products are not symmetric (by {asymmetry:.2g} of epsilon): a backward in this model is not "
                "the derivative of its forward, or the differences are of a kinked loss; the errors include it"
            )
        low, high = outer_ends(h)
        if len(h.weights):
            trace, trace_stderr = trace_estimate([h])
            estimate, stderr = estimate_below([h], threshold)
            draft = replace(draft, trace=trace, trace_stderr=trace_stderr, delta_estimate=estimate, delta_stderr=stderr)
        else:
            notes.append("trace, delta_estimate: not with a restarted basis")
        return replace(
            draft,
            epsilon=epsilon,
            kappa=_number(condition_number_bound(h)),
            delta=count_below(h, threshold),
            delta_tol=self.delta_tol,
            lambda_max=float(h.ritz_values[-1]),
            lambda_max_error=float(h.residuals[-1]),
            lambda_max_outer=_number(high),
            lambda_min=float(h.ritz_values[0]),
            lambda_min_error=float(h.residuals[0]),
            lambda_min_outer=_number(low),
            ritz_values=tuple(h.ritz_values.tolist()),
            ritz_weights=tuple(h.weights.tolist()),
            ritz_residuals=tuple(h.residuals.tolist()),
            method=h.method,
            asymmetry=asymmetry,
        )

    def _run(self, matvec: Matvec, start: Tensor, num_steps: int) -> Spectrum:
        until = None if self.tol is None else ends(self.tol)
        return lanczos_within(self.vectors, matvec, start, num_steps, until=until, shares=self.shares)


def _below(h: Spectrum, g: Tensor, tol: float) -> Tensor | None:
    """(n,) all directions of negative curvature in one: each as long as its curvature, and downhill; None for fewer than two.

    Those count whose eigenvalue is negative for sure, its residual included.
    """
    sure = [
        i
        for i, (value, error) in enumerate(zip(h.ritz_values, h.residuals, strict=True))
        if value < -max(error, tol * h.epsilon)
    ]
    if len(sure) < 2:
        return None
    total = torch.zeros_like(g)
    for i in sure:
        q = h.ritz_vector(i)
        downhill = -1.0 if float(dot(g, q)) > 0 else 1.0
        total.add_(q, alpha=downhill * abs(float(h.ritz_values[i])))
    return _finite(total / total.norm(), None)


def _larger(spectrum: Spectrum | None, pairs: list[tuple[Tensor, Tensor]]) -> RitzPair:
    """Both are lower bounds: a run's own Ritz value, and that of the latest products, on which a run may be out of reach."""
    found = top_ritz_pair([x for x, _ in pairs], [Ax for _, Ax in pairs])
    if found is not None and (spectrum is None or found.value >= spectrum.ritz_values[-1]):
        return found
    if spectrum is None:
        raise FloatingPointError("a matrix-vector product is not finite")
    return RitzPair(float(spectrum.ritz_values[-1]), float(spectrum.residuals[-1]), spectrum.ritz_vector(-1))


def _in_metric(pairs: deque[tuple[Tensor, Tensor]], root: Tensor) -> list[tuple[Tensor, Tensor]]:
    """(D^-1 x, D H x); a pair that reaches where D vanishes is none of D H D's and left out."""
    inverse = torch.where(root > 0, 1 / root, 0.0)
    outside = root <= 0
    inside = [(x, Hx) for x, Hx in pairs if not bool((x[outside] != 0).any())] if bool(outside.any()) else pairs
    return [(inverse * x, root * Hx) for x, Hx in inside]


def _stability(draft: Reading, value: float, error: float, m: Metric) -> Reading:
    stability = max(value, 0.0) / m.limit
    return replace(draft, stability=stability, stability_error=error / m.limit, sharpness_score=100 * min(1.0, stability))


def _overshoot(m: Metric, g: Tensor, Am: Tensor) -> float | None:
    """(d'Hd / 2) / |g'd| for the coming step d = -root * momentum; None when d does not descend here, or curves down."""
    descent, curvature = torch.stack([dot(g, m.root * m.momentum), dot(m.momentum, Am)]).cpu().tolist()
    return curvature / (2 * descent) if descent > 0 and curvature > 0 else None


def _cold(like: Tensor, direction: Tensor, memory: ProbeMemory) -> Tensor:
    """A random start that leans on a direction which sees the sharpest one early: the step's own, the gradient."""
    start = _random(like, memory)
    return start / start.norm() + direction / direction.norm() if bool(direction.any()) else start


def _random(like: Tensor, memory: ProbeMemory) -> Tensor:
    v = torch.randn(like.numel(), generator=memory.generator, dtype=torch.float32)
    return v.to(device=like.device, dtype=like.dtype)


def _cosine(x: Tensor, y: Tensor) -> float:
    xy, xx, yy = torch.stack([dot(x, y), dot(x, x), dot(y, y)]).cpu().tolist()
    return abs(xy) / math.sqrt(xx * yy) if xx > 0 and yy > 0 else 0.0


def _fitting(vector: Tensor | None, like: Tensor) -> Tensor | None:
    return vector.to(like) if vector is not None and vector.shape == like.shape else None


def _finite(vector: Tensor, otherwise: Tensor | None) -> Tensor | None:
    return vector if bool(torch.isfinite(vector).all()) else otherwise


def _number(x: float) -> float | None:
    return x if math.isfinite(x) else None

"""Lanczos without a stored basis: the ends of the spectrum in the memory of five vectors (Cullum and Willoughby, 1985)."""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from adaptive_opt.curvature.lanczos import Matvec, Spectrum, ritz, usable
from adaptive_opt.curvature.questions import Question, next_look
from adaptive_opt.curvature.vectors import accumulator, dot, negligible, norm


def two_pass_lanczos(matvec: Matvec, start: Tensor, num_steps: int, *, until: Question | None = None) -> Spectrum:
    """The three-term recurrence alone; `ritz_vector` runs it a second time (the operator must repeat itself exactly).

    Without a basis orthogonality is lost as soon as a Ritz value converges, and copies of it appear. They are removed here:
    those without weight in the start vector, and those that repeat another within the rounding. So a count of Ritz values is
    no longer certified against copies that this missed; both ends and their residuals hold (Paige, 1971). `orthogonality` is
    the largest |q_1'q_j| that was seen. Raises as `lanczos` does.
    """
    n = start.numel()
    m = min(num_steps, n)
    if m < 1:
        raise ValueError(f"two_pass_lanczos(num_steps={num_steps}) on an operator of size {n}: at least one step is needed")
    steps = torch.zeros(4, m, dtype=accumulator(start), device=start.device)
    alpha, beta, defect, lost = steps
    size = norm(start)
    q, before = start / size.to(start.dtype), None
    look = next_look(0) if until is not None else m
    for j in range(m):
        w = matvec(q)
        alpha[j] = dot(q, w)
        if before is not None:
            defect[j] = dot(before, w) - beta[j - 1]
            lost[j] = dot(start, q) / size
        before, q = q, _next(w, q, before, steps, j)
        if until is not None and j + 1 == look < m:
            known = steps[:, : j + 1].cpu().double().numpy()
            again = _Again(matvec, start, steps[:2, : j + 1])
            so_far = _spectrum(known, again)
            excess = until(so_far)
            if so_far.exhausted or excess <= 1 or len(so_far.coefficients) <= j:  # the last: no longer finite
                return so_far
            look = next_look(j + 1, excess, until(_spectrum(known[:, :-1], again)))
    return _spectrum(steps.cpu().double().numpy(), _Again(matvec, start, steps[:2]))


def _next(w: Tensor, q: Tensor, before: Tensor | None, steps: Tensor, j: int) -> Tensor:
    """The next Lanczos vector, in the memory of `before`; beta[j] is set on the way."""
    alpha, beta = steps[0], steps[1]
    if before is None:
        r = torch.addcmul(w, q, alpha[j].to(w.dtype), value=-1)  # a new tensor: matvec may have returned q itself
    else:
        r = before.mul_(-beta[j - 1].to(w.dtype)).add_(w).addcmul_(q, alpha[j].to(w.dtype), value=-1)
    beta[j] = norm(r)
    return r.div_(beta[j].to(w.dtype).clamp_min(torch.finfo(w.dtype).tiny))


@dataclass
class _Again:
    """The basis as a recipe: the recurrence run once more."""

    matvec: Matvec
    start: Tensor
    steps: Tensor  # (2, k): alpha and beta of the first pass
    lost: float = 0.0

    def combine(self, coefficients: Tensor) -> Tensor:
        steps = self.steps.clone()
        c = coefficients.to(self.start)
        q, before = self.start / norm(self.start).to(self.start.dtype), None
        y = torch.zeros_like(q)
        for j in range(len(c)):
            y.addcmul_(q, c[j])
            if j + 1 < len(c):
                before, q = q, _next(self.matvec(q), q, before, steps, j)
        return y.mul_((c.norm() / norm(y).clamp_min(torch.finfo(y.dtype).tiny)).to(y.dtype))  # a ghost's vector is short

    def orthogonality(self) -> Tensor:
        return torch.tensor(self.lost)


def _spectrum(steps: np.ndarray, again: _Again) -> Spectrum:
    alpha, beta, defect, lost = steps
    n, eps = again.start.numel(), float(torch.finfo(again.start.dtype).eps)
    k, _ = usable(alpha, beta, n, eps)
    exhausted = bool(
        beta[k - 1] <= negligible(n, eps) * (np.abs(alpha[:k]) + beta[:k]).max()
    )  # n steps alone fill no space here
    theta, s, residuals = ritz(alpha[:k], beta[:k], 0, eps)
    weights = s[0] ** 2
    true, weights = _without_copies(theta, weights, eps)
    asymmetry = float(np.linalg.norm(defect[1:k]))
    again.lost = float(np.abs(lost[:k]).max())
    return Spectrum(
        ritz_values=theta[true],
        residuals=residuals[true] + asymmetry,
        weights=weights / weights.sum(),
        coefficients=s[:, true],
        vectors=again,
        exhausted=exhausted,
        dim=n,
        products=len(alpha),
        asymmetry=asymmetry,
        method="two-pass",
    )


def _without_copies(theta: np.ndarray, weights: np.ndarray, eps: float) -> tuple[np.ndarray, np.ndarray]:
    """Indices, ascending, of the Ritz values that stand for themselves, and their weights.

    Of copies the one with the largest weight stands for all, with all of their weight (Greenbaum, 1989).
    """
    width = 100 * eps * np.abs(theta).max()
    clusters = np.split(np.arange(len(theta)), np.flatnonzero(np.diff(theta) > width) + 1)
    best = np.array([c[np.argmax(weights[c])] for c in clusters])
    total = np.array([weights[c].sum() for c in clusters])
    heavy = total > eps**2
    return best[heavy], total[heavy]

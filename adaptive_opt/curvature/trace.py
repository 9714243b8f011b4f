"""Traces from products: Hutchinson (1990), Hutch++ (Meyer et al., 2021) and XTrace (Epperly, Tropp and Webber, 2024).

All three are unbiased for any symmetric operator, indefinite ones too. Test vectors are uniform on the sphere: then the
variance of a quadratic form is known, 2 (n |A|_F^2 - tr^2 A) / (n + 2), and both terms are estimated from the same products.
That is steadier than the variance of a few samples, which a run that stops by it would believe when it is too small by chance.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from adaptive_opt.curvature.basis import Basis
from adaptive_opt.curvature.lanczos import Matvec
from adaptive_opt.curvature.subspace import between, extend
from adaptive_opt.curvature.vectors import accumulator, dot, norm

FIRST_LOOK = 8  # test vectors before the first stopping test
DEPENDENCE = 1.2  # measured: the scatter of xtrace is too small by 1.0 to 1.4 (n = 60 and 300, five spectra, 4 to 50 vectors)


@dataclass(frozen=True)
class TraceEstimate:
    """trace(A), and how far it may be off."""

    value: float
    stderr: float  # standard deviation of `value`, estimated from the same products; inf where they say nothing of it
    products: int
    converged: bool  # stderr is within the tolerance asked for; True where none was asked for
    method: str  # "hutchinson", "hutch++", "xtrace"


def hutchinson(
    matvec: Matvec,
    like: Tensor,
    generator: torch.Generator,
    max_products: int = 100,
    *,
    tol: float | None = 0.05,
    atol: float = 0,
) -> TraceEstimate:
    """Mean of v'A v over random v. Four vectors of memory; the error falls as |A|_F / sqrt(products).

    `like` is an (n,) tensor of the dtype and on the device of the products; its values do not matter. The run ends when the
    standard error is at most `tol` of |value| or at most `atol`, and at `max_products` with `converged=False`. Every test
    synchronises the host once; `tol=None` without `atol` spends all products and synchronises once. Raises ValueError on
    a number of products that cannot be used, FloatingPointError when a product is not finite.
    """
    _check(max_products, 1, f"hutchinson(max_products={max_products})")
    n = like.numel()
    forms = torch.zeros(2, max_products, dtype=accumulator(like), device=like.device)

    def grow(k: int, upto: int) -> tuple[float, float]:
        for j in range(k, upto):
            v = _on_sphere(like, generator)
            w = matvec(v)
            forms[0, j], forms[1, j] = dot(v, w), dot(w, w)
        return _mean(forms[:, :upto].cpu().double().numpy(), n)

    value, stderr, k = _until(grow, max_products, 1, tol, atol)
    return TraceEstimate(value, stderr, k, _excess(value, stderr, tol, atol) <= 1, "hutchinson")


def hutchpp(
    matvec: Matvec,
    like: Tensor,
    generator: torch.Generator,
    max_products: int = 100,
    *,
    rank: int | None = None,
    tol: float | None = 0.05,
    atol: float = 0,
) -> TraceEstimate:
    """The trace on a subspace that A was seen to favour, exactly; Hutchinson's mean on what is orthogonal to it.

    `rank` vectors span the subspace (2 `rank` products, a third of all vectors by default as in the paper), and are kept beside
    four more. With a tolerance that is easily met a small rank is cheaper. Arguments, stopping and errors as for
    `hutchinson`; exact where A has a lower rank or n <= rank.
    """
    k = max_products // 3 if rank is None else rank
    call = f"hutchpp(max_products={max_products}, rank={rank})"
    _check(k, 1, call)
    n = like.numel()
    k = min(k, n)
    rest = max_products - 2 * k
    _check(rest, 0 if k == n else 1, call)
    basis = Basis(k, like)
    for _ in range(k):
        extend(basis, matvec(_on_sphere(like, generator)))
    forms = torch.zeros(2, max(rest, 1), dtype=accumulator(like), device=like.device)
    known = torch.stack([dot(q, matvec(q)) for q in basis.rows]).sum()

    def grow(done: int, upto: int) -> tuple[float, float]:
        for j in range(done, upto):
            v = _on_sphere(like, generator)
            for _ in range(2):
                basis.remove(basis.dots(v), v)
            v.mul_(((n - k) ** 0.5 / norm(v)).to(v.dtype))  # uniform on the sphere of what is left
            w = torch.clone(matvec(v))
            basis.remove(basis.dots(w), w)
            forms[0, j], forms[1, j] = dot(v, w), dot(w, w)
        inside, *pairs = torch.cat([known[None], forms[:, :upto].flatten()]).cpu().double().tolist()
        value, stderr = _mean(np.array(pairs).reshape(2, upto), n - k)
        if not np.isfinite(inside):
            raise FloatingPointError("hutchpp: a matrix-vector product is not finite")
        return inside + value, stderr

    value, stderr, m = _until(grow, rest if k < n else 0, 1, tol, atol)
    return TraceEstimate(value, stderr, 2 * k + m, _excess(value, stderr, tol, atol) <= 1, "hutch++")


def xtrace(
    matvec: Matvec,
    like: Tensor,
    generator: torch.Generator,
    max_products: int = 100,
    *,
    tol: float | None = 0.05,
    atol: float = 0,
) -> TraceEstimate:
    """Hutch++ in which every test vector is once the one that was left out of the subspace (two products a test vector).

    Far fewer products than the others where the spectrum decays; 3/2 vectors of memory a product. `stderr` is that of the mean
    over the test vectors, widened because they depend on each other; inf below four of them (eight products), unless those
    fill the space. Arguments, stopping and errors as for `hutchinson`; exact where A has a lower rank or n <= max_products / 2.
    """
    n = like.numel()
    most = min(max_products // 2, n)
    _check(most, 1, f"xtrace(max_products={max_products})")
    tests, images, basis = like.new_empty(most, n), like.new_empty(most, n), Basis(most, like)  # Omega, A Q, Q
    r = torch.zeros(most, most, dtype=accumulator(like), device=like.device)  # A Omega = Q R

    def grow(k: int, upto: int) -> tuple[float, float]:
        for i in range(k, upto):
            tests[i] = _on_sphere(like, generator)
            r[:i, i], r[i, i] = extend(basis, matvec(tests[i]))
            images[i] = matvec(basis.rows[i])
        q, o, z = basis.rows[:upto], tests[:upto], images[:upto]
        R, W, T, H = torch.stack([r[:upto, :upto], between(q, o), between(z, o), between(q, z)]).cpu().double().numpy()
        return _left_out(R, W, T, H, n)

    value, stderr, k = _until(grow, most, 2, tol, atol)
    return TraceEstimate(value, stderr, 2 * k, _excess(value, stderr, tol, atol) <= 1, "xtrace")


def _left_out(R: np.ndarray, W: np.ndarray, T: np.ndarray, H: np.ndarray, n: int) -> tuple[float, float]:
    """Mean of the estimates that leave one test vector out each, and its standard error (section 2.3 of the paper).

    Q_i, the subspace without test vector i, is Q without the direction s_i = R^-T e_i. With u = (I - Q_i Q_i') omega_i =
    omega_i + Q c the estimate is tr Q_i'A Q_i + (n - k + 1) u'A u / |u|^2.
    """
    if not all(np.isfinite(x).all() for x in (R, W, T, H)):
        raise FloatingPointError("xtrace: a matrix-vector product is not finite")
    k = len(R)
    if k == n:  # Q fills the space: there is nothing to leave out, and what little u is left would lose its digits
        return float(np.trace(H)), 0.0
    triangle = R / (np.abs(np.diag(R)).max() or 1.0)
    np.fill_diagonal(triangle, np.maximum(np.diag(triangle), 1e-30))  # a missing rank: its direction in Q is as good as any
    S = np.eye(k)
    for a, row in enumerate(triangle.T):  # substitution; only directions matter, and several missing ranks would overflow
        S[a] = (S[a] - row[:a] @ S[:a]) / row[a]
        S /= np.maximum(np.abs(S[a]), 1)
    S /= np.linalg.norm(S, axis=0)
    C = S * (S * W).sum(0) - W
    length = n - (W**2).sum(0) + (S * W).sum(0) ** 2  # |u|^2
    form = (W * R).sum(0) + (T * C).sum(0) + (C * R).sum(0) + (C * (H @ C)).sum(0)  # u'A u
    each = np.trace(H) - (S * (H @ S)).sum(0) + (n - k + 1) * form / length
    if k == 1:  # nothing scatters
        return float(each[0]), np.inf
    wider = DEPENDENCE * np.sqrt(n / (n - k) * (k - 1) / (k - 3)) if k > 3 else np.inf
    return float(each.mean()), float(wider * each.std(ddof=1) / np.sqrt(k))


def _on_sphere(like: Tensor, generator: torch.Generator) -> Tensor:
    """(n,), uniform on the sphere of radius sqrt(n)."""
    v = torch.randn(like.numel(), generator=generator, device=generator.device, dtype=torch.float32).to(like)
    return v.mul_((like.numel() ** 0.5 / norm(v)).to(v.dtype))


def _mean(forms: np.ndarray, n: int) -> tuple[float, float]:
    """Mean of the forms v'A v, and its standard error by |A v|^2, of which |A|_F^2 is the mean. (2, m) -> two numbers."""
    if not np.isfinite(forms).all():
        raise FloatingPointError("trace: a matrix-vector product is not finite")
    m = forms.shape[1]
    if m == 0:
        return 0.0, 0.0
    trace, square = forms.mean(1)
    # (n + 2) m - 2 in the place of (n + 2) m: the square of the mean is too large by the mean's own variance
    return float(trace), float(np.sqrt(2 * max(n * square - trace**2, 0.0) / max((n + 2) * m - 2, 1)))


def _excess(value: float, stderr: float, tol: float | None, atol: float) -> float:
    """The standard error over what was asked for."""
    if tol is None and atol == 0:
        return 0.0
    allowed = max((tol or 0.0) * abs(value), atol)
    return stderr / allowed if allowed > 0 else (0.0 if stderr == 0 else np.inf)


def _until(
    grow: Callable[[int, int], tuple[float, float]], most: int, power: int, tol: float | None, atol: float
) -> tuple[float, float, int]:
    """Grow until the tolerance is met: looks are few and placed where the error will have fallen to it (as k^-power/2)."""
    k, upto = 0, most if tol is None and atol == 0 else min(FIRST_LOOK, most)
    while True:
        value, stderr = grow(k, upto)
        k, excess = upto, _excess(value, stderr, tol, atol)
        if excess <= 1 or k >= most:
            return value, stderr, k
        upto = min(int(np.clip(np.ceil(k * min(excess, 1e3) ** (2 / power)), k + (k + 3) // 4, 2 * k)), most)


def _check(number: int, least: int, call: str) -> None:
    if number < least:
        raise ValueError(f"{call}: too few products for one test vector; give more")

"""Numbers out of a Lanczos run: traces, counts and condition numbers (Golub and Meurant, 2010; Ubaru, Chen and Saad, 2017).

With a random start vector v, uniform on the sphere, n * sum_i w_i f(theta_i) estimates trace f(A); the standard errors
below are the exact ones of the quadratic form v' f(A) v (Var = 2 (n tr f^2 - tr^2 f) / (n + 2)), with the traces
themselves estimated from the same run. They cover the randomness of v, not the quadrature's own error.
"""

import numpy as np

from adaptive_opt.curvature.lanczos import Spectrum


def trace_estimate(spectra: list[Spectrum]) -> tuple[float, float]:
    """Estimate of trace(A) and its standard error, from runs with random start vectors."""
    return _estimate([_moments(s, s.ritz_values) for s in spectra], spectra[0].dim)


def estimate_below(spectra: list[Spectrum], threshold: float) -> tuple[float, float]:
    """Estimate of how many eigenvalues lie below `threshold`, and its standard error."""
    return _estimate([_moments(s, (s.ritz_values < threshold).astype(float)) for s in spectra], spectra[0].dim)


def count_below(spectrum: Spectrum, threshold: float) -> int:
    """Certified lower bound on the number of eigenvalues below `threshold` (Cauchy interlacing)."""
    return int((spectrum.ritz_values < threshold).sum())


def outer_ends(spectrum: Spectrum, failure: float = 0.01) -> tuple[float, float]:
    """(lower, upper): no eigenvalue lies outside, each but with probability `failure`, for a random start vector.

    Kuczynski and Wozniakowski (1992), theorem 4.2: after k steps the largest eigenvalue of a positive semi-definite matrix is
    missed by more than a share x of itself with probability 1.648 sqrt(n) exp(-sqrt(x) (2k - 1)) at most. Applied to
    A - lambda_min and lambda_max - A. It holds for start vectors uniform on the sphere only, not for warm ones; it is far
    from sharp for spectra with outliers. Infinite while the run is too short to say anything. A run with b start vectors counts
    as the k / b steps from one of them that it contains.
    """
    theta, n = spectrum.ritz_values, spectrum.dim
    low, high = float(theta[0] - spectrum.residuals[0]), float(theta[-1] + spectrum.residuals[-1])
    if spectrum.exhausted:
        return low, high
    steps = max(len(theta) // spectrum.block, 1)
    share = float((np.log(1.648 * np.sqrt(n) / failure) / (2 * steps - 1)) ** 2)
    if share >= 0.5:  # both ends are unknown: missed = share * (spread + missed at the one + missed at the other)
        return -np.inf, np.inf
    missed = share * float(theta[-1] - theta[0]) / (1 - 2 * share)
    return min(low, float(theta[0]) - missed), max(high, float(theta[-1]) + missed)


def condition_number_bound(spectrum: Spectrum) -> float:
    """Certified lower bound on |lambda|_max / |lambda|_min: epsilon / min_i (|theta_i| + residual_i).

    Exact when the Krylov space is exhausted and reaches every eigenvalue. Never infinite, because the residuals include the
    rounding; NaN for the zero operator.
    """
    smallest = float((np.abs(spectrum.ritz_values) + spectrum.residuals).min())
    return spectrum.epsilon / smallest if smallest > 0 else float("nan")


def effective_condition_number(spectrum: Spectrum) -> float:
    """The condition number that a step along the start vector g feels.

    r = (g'|A|g)(g'|A|^-1 g) / |g|^4 by Gauss quadrature; returned is the kappa for which Kantorovich's inequality
    r <= (kappa + 1)^2 / (4 kappa) is an equality. At least 1.
    """
    magnitude = np.maximum(np.abs(spectrum.ritz_values), spectrum.residuals)  # below its residual a value is unknown
    if not magnitude.max() > 0:
        return float("nan")
    w = _weights(spectrum)
    r = float((w * magnitude).sum() * (w / magnitude).sum())
    c = max(2 * r - 1, 1.0)
    return c + float(np.sqrt(c * c - 1))


def quadrature(spectrum: Spectrum, f: np.ndarray) -> np.ndarray:
    """n sum_i w_i f_i over the last axis of f, (..., k): estimates trace f(A). Raises ValueError after a restart."""
    return spectrum.dim * (f @ _weights(spectrum))


def _weights(spectrum: Spectrum) -> np.ndarray:
    if len(spectrum.weights) != len(spectrum.ritz_values):
        raise ValueError(
            f"a {spectrum.method} Lanczos run has no quadrature: estimates need one that kept its whole basis, or two passes"
        )
    return spectrum.weights


def _moments(spectrum: Spectrum, f: np.ndarray) -> tuple[float, float]:
    """n E[f] and n E[f^2] under the run's quadrature weights."""
    return float(quadrature(spectrum, f)), float(quadrature(spectrum, f**2))


def _estimate(moments: list[tuple[float, float]], n: int) -> tuple[float, float]:
    first, second = np.mean(np.array(moments), axis=0)
    variance = 2 * max(n * second - first**2, 0.0) / (n + 2) / len(moments)
    return float(first), float(np.sqrt(variance))

"""The spectral density by stochastic Lanczos quadrature (Lin, Saad and Yang, 2016)."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from adaptive_opt.curvature.lanczos import Spectrum
from adaptive_opt.curvature.quadrature import quadrature


@dataclass(frozen=True)
class Density:
    """How many eigenvalues there are per unit of eigenvalue, seen through a Gaussian."""

    grid: np.ndarray  # (g,), ascending eigenvalues
    values: np.ndarray  # (g,), >= 0; integrates to n over the real line
    stderr: np.ndarray  # (g,), of `values`
    width: float  # standard deviation of the Gaussian, in units of the eigenvalues


def density(spectra: Sequence[Spectrum], grid: np.ndarray | int = 400, width: float | None = None) -> Density:
    """sum_i N(t; lambda_i, width^2) at the points t of `grid`, estimated from runs with random start vectors.

    `grid` may be a number of points: evenly over the Ritz values and four widths on either side. `width` is 1 % of the spread
    of the Ritz values where it is not given; one below the distance of the Ritz values (some two spreads over the number of
    steps) shows them and not the spectrum. `stderr` is the larger of the quadratic form's own (see quadrature.py) and of the
    scatter over the runs, which the first does not see where the quadrature is coarse. Of a run only Ritz values and weights
    are read, and two-pass runs keep no basis: then the memory is that of one run, (5 n), however many there are.
    """
    if not spectra:
        raise ValueError("density(spectra=[]): at least one Lanczos run is needed")
    low = min(float(s.ritz_values[0]) for s in spectra)
    high = max(float(s.ritz_values[-1]) for s in spectra)
    if width is None:
        width = 0.01 * (high - low) or 0.01 * max(abs(high), abs(low)) or 0.01
    if not width > 0:
        raise ValueError(f"density(width={width}): a Gaussian of positive width")
    points = np.linspace(low - 4 * width, high + 4 * width, grid) if isinstance(grid, int) else np.asarray(grid, dtype=float)
    each = []
    for s in spectra:
        f = np.exp(-0.5 * ((points[:, None] - s.ritz_values) / width) ** 2) / (width * np.sqrt(2 * np.pi))  # (g, k)
        each.append((quadrature(s, f), quadrature(s, f**2)))
    (first, second), n, runs = np.mean(each, axis=0), spectra[0].dim, len(spectra)
    stderr = np.sqrt(2 * np.maximum(n * second - first**2, 0.0) / (n + 2) / runs)
    if runs > 1:
        stderr = np.maximum(stderr, np.std([values for values, _ in each], axis=0, ddof=1) / np.sqrt(runs))
    return Density(points, first, stderr, width)

"""Spectra of large symmetric operators by matrix-free products. Tensors only: this room knows no training."""

from adaptive_opt.curvature.jacobian import LayerSpectrum, layer_spectrum
from adaptive_opt.curvature.lanczos import Spectrum, lanczos
from adaptive_opt.curvature.operators import FiniteDifferenceHessian, Hessian, flatten, scaled, unflatten
from adaptive_opt.curvature.quadrature import (
    condition_number_bound,
    count_below,
    effective_condition_number,
    estimate_below,
    trace_estimate,
)

__all__ = [
    "FiniteDifferenceHessian",
    "Hessian",
    "LayerSpectrum",
    "Spectrum",
    "condition_number_bound",
    "count_below",
    "effective_condition_number",
    "estimate_below",
    "flatten",
    "lanczos",
    "layer_spectrum",
    "scaled",
    "trace_estimate",
    "unflatten",
]

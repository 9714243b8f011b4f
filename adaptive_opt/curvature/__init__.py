"""Spectra of large symmetric operators by matrix-free products. Tensors only: this room knows no training."""

from adaptive_opt.curvature.backend import BACKENDS, CURVATURES, CannotMeasure, Part, operator_on
from adaptive_opt.curvature.block_lanczos import block_lanczos
from adaptive_opt.curvature.budget import lanczos_within
from adaptive_opt.curvature.density import Density, density
from adaptive_opt.curvature.eigenpairs import Eigenpairs, top_eigenpairs
from adaptive_opt.curvature.golub_kahan import Bidiagonal, golub_kahan
from adaptive_opt.curvature.jacobian import Jacobian, LayerSpectrum, Point, layer_spectrum
from adaptive_opt.curvature.lanczos import Spectrum, lanczos
from adaptive_opt.curvature.low_rank import LowRank, randomized_eigh
from adaptive_opt.curvature.operators import FiniteDifferenceHessian, GaussNewton, Hessian, Operator, Rebuilt, Sum, scaled
from adaptive_opt.curvature.quadrature import (
    condition_number_bound,
    count_below,
    effective_condition_number,
    estimate_below,
    outer_ends,
    trace_estimate,
)
from adaptive_opt.curvature.questions import Question, ends, is_below, largest, negative_below, top
from adaptive_opt.curvature.rayleigh_ritz import RitzPair, top_ritz_pair
from adaptive_opt.curvature.shared_lanczos import Shares, shared_lanczos
from adaptive_opt.curvature.thick_restart import thick_restart_lanczos
from adaptive_opt.curvature.trace import TraceEstimate, hutchinson, hutchpp, xtrace
from adaptive_opt.curvature.two_pass import two_pass_lanczos
from adaptive_opt.curvature.vectors import flatten, unflatten, whole

__all__ = [
    "BACKENDS",
    "CURVATURES",
    "Bidiagonal",
    "CannotMeasure",
    "Density",
    "Eigenpairs",
    "FiniteDifferenceHessian",
    "GaussNewton",
    "Hessian",
    "Jacobian",
    "LayerSpectrum",
    "LowRank",
    "Operator",
    "Part",
    "Point",
    "Question",
    "Rebuilt",
    "RitzPair",
    "Shares",
    "Spectrum",
    "Sum",
    "TraceEstimate",
    "block_lanczos",
    "condition_number_bound",
    "count_below",
    "density",
    "effective_condition_number",
    "ends",
    "estimate_below",
    "flatten",
    "golub_kahan",
    "hutchinson",
    "hutchpp",
    "is_below",
    "lanczos",
    "lanczos_within",
    "largest",
    "layer_spectrum",
    "negative_below",
    "operator_on",
    "outer_ends",
    "randomized_eigh",
    "scaled",
    "shared_lanczos",
    "thick_restart_lanczos",
    "top",
    "top_eigenpairs",
    "top_ritz_pair",
    "trace_estimate",
    "two_pass_lanczos",
    "unflatten",
    "whole",
    "xtrace",
]

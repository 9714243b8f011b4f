"""Singular values of one layer's Jacobian on a batch, by Lanczos on J'J with vector products."""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from adaptive_opt.curvature.lanczos import lanczos


@dataclass(frozen=True)
class LayerSpectrum:
    """Singular values of J = d output / d input, block-diagonal over the samples of the batch."""

    sigma_max: float  # lower bound on the largest singular value over the batch
    sigma_max_error: float  # a singular value lies within this of sigma_max
    sigma_rms: float  # |J|_Frobenius / sqrt(number of outputs): 1 keeps the signal's mean square
    sigma_rms_error: float  # standard error


def layer_spectrum(output: Tensor, input: Tensor, start: Tensor, num_steps: int = 4) -> LayerSpectrum:
    """Largest and root-mean-square singular value of d output / d input.

    `output` must hang on `input` by a differentiable graph; `start` is a random vector of input.numel() entries. Each of
    the `num_steps` steps costs one product with J (by double backward) and one with J' (by backward) of this layer alone.
    """
    probe = torch.zeros_like(output, requires_grad=True)
    (pullback,) = torch.autograd.grad(output, input, probe, create_graph=True)  # J' u as a function of u, linear

    def gram(v: Tensor) -> Tensor:
        v = v.view_as(input).to(input.dtype)
        (jv,) = torch.autograd.grad(pullback, probe, v, retain_graph=True)
        (jtjv,) = torch.autograd.grad(output, input, jv, retain_graph=True)
        return jtjv.reshape(-1).to(start.dtype)

    spectrum = lanczos(gram, start, num_steps)
    d_in, d_out = input.numel(), output.numel()
    theta = np.maximum(spectrum.ritz_values, 0.0)
    mean, mean_square = float(spectrum.weights @ theta), float(spectrum.weights @ theta**2)
    sigma_max = float(np.sqrt(theta[-1]))
    stderr = np.sqrt(2 * max(mean_square - mean**2, 0.0) / (d_in + 2))  # of v'J'Jv for v uniform on the sphere
    rms = float(np.sqrt(mean * d_in / d_out))
    return LayerSpectrum(
        sigma_max=sigma_max,
        sigma_max_error=float(spectrum.residuals[-1] / max(sigma_max, 1e-30)),  # |s - t| <= |s^2 - t^2| / t
        sigma_rms=rms,
        sigma_rms_error=float(stderr * d_in / d_out / (2 * rms)) if rms > 0 else 0.0,
    )

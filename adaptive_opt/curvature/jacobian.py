"""Singular values of the Jacobian between two tensors of one graph, by Golub-Kahan bidiagonalisation with vector products."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, get_gradient_edge

from adaptive_opt.curvature.golub_kahan import golub_kahan


@dataclass(frozen=True)
class Point:
    """A tensor's place in the graph as it was when it was caught: what is done to it in place later does not move it."""

    edge: GradientEdge
    tensor: Tensor  # for its shape, dtype and device alone: its values may have moved on

    @classmethod
    def of(cls, tensor: Tensor | Point) -> Point:
        return tensor if isinstance(tensor, Point) else cls(get_gradient_edge(tensor), tensor)

    @property
    def numel(self) -> int:
        return self.tensor.numel()

    @property
    def eps(self) -> float:
        return float(torch.finfo(self.tensor.dtype).eps)

    def shaped(self, vector: Tensor) -> Tensor:
        return vector.view(self.tensor.shape).to(self.tensor.dtype)


class Jacobian:
    """J = d output / d input: products by double backward, with J' by backward. Only the graph between the two is walked.

    Raises RuntimeError where the output does not depend on the input, or where the graph has no second derivative.
    """

    def __init__(self, output: Tensor | Point, input: Tensor | Point):
        self.output, self.input = Point.of(output), Point.of(input)
        self.dtype = torch.promote_types(torch.promote_types(self.input.tensor.dtype, self.output.tensor.dtype), torch.float32)
        self.probe: Tensor = _Above.apply(torch.zeros_like(self.output.tensor, requires_grad=True), self.input.tensor)  # type: ignore[assignment]
        # J'u as a function of u, linear
        (self.pullback,) = torch.autograd.grad(self.output.edge, self.input.edge, self.probe, create_graph=True)

    def product(self, v: Tensor) -> Tensor:
        """(d_in,) -> (d_out,)."""
        (Jv,) = torch.autograd.grad(self.pullback, self.probe, self.input.shaped(v), retain_graph=True)
        return Jv.reshape(-1).to(self.dtype)

    def transposed(self, u: Tensor) -> Tensor:
        """(d_out,) -> (d_in,)."""
        (Jtu,) = torch.autograd.grad(self.output.edge, self.input.edge, self.output.shaped(u), retain_graph=True)
        return Jtu.reshape(-1).to(self.dtype)


class _Above(torch.autograd.Function):
    """The first tensor, placed in the graph above the second: autograd does not look below what it is asked for.

    Without it every double backward walks (not computes) the graph down to the model's first layer, and the cost of all
    layers grows with the square of their number.
    """

    @staticmethod
    def forward(x: Tensor, below: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def setup_context(ctx: object, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        pass

    @staticmethod
    def backward(ctx: object, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0], None


class Others(Protocol):
    """Processes that have other samples of the same batch."""

    size: int
    rank: int

    def total(self, x: Tensor) -> Tensor: ...


@dataclass(frozen=True)
class LayerSpectrum:
    """Singular values of J = d output / d input, block-diagonal over the samples of the batch.

    They are the min(d_in, d_out) of its singular value decomposition: zeros that the shape alone makes do not count.
    """

    sigma_max: float  # lower bound on the largest singular value over the batch
    sigma_max_error: float  # a singular value lies within this of sigma_max
    sigma_rms: float  # |J|_Frobenius / sqrt(number of outputs): 1 keeps the signal's mean square
    sigma_rms_error: float  # standard error
    sigma_min: float  # upper bound on the smallest singular value over the batch
    sigma_min_error: float  # a singular value lies within this of sigma_min


def layer_spectrum(
    output: Tensor | Point,
    input: Tensor | Point,
    generator: torch.Generator,
    num_steps: int = 4,
    others: Others | None = None,
) -> LayerSpectrum:
    """Largest, smallest and root-mean-square singular value of d output / d input.

    `output` must hang on `input` by a differentiable graph; `generator` draws the start vector, on the smaller side of J. Each
    of the `num_steps` steps costs one product with J (by double backward) and one with J' (by backward) of this layer alone.
    With `others` the samples are those of all processes, dealt out one by one: the numbers are the whole batch's.
    """
    J = Jacobian(output, input)
    wide = J.output.numel < J.input.numel
    side = (J.output if wide else J.input).tensor
    start = _start(side, generator, others).to(device=J.input.tensor.device, dtype=J.dtype)
    products = (J.transposed, J.product) if wide else (J.product, J.transposed)
    total = None if others is None or others.size == 1 else others.total
    b = golub_kahan(*products, start, num_steps, eps=max(J.input.eps, J.output.eps), total=total)
    square, square_error = b.frobenius()
    outputs = b.shape[1 if wide else 0]
    rms = (square / outputs) ** 0.5
    return LayerSpectrum(
        sigma_max=float(b.sigma[-1]),
        sigma_max_error=float(b.residuals[-1]),
        sigma_rms=rms,
        sigma_rms_error=square_error / outputs / (2 * rms) if rms > 0 else 0.0,
        sigma_min=float(b.sigma[0]),
        sigma_min_error=float(b.residuals[0]),
    )


def _start(side: Tensor, generator: torch.Generator, others: Others | None) -> Tensor:
    """(n,) standard normal. Of a batch dealt out over processes: this one's samples of the vector that one alone would draw."""
    size, rank = (1, 0) if others is None else (others.size, others.rank)
    v = torch.randn(side.numel() * size, generator=generator, device=generator.device, dtype=torch.float32)
    return v if size == 1 else v.view(-1, *side.shape[1:])[rank::size].reshape(-1)

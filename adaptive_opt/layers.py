"""Which modules count as layers, and their Jacobians' singular values on a few samples of a replay."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from adaptive_opt.curvature import layer_spectrum
from adaptive_opt.records import LayerReading

WEIGHTED = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.Bilinear)
ACTIVATIONS = (nn.ReLU, nn.LeakyReLU, nn.GELU, nn.SiLU, nn.Tanh, nn.Sigmoid, nn.ELU, nn.SELU, nn.Softplus, nn.Hardtanh)


@dataclass
class _Visit:
    """One call of a layer, with the activation that consumed its output if a module did."""

    name: str
    input: Tensor
    output: Tensor
    out: Tensor  # of the activation, else `output`


def measure_layers(
    model: nn.Module, evaluate: Callable[[], Tensor], generator: torch.Generator, num_steps: int = 4
) -> tuple[LayerReading, ...]:
    """Singular values and gradient gain of every linear or convolutional layer, at its first call in `evaluate()`."""
    visits = _visit(model, evaluate)
    if not visits:
        return ()
    loss, calls = visits
    points = [t for c in calls for t in (c.input, c.out)]
    grads = torch.autograd.grad(loss, points, retain_graph=True, allow_unused=True)
    readings = []
    for i, call in enumerate(calls):
        start = torch.randn(call.input.numel(), generator=generator, device=generator.device, dtype=torch.float32)
        start = start.to(device=call.input.device, dtype=torch.promote_types(call.input.dtype, torch.float32))
        try:
            s = layer_spectrum(call.out, call.input, start, num_steps)
        except (RuntimeError, FloatingPointError):
            continue  # a layer without a second derivative, or with a non-finite signal: not measured
        readings.append(
            LayerReading(
                call.name,
                s.sigma_max,
                s.sigma_max_error,
                s.sigma_rms,
                s.sigma_rms_error,
                _gain(grads[2 * i : 2 * i + 2]),
            )
        )
    return tuple(readings)


def _gain(grads: tuple[Tensor | None, ...]) -> float | None:
    at_input, at_output = grads
    if at_input is None or at_output is None:
        return None
    down, up = float(at_input.norm()), float(at_output.norm())
    return down / up if up > 0 else None


def _visit(model: nn.Module, evaluate: Callable[[], Tensor]) -> tuple[Tensor, list[_Visit]] | None:
    calls: list[_Visit] = []
    handles = []

    def before(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        if not args:  # called with keywords
            return args
        x = args[0]
        return args if x.requires_grad else (x.detach().requires_grad_(), *args[1:])  # the first layer's input is data

    def after(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
            if args and args[0].numel() and all(c.name != name for c in calls):
                calls.append(_Visit(name, args[0], output, output))

        return hook

    def activated(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
        if calls and args and args[0] is calls[-1].output:
            calls[-1].out = output

    for name, module in model.named_modules():
        if isinstance(module, WEIGHTED):
            handles += [module.register_forward_pre_hook(before), module.register_forward_hook(after(name))]
        elif isinstance(module, ACTIVATIONS) and not getattr(module, "inplace", False):
            handles.append(module.register_forward_hook(activated))
    try:
        loss = evaluate()
    finally:
        for handle in handles:
            handle.remove()
    return (loss, calls) if calls else None

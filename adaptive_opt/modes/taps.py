"""What K-FAC's own factors are made of: the inputs and output gradients of layers, by hooks (Martens and Grosse, 2015).

Shared weights (Eschenhagen et al., 2023): `expand` takes every position (token, pixel) as a sample of its own, `reduce`
averages the inputs and sums the output gradients of a sample over its positions.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from adaptive_opt.capture import Capture

KINDS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Embedding)
Observe = Callable[[int, nn.Module, Tensor, Tensor], None]


class LayerTaps:
    """Forward hooks on the layers of a model that hand each layer's input and output gradient to `observe`, in backward.

    params: position of each wrapped parameter by its id. `reasons` says, by position, why a weight in the model has no
    tap. Deaf while `armed` is False, during replays, and where no gradient is wanted.
    """

    def __init__(self, model: nn.Module, params: Mapping[int, int], observe: Observe):
        self.observe: Observe | None = observe
        self.armed = True
        self.tapped: set[int] = set()
        self.reasons: dict[int, str] = {}
        self.handles: list[Any] = []
        owners: dict[int, list[nn.Module]] = {}
        for module in model.modules():
            for p in module.parameters(recurse=False):
                owners.setdefault(id(p), []).append(module)
        for key, index in params.items():
            layers = owners.get(key, [])
            if len(layers) > 1:
                self.reasons[index] = "its weight is tied"
            elif not layers:
                self.reasons[index] = "it is not in the model"
            elif not isinstance(layers[0], KINDS) or id(getattr(layers[0], "weight", None)) != key:
                self.reasons[index] = f"{type(layers[0]).__name__} has no rule"
            else:
                self.tapped.add(index)
                self.handles.append(layers[0].register_forward_hook(_Tap(self, index), with_kwargs=True))

    def close(self) -> None:
        for handle in self.handles:
            handle.remove()
        self.observe = None

    def heard(self, index: int, module: nn.Module, x: Tensor, grad: Tensor) -> None:
        if self.observe is not None:
            with torch.no_grad():
                self.observe(index, module, x, grad.detach())


class _Tap:
    """One layer's forward hook."""

    def __init__(self, taps: LayerTaps | None, index: int):
        self.taps, self.index = taps, index

    def __reduce__(self) -> tuple[Any, ...]:
        return _Tap, (None, self.index)  # a copied or pickled model carries its hooks along: there they hear nothing

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        taps = self.taps
        if taps is None or not taps.armed or Capture.replaying or not torch.is_grad_enabled() or torch.compiler.is_compiling():
            return
        x = args[0] if args else kwargs.get("input")
        if isinstance(x, Tensor) and isinstance(output, Tensor) and output.requires_grad:
            x = x.detach()
            output.register_hook(lambda grad: taps.heard(self.index, module, x, grad))


def samples(module: nn.Module, x: Tensor, grad: Tensor, sharing: str) -> tuple[Tensor | None, Tensor]:
    """(a, g): inputs (rows, fan_in) of a layer and gradients (samples, out) at its output, one row a sample.

    With groups, every group's input is a row of its own, so a has `groups` times the rows. An embedding has no a: its
    inputs' factor is the diagonal of token counts, which no basis has to diagonalise.
    """
    if isinstance(module, nn.Embedding):
        g = grad.reshape(-1, grad.shape[-1])
        if module.padding_idx is not None:
            g = g * (x.reshape(-1, 1) != module.padding_idx)
        return None, g
    if isinstance(module, (nn.Conv1d, nn.Conv2d)):
        a, g = _patches(module, x), _positions(module, grad)
    else:
        a, g = (t.reshape(t.shape[0] if t.dim() > 1 else 1, -1, t.shape[-1]) for t in (x, grad))
    if sharing == "reduce":
        return a.mean(-2).flatten(0, -2), g.sum(-2)
    return a.flatten(0, -2), g.flatten(0, -2)


def _patches(conv: nn.Conv1d | nn.Conv2d, x: Tensor) -> Tensor:
    """(batch, groups, positions, fan_in): what the kernel meets at each output position."""
    flat = isinstance(conv, nn.Conv1d)
    x = x if x.dim() == (3 if flat else 4) else x.unsqueeze(0)
    mode = "constant" if conv.padding_mode == "zeros" else conv.padding_mode
    x = F.pad(x, conv._reversed_padding_repeated_twice, mode)
    x = x.unsqueeze(2) if flat else x
    kernel, dilation, stride = ((1, *t) if flat else t for t in (conv.kernel_size, conv.dilation, conv.stride))
    rows = F.unfold(x, kernel, dilation, 0, stride)  # pyright: ignore[reportArgumentType]
    return rows.unflatten(1, (conv.groups, -1)).transpose(2, 3)


def _positions(conv: nn.Conv1d | nn.Conv2d, grad: Tensor) -> Tensor:
    """(batch, positions, out)"""
    grad = grad if grad.dim() == (3 if isinstance(conv, nn.Conv1d) else 4) else grad.unsqueeze(0)
    return grad.flatten(2).transpose(1, 2)

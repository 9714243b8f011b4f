"""checkup: one full Reading of a model on data, without any optimizer: look before you ship."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from adaptive_opt.capture import Ambient, ModelCall, batch_size, device_of, map_tensors, rng_state, set_rng_state
from adaptive_opt.objective import Objective
from adaptive_opt.probe import LanczosProbe, ProbeMemory
from adaptive_opt.records import Reading


def checkup(
    model: nn.Module,
    loss_fn: Callable[[Any, Any], Tensor],
    data: Any,
    *,
    num_steps: int = 30,
    max_batches: int = 8,
    seed: int = 0,
) -> Reading:
    """Curvature and layers of `loss_fn(model(x), y)` on one batch `(x, y)` or on a DataLoader of such batches.

    The model is measured in the mode it is in (call `model.eval()` first for what inference sees) and left as it is.
    Batches count by their number of samples; at most `max_batches` are read. `stability` and `kappa_effective` belong to an
    optimizer and are None. Raises ValueError when there is no data or nothing requires gradients, and ReplayError when the
    loss is not a scalar tensor with a graph.
    """
    params = [p for p in model.parameters() if p.requires_grad]
    if not params:
        raise ValueError("checkup(model, ...): no parameter of the model requires gradients")
    rng = rng_state(device_of(model))
    batches = _batches(data, max_batches, device_of(model))
    set_rng_state(rng)  # a DataLoader draws its seed from the global generator
    source = _Batches(model, loss_fn, batches)
    if not any(source.sizes):
        raise ValueError("checkup(model, loss_fn, data): the data is empty")
    probe = LanczosProbe(every=1, num_steps=num_steps)
    memory = ProbeMemory(torch.Generator().manual_seed(seed))
    reading = probe.measure(Objective(source, params), None, model, memory, step=0, whole=True)
    return replace(reading, batch_size=sum(source.sizes))


class _Batches:
    """Mean loss over batches, each weighted by its number of samples."""

    cause = "the loss changed between two evaluations"

    def __init__(self, model: nn.Module, loss_fn: Callable[[Any, Any], Tensor], batches: list[tuple[Any, Any]]):
        self.model, self.loss_fn, self.batches = model, loss_fn, batches
        self.modules = [*model.modules(), *(loss_fn.modules() if isinstance(loss_fn, nn.Module) else ())]
        self._ambient = Ambient.now(self.modules, device_of(model))
        sizes = [batch_size(ModelCall(x, self._ambient)) for x, _ in batches]
        self.sizes = [1 if size is None else size for size in sizes]

    def evaluate(self) -> Tensor:
        self._ambient.meet(self.modules)
        whole = sum(self.sizes)
        parts = []
        for (x, y), size in zip(self.batches, self.sizes, strict=True):
            loss = self.loss_fn(self.model(x), y)
            if not isinstance(loss, Tensor) or loss.numel() != 1:
                return loss  # the objective says what is wrong with it
            parts.append(loss.reshape(()) * (size / whole))
        return torch.stack(parts).sum()


def _batches(data: Any, most: int, device: torch.device) -> list[tuple[Any, Any]]:
    pair = isinstance(data, (tuple, list)) and len(data) == 2 and isinstance(data[0], Tensor)
    stream: Iterable[Any] = [data] if pair else data
    found = []
    for batch in stream:
        if len(found) == most:
            break
        x, y = batch
        found.append((map_tensors(lambda t: t.to(device), x), map_tensors(lambda t: t.to(device), y)))
    return found

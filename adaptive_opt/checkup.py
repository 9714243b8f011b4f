"""checkup: one full Reading of a model on data, without any optimizer: look before you ship."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from difflib import get_close_matches
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from adaptive_opt.capture import Ambient, ModelCall, batch_size, device_of, map_tensors, original, rng_state, set_rng_state
from adaptive_opt.memory import ProbeMemory
from adaptive_opt.objective import Objective
from adaptive_opt.probe import LanczosProbe
from adaptive_opt.records import Reading


def checkup(
    model: nn.Module,
    loss_fn: Callable[[Any, Any], Tensor],
    data: Any,
    *,
    num_steps: int = 30,
    max_batches: int = 8,
    seed: int = 0,
    only: Sequence[str] = (),
    curvature: str = "hessian",
    backend: str | None = None,
    memory: int | None = None,
    layers: Sequence[str] = ("weight",),
) -> Reading:
    """Curvature and layers of `loss_fn(model(x), y)` on one batch `(x, y)` or on a DataLoader of such batches.

    The model is measured in the mode it is in (call `model.eval()` first for what inference sees) and left as it is. Batches
    count by their number of samples; at most `max_batches` are read. The Hessian is that of their mean loss, the layers are
    those of the first batch. Of several processes each measures its own data (with FSDP2 all must call it: parameters are
    gathered). `stability` and `kappa_effective` belong to an optimizer and are None. only: names of modules or parameters, for
    the Hessian's block of these alone. curvature, backend, memory, layers: as in LanczosProbe. `verdict` says what the reading
    means. Raises ValueError when there is no data or nothing requires gradients, and ReplayError when the
    loss is not a scalar tensor with a graph.
    """
    model = original(model)  # no reducer of DistributedDataParallel, which would wait for a backward pass
    params = _params(model, only)
    rng = rng_state(device_of(model))
    batches = _batches(data, max_batches, device_of(model))
    set_rng_state(rng)  # a DataLoader draws its seed from the global generator
    source = _Batches(model, loss_fn, batches)
    if not any(source.sizes):
        raise ValueError("checkup(model, loss_fn, data): the data is empty")
    probe = LanczosProbe(
        every=1,
        num_steps=num_steps,
        curvature=curvature,
        backend=backend,
        memory=memory,
        layers=tuple(layers),
        lipschitz=True,
    )
    state = ProbeMemory(torch.Generator().manual_seed(seed))
    reading = probe.measure(Objective(source, params), None, model, state, step=0, whole=True)
    return replace(reading, batch_size=sum(source.sizes))


def _params(model: nn.Module, only: Sequence[str]) -> list[Tensor]:
    """The parameters to measure, each once."""
    if isinstance(only, str):
        raise TypeError(f"checkup(only={only!r}): a list of names, for example only=[{only!r}]")
    names = {name for name, _ in model.named_modules()} | {name for name, _ in model.named_parameters(remove_duplicate=False)}
    unknown = [name for name in only if name not in names]
    if unknown:
        near = [n for u in unknown for n in get_close_matches(u, names, 2)]
        hint = f"; near: {', '.join(near)}" if near else ""
        raise ValueError(f"checkup(only={list(only)!r}): the model has no module or parameter {unknown[0]!r}{hint}")
    found = {
        id(p): p
        for name, p in model.named_parameters(remove_duplicate=False)
        if p.requires_grad and (not only or any(name == o or name.startswith(o + ".") for o in only))
    }
    if not found:
        of = f"only={list(only)!r}" if only else "model, ..."
        raise ValueError(f"checkup({of}): no parameter of the model requires gradients")
    return list(found.values())


class _Batches:
    """Mean loss over batches, each weighted by its number of samples."""

    cause = "the loss changed between two evaluations"

    def __init__(self, model: nn.Module, loss_fn: Callable[[Any, Any], Tensor], batches: list[tuple[Any, Any]]):
        self.model, self.loss_fn, self.batches = model, loss_fn, batches
        self.modules = [*model.modules(), *(loss_fn.modules() if isinstance(loss_fn, nn.Module) else ())]
        self._ambient = Ambient.now(self.modules, device_of(model))
        sizes = [batch_size(ModelCall(x, self._ambient)) for x, _ in batches]
        self.sizes = [1 if size is None else size for size in sizes]

    @property
    def pieces(self) -> list[Callable[[], Any]]:
        """One evaluation a batch; the sum of them is the mean loss."""
        return [partial(self._piece, i) for i in range(len(self.batches))]

    def evaluate(self) -> Tensor:
        parts = [piece() for piece in self.pieces]
        wrong = next((p for p in parts if not isinstance(p, Tensor) or p.numel() != 1), None)
        return wrong if wrong is not None else torch.stack(parts).sum()  # the objective says what is wrong with it

    def _piece(self, i: int) -> Any:
        self._ambient.meet(self.modules)
        x, y = self.batches[i]
        loss = self.loss_fn(self.model(x), y)
        if not isinstance(loss, Tensor) or loss.numel() != 1:
            return loss
        return loss.reshape(()) * (self.sizes[i] / sum(self.sizes))


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

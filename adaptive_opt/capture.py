"""Remembers the batch of the present step: forward hooks on the model and the loss, and the weight that backward gave it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from copy import copy
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from adaptive_opt.moving import Kept, MovingBuffers
from adaptive_opt.parallel import active_ddp, ddp_in, team_of
from adaptive_opt.sharded import is_sharded, refusal

KEEP_STEPS = 3  # steps (and clearings of the gradients) for which a forward pass waits for its backward
KEEP_UNUSED = 8  # forward passes without a backward (validation, GAN) that are remembered before the oldest goes


class Ambient(NamedTuple):  # made at every forward pass: a frozen dataclass takes three times as long
    """The state around a forward pass that a replay must meet again."""

    rng: dict[str, Tensor]  # device type (and index) -> generator state
    autocast: tuple[str, bool, torch.dtype | None]  # device type, on, its dtype where it is on
    training: tuple[bool, ...]  # mode of each module, in the order of modules()
    buffers: Kept  # those that the pass moves and its output hangs on

    @classmethod
    def now(cls, modules: Iterable[nn.Module], device: torch.device, moving: MovingBuffers | None = None) -> Ambient:
        kind = device.type
        cast = (kind, True, torch.get_autocast_dtype(kind)) if torch.is_autocast_enabled(kind) else (kind, False, None)
        training = tuple([m.training for m in modules])
        kept = moving.before(training) if moving is not None and moving.watched else []
        return cls(rng_state(device), cast, training, kept)

    def meet(self, modules: Iterable[nn.Module]) -> None:
        """Generators, modes and moving buffers as they were then. In a replay only: it lends buffers and puts them back."""
        set_rng_state(self.rng)
        for module, mode in zip(modules, self.training, strict=True):
            module.training = mode
        for module, name, kept in self.buffers:
            module._buffers[name] = kept.clone()


def rng_state(device: torch.device) -> dict[str, Tensor]:
    """States of the CPU generator and, if there is one, of the device's."""
    states = {"cpu": torch.default_generator.get_state()}
    if device.type != "cpu":
        states[str(device)] = torch.get_device_module(device).get_rng_state(device)
    return states


def set_rng_state(states: Mapping[str, Tensor]) -> None:
    for name, state in states.items():
        if name == "cpu":
            torch.set_rng_state(state)
        else:
            torch.get_device_module(torch.device(name)).set_rng_state(state, torch.device(name))


@dataclass(frozen=True, slots=True)
class Slot:
    """Stands in a loss call's arguments where the model's output, or a view of it, goes."""

    index: int  # which tensor of the model's output
    view: tuple[torch.Size, tuple[int, ...], int] | None  # size, stride, offset; None: the tensor itself
    rows: int | None  # the view is a plain reshape with that many rows for each row of the output
    dtype: torch.dtype | None = None  # the tensor itself in another dtype, as in criterion(model(x).float(), y)

    def fill(self, outputs: Sequence[Tensor]) -> Tensor:
        out = outputs[self.index]
        if self.view is None:
            return out if self.dtype is None else out.to(self.dtype)
        size, stride, offset = self.view
        if self.rows is not None:
            return out.reshape(self.rows * out.shape[0], *size[1:])
        return out.as_strided(size, stride, out.storage_offset() + offset)


FIRST = Slot(0, None, None)
CPU = torch.device("cpu")


@dataclass(slots=True)
class LossCall:
    """One evaluation of the loss on a model call's output."""

    args: Any  # (args, kwargs) with Slots; None: the model's own output.loss
    value: Tensor  # detached
    weight: Tensor | None = None  # d(what the user called backward on) / d(this loss); None until backward ran


@dataclass(slots=True)
class ModelCall:
    """One forward pass of the model and the losses taken of it."""

    inputs: Any  # (args, kwargs), by reference
    ambient: Ambient
    outputs: Sequence[Tensor] | None = None  # let go of when backward has run
    output_rows: tuple[int, ...] = ()  # first dimension of each output tensor
    losses: list[LossCall] = field(default_factory=list)
    refusal: str | None = None  # why this call cannot be replayed
    elsewhere: int = 0  # versions of the parameters that the optimizer does not hold
    task: int = -1  # of autograd's: the backward pass that gave a weight first
    age: int = 0  # how often the gradients were cleared or stepped on since
    weighted: bool = False  # one of the losses has its weight


class Capture:
    """Forward hooks on `model` and `loss_fn` that remember, by reference, what the next step is made of."""

    replaying = 0  # of the class: one optimizer's replay is no batch of another that listens to the same model

    def __init__(self, model: nn.Module, loss_fn: nn.Module | None, params: Sequence[Tensor] = ()):
        self.model = original(model)
        self.loss_fn = loss_fn
        self.hold(params)
        self.modules = [*self.model.modules(), *(loss_fn.modules() if loss_fn is not None else ())]
        self.first = next(self.model.parameters(), None)  # where the model is: asking the model takes longer
        self.moving = MovingBuffers(self.modules)
        self.calls: list[ModelCall] = []
        self.armed = True  # False only for what a copied model took along
        self.problem: str | None = None  # why the latest loss could not be captured
        self.unreplayable = refusal(self.model)  # for good
        self.team, self.ddp = team_of(model), ddp_in(model)
        # what it is given there is on the right device
        inside = model.module if isinstance(model, DistributedDataParallel) else model
        self.handles = [
            inside.register_forward_pre_hook(self._before_model, with_kwargs=True),
            model.register_forward_hook(self._after_model),
        ]
        if loss_fn is not None:
            self.handles.append(loss_fn.register_forward_hook(self._after_loss, with_kwargs=True))

    @property
    def listening(self) -> bool:
        # Inside a traced graph nothing can be remembered: hooks on the module that torch.compile returns run outside it.
        return self.armed and not Capture.replaying and torch.is_grad_enabled() and not torch.compiler.is_compiling()

    def __reduce__(self) -> tuple[Any, ...]:
        return _deaf, ()  # a copied or pickled model carries its hooks along: there they hear nothing

    def hold(self, params: Sequence[Tensor]) -> None:
        """The parameters that the optimizer holds; the model's others are another's to move."""
        mine = {id(p) for p in params}
        self.params = list(params)
        self.others = [p for p in self.model.parameters() if id(p) not in mine]

    def moved_elsewhere(self) -> bool:
        """Parameters that the optimizer does not hold have changed since the forward pass."""
        now = sum([p._version for p in self.others])
        return any(call.elsewhere != now for call in self.step_calls())

    def close(self) -> None:
        for handle in self.handles:
            handle.remove()
        self.calls.clear()

    def step_calls(self) -> list[ModelCall]:
        """The calls whose loss went backward since the last step: what p.grad is made of."""
        return [call for call in self.calls if call.weighted or call.refusal]

    def forget_used(self) -> None:
        """Drop what has gone backward: the step is done, or the gradients were cleared. Forgotten passes go soon after."""
        if len(self.calls) == 1 and self.calls[0].weighted:  # as in almost every step
            self.calls = []
            return
        self.calls = [call for call in self.calls if not (call.weighted or call.refusal) and call.age < KEEP_STEPS]
        for call in self.calls:
            call.age += 1

    def _drop_cleared(self, task: int) -> None:
        """Cleared without us, by model.zero_grad() after a skipped step: what went backward before is in no gradient."""
        earlier = any(c.weighted and c.task != task for c in self.calls)
        if earlier and not any(_holds(p.grad) for p in self.params):
            self.calls = [c for c in self.calls if not c.weighted or c.task == task]

    def loss(self) -> Tensor | None:
        """Weighted mean of the losses that went backward, on the device; None without any."""
        pairs = [(c.value, c.weight) for call in self.calls for c in call.losses if c.weight is not None]
        if not pairs:
            return None
        value, weight = pairs[0]
        if len(pairs) == 1 and weight.is_cpu and weight.numel() == 1 and float(weight) == 1:  # almost always: itself
            return value.reshape(()).float()
        total = torch.stack([(v * w).sum().float() for v, w in pairs]).sum()
        # absolute values: in a difference of two losses the weights add up to nothing
        return total / torch.stack([w.abs().sum().float() for _, w in pairs]).sum().clamp_min(torch.finfo(torch.float32).tiny)

    def _before_model(self, module: nn.Module, args: tuple, kwargs: dict) -> None:
        if not self.listening:
            return
        ddp = active_ddp()
        if ddp is not None and ddp is not self.ddp:
            self._meet_team(ddp)
        if len(self.calls) >= KEEP_UNUSED:
            unused = [call for call in self.calls if not call.weighted]
            if len(unused) >= KEEP_UNUSED:
                self.calls.remove(unused[0])
        device = CPU if self.first is None else self.first.device
        plain = not kwargs and all(type(x) is Tensor and not x.requires_grad for x in args)  # there is nothing to copy
        inputs = (args, kwargs) if plain else map_leaves(_ungraphed, (args, kwargs))
        call = ModelCall(inputs, Ambient.now(self.modules, device, self.moving))
        if self.others:
            call.elsewhere = sum([p._version for p in self.others])
        self.calls.append(call)

    def _meet_team(self, ddp: DistributedDataParallel) -> None:
        """Frameworks wrap the model after the optimizer was made: inside of the wrapper's forward pass it can be seen."""
        if any(m is self.model for m in ddp.modules()):
            self.ddp, self.team = ddp, team_of(ddp)

    def _after_model(self, module: nn.Module, args: tuple, output: Any) -> None:
        if not (self.listening and self.calls):
            return
        call = self.calls[-1]
        if self.moving.watched:
            self.moving.after(call.ambient.training, call.ambient.buffers)
        call.outputs = outputs = (output,) if type(output) is Tensor else tuple(tensors_in(output))
        call.output_rows = tuple([t.shape[0] if t.dim() else 0 for t in outputs])
        if self.loss_fn is None:
            loss = own_loss(output)
            if loss is None:
                self.problem = "the model's output has no .loss and no loss_fn was given"
            else:
                self._watch(call, None, loss)

    def _after_loss(self, module: nn.Module, args: tuple, kwargs: dict, loss: Any) -> None:
        if not self.listening:
            return
        if not isinstance(loss, Tensor):
            self.problem = f"loss_fn returned {type(loss).__name__}, not a tensor"
            return
        owner = self._owner((args, kwargs))
        if owner is None:
            self._refuse(loss)
            return
        call, filled = owner
        self._watch(call, filled, loss)

    def _refuse(self, loss: Tensor) -> None:
        """Say why this loss cannot be replayed; it matters if backward passes through it."""
        self.problem = problem = (
            "loss_fn was given a tensor that is neither the model's output nor a view or cast of it; move the computation "
            "between model and loss_fn into one of them, or pass objective="
            if self.calls
            else "loss_fn was called, the model was not; give the very module that the training loop calls "
            "(what torch.compile returned, not what it compiled)"
        )
        if self.calls and loss.requires_grad:
            call = self.calls[-1]

            def on_backward(grad: Tensor) -> None:
                call.refusal = problem

            loss.register_hook(on_backward)

    def _owner(self, arguments: Any) -> tuple[ModelCall, Any] | None:
        """The latest model call whose outputs explain every tensor that carries a graph; with Slots put in."""
        for call in reversed(self.calls):
            if not call.outputs:
                continue
            outputs, (args, kwargs) = call.outputs, arguments
            if args and args[0] is outputs[0] and not kwargs and all(map(_bare, args[1:])):
                return call, ((FIRST, *args[1:]), {})  # criterion(model(x), y)
            seen = {"slots": 0, "missing": 0}

            def place(x: Any, outputs: Sequence[Tensor] = outputs, seen: dict[str, int] = seen) -> Any:
                if not isinstance(x, Tensor):
                    return x
                slot = find_slot(x, outputs)
                seen["slots"] += slot is not None
                seen["missing"] += slot is None and x.grad_fn is not None
                return x if slot is None else slot

            placed = map_leaves(place, arguments)
            if seen["slots"] and not seen["missing"]:
                return call, placed
        return None

    def _watch(self, call: ModelCall, arguments: Any, loss: Tensor) -> None:
        """Remember the loss and learn its weight when backward passes through it."""
        if not loss.requires_grad:
            self.problem = "the loss has no graph: nothing in it requires gradients"
            return
        self.problem = None
        record = LossCall(arguments, loss.detach())
        call.losses.append(record)

        def on_backward(grad: Tensor) -> None:
            grad = grad.detach() if grad.requires_grad else grad
            record.weight = grad if record.weight is None else record.weight + grad
            call.outputs = None  # the graph may go
            if not call.weighted:
                call.weighted, call.task = True, torch._C._current_graph_task_id()
                if len(self.calls) > 1:
                    self._drop_cleared(call.task)

        loss.register_hook(on_backward)


def _bare(x: object) -> bool:
    """A tensor with a storage of its own and no graph: of no model's output."""
    return type(x) is Tensor and x.grad_fn is None and not x._is_view()


def _holds(grad: Tensor | None) -> bool:
    """There is a gradient that is not zero. It is looked at, which waits for the device, only if it was written to in place."""
    if grad is None or grad._version == 0:
        return grad is not None
    here: Any = grad._values() if grad.is_sparse else grad
    here = here.to_local() if is_sharded(here) else here
    return not here.numel() or bool(here.any())


def _deaf() -> Capture:
    capture = Capture.__new__(Capture)
    capture.armed = False
    return capture


def evaluate(model: nn.Module, loss_fn: nn.Module | None, calls: list[ModelCall], enter: Callable[[Ambient], Any]) -> Tensor:
    """The captured loss again, with a fresh graph: sum over the calls of weight * loss. `enter` sets the ambient state."""
    total: Tensor | None = None
    for call in calls:
        with enter(call.ambient):
            args, kwargs = call.inputs
            output = model(*args, **kwargs)
            outputs = list(tensors_in(output))
            for record in call.losses:
                if record.weight is None:
                    continue
                if record.args is None:
                    loss = own_loss(output)
                else:
                    largs, lkwargs = map_leaves(lambda x: x.fill(outputs) if isinstance(x, Slot) else x, record.args)
                    assert loss_fn is not None  # records with arguments come from a loss_fn
                    loss = loss_fn(*largs, **lkwargs)
                assert loss is not None  # the same model on the same inputs gave one before
                part = (loss * record.weight).sum()
                total = part if total is None else total + part
    if total is None:
        raise RuntimeError("nothing captured: no loss has gone backward since the last step")
    return total


def share(calls: list[ModelCall], fraction: float) -> float | None:
    """The part of the samples that `subset` keeps; None if the batch cannot be cut. Touches no tensor."""
    keep = max(1, round(fraction * len(calls)))
    sizes = [batch_size(c) if keep < len(calls) else rows_kept(c, fraction) for c in calls[:keep]]
    whole = sum(batch_size(call) or 0 for call in calls)
    return None if None in sizes or not whole else sum(size or 0 for size in sizes) / whole


def subset(calls: list[ModelCall], loss_fn: nn.Module | None, fraction: float) -> list[ModelCall]:
    """The first samples of a batch that can be cut (see `share`), as calls of their own."""
    keep = max(1, round(fraction * len(calls)))
    if keep < len(calls):  # some of the micro-batches, in the place of all
        return [_weighted(call, len(calls) / keep) for call in calls[:keep]]
    return [_cut(call, loss_fn, fraction) for call in calls]


def rows_kept(call: ModelCall, fraction: float) -> int | None:
    """How many samples a cut leaves; None where the first dimension of what the loss sees is not the batch."""
    whole = batch_size(call)
    if whole is None:
        return None
    slots = [x for record in call.losses for x in leaves(record.args) if isinstance(x, Slot)]
    if any(call.output_rows[s.index] != whole or (s.view is not None and s.rows is None) for s in slots):
        return None
    return max(1, round(fraction * whole))


def batch_size(call: ModelCall) -> int | None:
    """First dimension of the first tensor among the model's inputs."""
    args: Any = call.inputs[0] if isinstance(call.inputs, tuple) and call.inputs else ()
    plain = isinstance(args, tuple) and args and isinstance(args[0], Tensor)  # as in almost every step, which asks for it
    first = args[0] if plain else next(tensors_in(call.inputs), None)
    return None if first is None or first.dim() == 0 else first.shape[0]


def _weighted(call: ModelCall, scale: float) -> ModelCall:
    losses = [LossCall(r.args, r.value, None if r.weight is None else r.weight * scale) for r in call.losses]
    return ModelCall(call.inputs, call.ambient, None, call.output_rows, losses, call.refusal)


def _cut(call: ModelCall, loss_fn: nn.Module | None, fraction: float) -> ModelCall:
    whole, rows = batch_size(call), rows_kept(call, fraction)
    assert whole is not None  # or `share` would have said so
    assert rows is not None

    def head(t: Any) -> Any:
        if isinstance(t, Tensor) and t.dim() and t.shape[0] and t.shape[0] % whole == 0:
            return t[: t.shape[0] // whole * rows]  # targets flattened to B*T rows are cut alike
        return t

    losses = []
    for record in call.losses:
        weight = record.weight
        if weight is not None and weight.dim():  # per-sample weights: the mean over fewer samples
            weight = head(weight) * (whole / rows)
        elif weight is not None and getattr(loss_fn, "reduction", "mean") == "sum":
            weight = weight * (whole / rows)
        losses.append(LossCall(map_leaves(head, record.args), record.value, weight))
    return ModelCall(map_leaves(head, call.inputs), call.ambient, None, (), losses)


def find_slot(t: Tensor, outputs: Sequence[Tensor]) -> Slot | None:
    for index, out in enumerate(outputs):
        if t is out:
            return Slot(index, None, None)
    for index, out in enumerate(outputs):
        if t._is_view() and t.untyped_storage().data_ptr() == out.untyped_storage().data_ptr() and t.dtype == out.dtype:
            view = (t.size(), t.stride(), int(t.storage_offset() - out.storage_offset()))
            plain = t.is_contiguous() and out.is_contiguous() and t.numel() == out.numel() and t.dim() and out.dim()
            rows = t.shape[0] // out.shape[0] if plain and out.shape[0] and t.shape[0] % out.shape[0] == 0 else None
            return Slot(index, view, rows)
        made_by = t.grad_fn if t.shape == out.shape and out.grad_fn is not None else None
        if made_by is not None and made_by.name() == "_DDPSinkBackward":  # DDP passes a model's outputs through it
            before = made_by.next_functions[t.output_nr][0]
            if before is out.grad_fn:
                return Slot(index, None, None)
        if made_by is not None and made_by.name() == "ToCopyBackward0" and made_by.next_functions[0][0] is out.grad_fn:
            return Slot(index, None, None, t.dtype)
    return None


def own_loss(output: Any) -> Tensor | None:
    """`output.loss` of a Hugging Face model, or output["loss"]."""
    loss = output.get("loss") if isinstance(output, Mapping) else getattr(output, "loss", None)
    return loss if isinstance(loss, Tensor) else None


def original(module: nn.Module) -> nn.Module:
    """The module behind torch.compile and DistributedDataParallel: no graph without a second derivative, no reducer."""
    inner = module.module if isinstance(module, DistributedDataParallel) else getattr(module, "_orig_mod", module)
    return module if inner is module else original(inner)


def device_of(module: nn.Module) -> torch.device:
    first = next(module.parameters(), None)
    return torch.device("cpu") if first is None else first.device


def map_leaves(fn: Callable[[Any], Any], tree: Any) -> Any:
    """fn on every leaf of nested tuples, lists and mappings; other objects are leaves."""
    if isinstance(tree, (tuple, list)):
        mapped = [map_leaves(fn, x) for x in tree]
        return type(tree)(*mapped) if hasattr(tree, "_fields") else type(tree)(mapped)
    if isinstance(tree, dict):
        mapped = {k: map_leaves(fn, x) for k, x in tree.items()}
        return mapped if type(tree) is dict else _alike(tree, mapped)
    return fn(tree)


def _alike(tree: dict[Any, Any], mapped: dict[Any, Any]) -> dict[Any, Any]:
    """A dict of the same class, whose entries may be attributes too: a Hugging Face output."""
    other = copy(tree)
    for k, x in mapped.items():
        other[k] = x
    return other


def _ungraphed(x: Any) -> Any:
    """Not the graph that made an input: it would be kept alive until the step."""
    return x.detach().requires_grad_() if isinstance(x, Tensor) and x.requires_grad else x


def map_tensors(fn: Callable[[Tensor], Any], tree: Any) -> Any:
    return map_leaves(lambda x: fn(x) if isinstance(x, Tensor) else x, tree)


def leaves(tree: Any) -> Iterator[Any]:
    if isinstance(tree, (tuple, list)):
        for x in tree:
            yield from leaves(x)
    elif isinstance(tree, Mapping):
        for x in tree.values():
            yield from leaves(x)
    else:
        yield tree


def tensors_in(tree: Any) -> Iterator[Tensor]:
    return (x for x in leaves(tree) if isinstance(x, Tensor))

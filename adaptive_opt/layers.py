"""Which modules count as layers, and their Jacobians' singular values on a few samples of a replay."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from adaptive_opt.curvature import Point, layer_spectrum
from adaptive_opt.curvature.vectors import accumulator
from adaptive_opt.parallel import ALONE, Team
from adaptive_opt.records import LayerReading

WEIGHTED = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.Bilinear)
PLAIN = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
NORMS = (
    nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm,
    nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d,
)  # fmt: skip
CELLS = (nn.RNNCell, nn.LSTMCell, nn.GRUCell)  # the next hidden state with respect to the one before
SEQUENCES = (nn.RNN, nn.LSTM, nn.GRU)  # the output sequence with respect to the input sequence
KINDS: dict[str, tuple[type[nn.Module], ...]] = {
    "weight": WEIGHTED,
    "norm": NORMS,
    "attention": (nn.MultiheadAttention,),  # with respect to the query; given thrice, the whole self-attention map
    "rnn": CELLS + SEQUENCES,
}
ACTIVATIONS = (nn.ReLU, nn.LeakyReLU, nn.GELU, nn.SiLU, nn.Tanh, nn.Sigmoid, nn.ELU, nn.SELU, nn.Softplus, nn.Hardtanh)
WAY = 32  # operations between two layers, at most
SAME = 0.01  # of a gradient's norm: reshaping and pooling keep it, normalisations and skip connections change it


@dataclass
class _Visit:
    """The first call of a layer: between which two points of the graph its Jacobian lies, or why there is none."""

    name: str
    kind: str
    input: Point | None = None
    source: Any = None  # node of the graph that the input came from
    output: Point | None = None  # of the activation that consumed the layer's output, if a module did
    problem: str = ""
    fed: Tensor | None = None  # (n + 1,) sums of squares of the features and their count, where the input is data


def measure_layers(
    model: nn.Module,
    evaluate: Callable[[], Tensor],
    generator: torch.Generator,
    num_steps: int = 4,
    kinds: Sequence[str] = ("weight",),
    names: Sequence[str] = (),
    team: Team = ALONE,
) -> tuple[tuple[LayerReading, ...], tuple[str, ...]]:
    """Singular values and gradient gain of the model's layers, at their first call in `evaluate()`; and what was skipped.

    `kinds` names classes of layers: "weight" (linear and convolutional, with the activation that follows; with it come the
    hidden-to-hidden matrices of vanilla RNNs, of kind "recurrent", whose numbers are those of the matrix alone), "norm",
    "attention", "rnn". `names` adds modules by their name in `model.named_modules()`; one of no known kind is measured from
    the first floating tensor among its arguments to the first of its output, and its kind is "module". The cost is one
    gradient, and `num_steps` products with each layer's Jacobian and its transpose, which compute nothing outside. What cannot
    be measured is named with the reason in the second value. Of a `team` the samples are those of all processes. Raises
    ValueError on a kind or name that there is not.
    """
    visits = _chosen(model, kinds, names)
    lengths = {m: 0 for m in model.modules() if isinstance(m, nn.RNN) and "weight" in kinds}
    if not visits and not lengths:
        return (), ()
    with twice_differentiable(model):
        loss = team.together(lambda: _watch(model, evaluate, visits, lengths))
    if not team.same([(v.name, v.input is None, v.output is None, v.problem) for v in visits.values()]):
        return (), ("another process called other layers",)
    met = [v for v in visits.values() if v.input is not None and v.output is not None]
    ends = [p.edge for v in met for p in (v.input, v.output) if p is not None]
    grads = torch.autograd.grad(loss, ends, retain_graph=True, allow_unused=True) if ends else ()
    gains, same = _gains([v.name for v in met], grads, team)
    leading = [(a, b) for a, b in pairwise(met) if b.name in same and _leads(a, b)]
    chained = {b.name for _, b in leading}
    copies = {a.name: _copies(model.get_submodule(a.name), model.get_submodule(b.name)) for a, b in leading}
    readings, skipped = [], []
    for visit in visits.values():
        if visit.input is None and not visit.problem and visit.name not in names:
            continue  # the replay did not call it, and nobody asked for it
        try:
            reading = _measure(visit, generator, num_steps, gains.get(visit.name), team)
            readings.append(replace(reading, chained=visit.name in chained, copies=copies.get(visit.name)))
        except (RuntimeError, FloatingPointError) as error:  # no second derivative, or a signal that is not finite
            skipped.append(f"{visit.name} not measured ({str(error).partition(chr(10))[0]})")
    for name, module in model.named_modules():
        if lengths.get(module):  # pyright: ignore[reportArgumentType]
            readings += _recurrent(name, module, lengths[module])  # pyright: ignore[reportArgumentType]
    return tuple(readings), tuple(skipped)


def with_drift(layers: Sequence[LayerReading], first: Sequence[LayerReading]) -> tuple[LayerReading, ...]:
    """The same readings with `drift` = log(sigma_rms now / in `first`); None for a layer that passes nothing or is new."""
    before = {layer.name: layer.sigma_rms for layer in first if layer.sigma_rms > 0}
    return tuple(
        replace(layer, drift=math.log(layer.sigma_rms / before[layer.name]))
        if layer.name in before and layer.sigma_rms > 0
        else layer
        for layer in layers
    )


@contextmanager
def twice_differentiable(model: nn.Module) -> Iterator[None]:
    """Recurrent layers by PyTorch's own kernels: cuDNN's and oneDNN's have no second derivative."""
    if not any(isinstance(m, nn.RNNBase) for m in model.modules()):
        yield
        return
    enabled = torch._C._get_mkldnn_enabled()
    torch._C._set_mkldnn_enabled(False)  # torch.backends.mkldnn.flags warns of TF32 where there is none
    try:
        with torch.backends.cudnn.flags(enabled=False):
            yield
    finally:
        torch._C._set_mkldnn_enabled(enabled)


def caught(x: Tensor) -> Tensor:
    """x as a point of the graph that nothing else passes through: an alias, or a copy that requires gradients.

    With the alias in its place a layer's Jacobian leaves out what reaches the layer on other ways (a skip connection).
    """
    return x.view_as(x) if x.requires_grad else x.detach().requires_grad_().clone()  # a clone may be changed in place


def tensors(values: Any) -> Iterator[Tensor]:
    """The floating tensors in nested tuples, lists and mappings, in order."""
    if isinstance(values, Tensor):
        if values.is_floating_point():
            yield values
    elif isinstance(values, Mapping):
        yield from tensors(list(values.values()))
    elif isinstance(values, tuple | list):
        for value in values:
            yield from tensors(value)


def swapped(values: Any, old: Tensor, new: Tensor) -> Any:
    """The same arguments with another tensor wherever the old one stood."""
    if values is old:
        return new
    if type(values) in (tuple, list):
        return type(values)(swapped(value, old, new) for value in values)
    if type(values) is dict:
        return {key: swapped(value, old, new) for key, value in values.items()}
    return values


def _chosen(model: nn.Module, kinds: Sequence[str], names: Sequence[str]) -> dict[nn.Module, _Visit]:
    modules = dict(model.named_modules())
    unknown = [*(k for k in kinds if k not in KINDS), *(n for n in names if n not in modules)]
    if isinstance(kinds, str) or isinstance(names, str) or unknown:
        raise ValueError(f"measure_layers(kinds={kinds!r}, names={names!r}): kinds out of {tuple(KINDS)}, names of modules")
    visits = {}
    for name, module in modules.items():
        kind = next((k for k, classes in KINDS.items() if isinstance(module, classes)), "module")
        if kind in kinds or name in names:
            visits[module] = _Visit(name, kind)
    return visits


@torch.no_grad()
def _copies(layer: nn.Module, following: nn.Module) -> float | None:
    """Share of a layer's units that have a twin: the same weights, and the same weights upon them; None for other layers.

    Twins get the same gradient and stay twins for ever. Units without any weights do not count.
    """
    if not isinstance(layer, PLAIN) or not isinstance(following, PLAIN) or getattr(following, "groups", 1) != 1:
        return None
    W, V = layer.weight.flatten(1), following.weight.flatten(2) if following.weight.dim() > 2 else following.weight
    units = len(W)  # a flattened image has several entries a channel
    if V.shape[1] % units or len(W[:, 0].unique()) > 0.5 * units:
        return None if V.shape[1] % units else 0.0
    upon = V.reshape(len(V), units, -1).transpose(0, 1).flatten(1)
    alive = (W != 0).any(1) & (upon != 0).any(1)
    rows = torch.cat([W, upon] if layer.bias is None else [W, layer.bias[:, None], upon], 1)[alive]
    return (len(rows) - len(rows.unique(dim=0))) / units if len(rows) else 0.0


def _recurrent(name: str, module: nn.RNN, length: int) -> list[LayerReading]:
    """The hidden-to-hidden matrices of a vanilla RNN: what a small signal is multiplied by from one element to the next."""
    readings = []
    for full, W in module.named_parameters():
        if full.startswith("weight_hh") and W.dim() == 2 and bool(torch.isfinite(W).all()):
            sigma = torch.linalg.svdvals(W.detach().float())
            rms = float(sigma.square().mean().sqrt())
            path = f"{name}.{full}" if name else full
            readings.append(LayerReading(path, float(sigma[0]), 0.0, rms, 0.0, None, kind="recurrent", times=length))
    return readings


def _watch(
    model: nn.Module, evaluate: Callable[[], Tensor], visits: dict[nn.Module, _Visit], lengths: dict[nn.RNN, int]
) -> Tensor:
    """Evaluate with hooks that fill in the visits, and put them in the order of the calls."""
    latest: list[tuple[_Visit, Tensor]] = []  # the last layer with weights and its output, which an activation may take

    def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any] | None:
        visit = visits[module]
        if visit.input is not None or visit.problem:
            return None  # a later call
        args = _with_state(module, args, kwargs)
        x = _input(module, visit.kind, args, kwargs)
        visits[module] = visits.pop(module)  # in the order of the calls
        if x is None:
            visit.problem = "it was called without a floating tensor in its first place"
            return None
        alias = caught(x)
        visit.fed = _squares(module, x) if visit.kind == "weight" and not x.requires_grad else None
        visit.input, visit.source = Point.of(alias), x.grad_fn
        return swapped(args, x, alias), swapped(kwargs, x, alias)

    def after(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        visit = visits[module]
        if visit.problem or visit.output is not None:
            return
        y = next(tensors(output), None)
        if y is None or not y.requires_grad or visit.input is None or not y.numel() or not visit.input.numel:
            visit.problem = "its output is no floating tensor of the graph"
            return
        visit.output = Point.of(y)
        if visit.kind == "weight":
            latest[:] = [(visit, y)]

    def activated(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
        if latest and args and args[0] is latest[0][1]:
            latest.pop()[0].output = Point.of(output)

    def read(module: nn.RNN, args: tuple[Any, ...]) -> None:
        x = args[0] if args else None
        if isinstance(x, nn.utils.rnn.PackedSequence):
            lengths[module] = len(x.batch_sizes)
        elif isinstance(x, Tensor):
            lengths[module] = x.shape[1 if module.batch_first and x.dim() == 3 else 0]

    with ExitStack() as stack:
        for module in lengths:
            stack.callback(module.register_forward_pre_hook(read).remove)
        for module in model.modules():
            if module in visits:
                stack.callback(module.register_forward_pre_hook(before, with_kwargs=True).remove)
                stack.callback(module.register_forward_hook(after).remove)
            elif isinstance(module, ACTIVATIONS):
                stack.callback(module.register_forward_hook(activated).remove)
        return evaluate()


def _squares(layer: nn.Module, x: Tensor) -> Tensor | None:
    """(n + 1,) sums of squares of the features (of a convolution: channels) of a layer's input, and the count of each."""
    if not isinstance(layer, PLAIN) or not x.numel() or x.dim() < 2:
        return None
    values = x.detach().to(accumulator(x)).movedim(-1 if isinstance(layer, nn.Linear) else 1, 0).flatten(1)
    return torch.cat([values.square().sum(1), values.new_full((1,), values.shape[1])])


def _largest(squares: Tensor | None, team: Team) -> float | None:
    """Root mean square of the largest feature, over all processes' samples."""
    if squares is None:
        return None
    *sums, count = team.total(squares).tolist()
    return math.sqrt(max(sums) / count)


def _with_state(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, ...]:
    """A cell's arguments with the hidden state of zeros that it would make itself."""
    given: list[Any] = [*args[:2], kwargs.get("hx")]
    if not isinstance(module, CELLS) or not args or given[1] is not None:
        return args
    kwargs.pop("hx", None)
    h = given[0].new_zeros(*given[0].shape[:-1], module.hidden_size)
    return given[0], (h, h.clone()) if isinstance(module, nn.LSTMCell) else h


def _input(module: nn.Module, kind: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor | None:
    """The tensor that the layer's Jacobian is with respect to."""
    if kind == "module":
        return next(tensors((args, kwargs)), None)
    if isinstance(module, CELLS):
        return next(tensors(args[1] if len(args) > 1 else kwargs.get("hx")), None)
    first = args[0] if args else kwargs.get("query") if kind == "attention" else None
    return first if isinstance(first, Tensor) and first.is_floating_point() else None


def _measure(visit: _Visit, generator: torch.Generator, num_steps: int, gain: float | None, team: Team) -> LayerReading:
    if visit.input is None or visit.output is None:
        raise RuntimeError(visit.problem or "the replay did not call it")
    s = layer_spectrum(visit.output, visit.input, generator, num_steps, team)
    return LayerReading(
        visit.name,
        s.sigma_max,
        s.sigma_max_error,
        s.sigma_rms,
        s.sigma_rms_error,
        gain,
        sigma_min=s.sigma_min,
        sigma_min_error=s.sigma_min_error,
        kind=visit.kind,
        fed=_largest(visit.fed, team),
    )


def _gains(names: Sequence[str], grads: Sequence[Tensor | None], team: Team) -> tuple[dict[str, float | None], set[str]]:
    """|gradient at the input| / |gradient at the output| of each layer, over all processes' samples.

    And the layers whose input has the very gradient that the output of the layer before has: nothing else hears that one,
    and nothing between them scales.
    """
    found: dict[str, float | None] = {}
    sizes = [math.nan if g is None else float(g.norm()) for g in grads]
    if team.size > 1:
        sizes = [math.sqrt(s) for s in team.sums([size * size for size in sizes])]
    for name, down, up in zip(names, sizes[::2], sizes[1::2], strict=True):
        found[name] = down / up if 0 < up < math.inf and not math.isnan(down) else None
    same = {name for name, down, up in zip(names[1:], sizes[2::2], sizes[1::2], strict=False) if abs(down - up) <= SAME * up}
    return found, same


def _leads(a: _Visit, b: _Visit) -> bool:
    """Whether b's input was made out of a's output alone: on the way back no operation has a second operand."""
    node = b.source
    for _ in range(WAY):
        if node is None or a.output is None:
            return False
        if node is a.output.edge.node:
            return True
        operands = [n for n, _ in node.next_functions if n is not None and n.name() != "torch::autograd::AccumulateGrad"]
        node = operands[0] if len(operands) == 1 else None
    return False

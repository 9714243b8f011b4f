"""How much the whole model stretches a small change of its input: measured at the batch, and bounded by the chain rule."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import Node

from adaptive_opt.curvature import Point, layer_spectrum
from adaptive_opt.layers import caught, swapped, tensors, twice_differentiable
from adaptive_opt.parallel import ALONE, Team

PRIME = 2**127 - 1  # paths are counted modulo this: their number doubles with every residual block
Place = tuple[Node, int]  # the place of a tensor in the graph: the node that made it, and which of its outputs it is


@dataclass(frozen=True)
class Lipschitz:
    """Largest singular value of J = d model output / d model input at the batch, and an upper bound on it.

    Without batch statistics J is block-diagonal over the samples, and this is the largest over them. It says nothing of other
    inputs: the bound is on this J, not on the function everywhere.
    """

    local: float  # a lower bound from few steps
    local_error: float  # a singular value lies within this of local
    bound: float | None  # product of the segments' largest singular values plus their errors; None: a segment failed
    note: str  # what is unusual about it, or empty
    segments: int = 1  # factors of the bound


def measure_lipschitz(
    model: nn.Module, evaluate: Callable[[], Tensor], generator: torch.Generator, num_steps: int = 8, team: Team = ALONE
) -> Lipschitz:
    """The model's local Lipschitz number at its first call in `evaluate()`, and the chain rule's bound on it.

    The input is the first floating tensor that the model is given; of a model that is given integers, the output of the first
    `nn.Embedding` that it calls. The bound is the product over the segments between separators: tensors (outputs of modules)
    through which every path from the input to the output runs. A residual block is one segment, a plain chain has one for each
    layer. Each error says that a singular value is near, so the bound is one as far as the runs have found the largest: more
    steps make it safer. The cost is one forward pass and twice `num_steps` products with J and J', each about a gradient, of
    the whole and of each segment alone. The batch is the whole `team`'s. Raises RuntimeError where J cannot be measured,
    FloatingPointError where it is not finite.
    """
    with twice_differentiable(model):
        trace = team.together(lambda: _follow(model, evaluate))
    if not team.all(trace.input is not None and trace.output is not None) or trace.input is None or trace.output is None:
        raise RuntimeError("measure_lipschitz: the model has no floating input, or no output that hangs on it by a graph")
    separators = _separators(trace, trace.input, trace.output)
    if not team.same(len(separators)):
        raise RuntimeError("measure_lipschitz: the model's graph is another one on another process")
    whole = layer_spectrum(trace.output, trace.input, generator, num_steps, team)
    notes = [f"from the output of {trace.embedding} on: the input is integers"] if trace.embedding else []
    if not separators:
        notes.append("no tensor between input and output carries everything: the bound is local + error")
        return Lipschitz(whole.sigma_max, whole.sigma_max_error, whole.sigma_max + whole.sigma_max_error, "; ".join(notes))
    chain = [trace.input, *separators, trace.output]
    bound: float | None = 1.0
    try:
        for before, after in pairwise(chain):
            s = layer_spectrum(after, before, generator, num_steps, team)
            bound *= s.sigma_max + s.sigma_max_error
        bound = max(bound, whole.sigma_max)  # where the segments' runs were too short
    except (RuntimeError, FloatingPointError) as error:
        bound = None
        notes.append(f"no bound: a segment could not be measured ({str(error).partition(chr(10))[0]})")
    return Lipschitz(whole.sigma_max, whole.sigma_max_error, bound, "; ".join(notes), len(chain) - 1)


@dataclass
class _Trace:
    """What one call of the model left behind."""

    input: Point | None = None
    output: Point | None = None
    embedding: str = ""  # whose output stands for the input
    outputs: list[Point] = field(default_factory=list)  # of the submodules, in the order of the calls
    activated: dict[Place, Place] = field(default_factory=dict)  # input of a module without parameters -> its output


def _follow(model: nn.Module, evaluate: Callable[[], Tensor]) -> _Trace:
    """Evaluate with hooks that catch the model's input and output, and the outputs of its submodules, at its first call."""
    trace = _Trace()
    names = {module: name for name, module in model.named_modules()}
    entered: dict[nn.Module, Place] = {}

    def begin(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any] | None:
        x = next(tensors((args, kwargs)), None)
        if trace.output is not None or trace.input is not None or x is None:
            return None
        alias = caught(x)
        trace.input = Point.of(alias)
        return swapped(args, x, alias), swapped(kwargs, x, alias)

    def end(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if trace.output is None and trace.input is not None:
            known = [y for y in tensors(output) if y.requires_grad]
            # a model of Hugging Face that is given labels returns its loss first: the first that is no scalar
            y = next((y for y in known if y.dim()), known[0] if known else None)
            trace.output = None if y is None else Point.of(y)

    def embedded(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor | None:
        if trace.input is not None:
            return None
        alias = caught(output)
        trace.input, trace.embedding = Point.of(alias), names[module] or type(module).__name__
        return alias

    def before(module: nn.Module, args: tuple[Any, ...]) -> None:
        x = next(tensors(args), None)
        if trace.output is None and x is not None and x.requires_grad:
            entered[module] = _place(Point.of(x))

    def after(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        y = next(tensors(output), None)
        if trace.output is not None or y is None or not y.requires_grad:
            return
        point = Point.of(y)
        trace.outputs.append(point)
        if module in entered:
            trace.activated[entered.pop(module)] = _place(point)

    with ExitStack() as stack:
        stack.callback(model.register_forward_pre_hook(begin, with_kwargs=True).remove)
        for module in model.modules():
            if isinstance(module, nn.Embedding):
                stack.callback(module.register_forward_hook(embedded).remove)
            elif module is not model:
                stack.callback(module.register_forward_hook(after).remove)
                if next(module.parameters(), None) is None:
                    stack.callback(module.register_forward_pre_hook(before).remove)
        stack.callback(model.register_forward_hook(end).remove)
        evaluate()
    return trace


def _place(point: Point) -> Place:
    return point.edge.node, point.edge.output_nr


def _separators(trace: _Trace, input: Point, output: Point) -> list[Point]:
    """Modules' outputs that every path from `input` to `output` runs through, from input to output, in linear time.

    A tensor is one if (paths to it) * (paths from it) = (all paths). One that goes straight into a module without parameters
    (an activation, a pooling) gives way to that one's output: a layer is measured with what follows it.
    """
    order = _topological(_place(output)[0], _place(input)[0])  # from the output to the input
    source, target = _place(input), _place(output)
    below: dict[Node, int] = {}  # paths from a node down to the input
    for node in reversed(order):
        below[node] = 1 if node is source[0] else sum(below.get(n, 0) for n, _ in _next(node)) % PRIME
    above: dict[Place, int] = {target: 1}  # paths from the output down to a tensor
    total_above: dict[Node, int] = {target[0]: 1}
    for node in order:
        if below[node]:
            for place in () if node is source[0] else _next(node):
                above[place] = (above.get(place, 0) + total_above[node]) % PRIME
                total_above[place[0]] = (total_above.get(place[0], 0) + total_above[node]) % PRIME
    rank = {node: i for i, node in enumerate(order)}
    found = {
        _place(p): p
        for p in trace.outputs
        if _place(p) not in (source, target) and above.get(_place(p), 0) * below.get(p.edge.node, 0) % PRIME == below[target[0]]
    }
    kept = {place: p for place, p in found.items() if trace.activated.get(place) not in {*found, target}}
    return [kept[place] for place in sorted(kept, key=lambda place: -rank[place[0]])]


def _topological(root: Node, last: Node) -> list[Node]:
    """The nodes under `root`, consumers first; `last` is not looked behind."""
    order: list[Node] = []
    seen: set[Node] = {root}
    stack = [(root, iter(_next(root)))]
    while stack:
        node, rest = stack[-1]
        child = next(rest, None)
        if child is None:
            order.append(node)
            stack.pop()
        elif child[0] not in seen:
            seen.add(child[0])
            stack.append((child[0], iter(() if child[0] is last else _next(child[0]))))
    return order[::-1]


def _next(node: Node) -> Sequence[Place]:
    return [(n, i) for n, i in node.next_functions if n is not None]

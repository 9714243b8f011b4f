"""The processes that train one model together: what they must agree on, so that all of them decide alike.

Where gradients are averaged (DistributedDataParallel), the loss whose gradient is followed is the mean of the processes' own:
gradients, Hessian products and losses are averaged likewise. Whatever one process alone can see (a loss, an exception, its own
time) is shared before anything depends on it. A process that is alone makes no collective call.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import reduce
from itertools import pairwise
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.algorithms.join import JoinHook
from torch.nn.parallel import DistributedDataParallel

from adaptive_opt.curvature import Operator
from adaptive_opt.sharded import is_sharded

T = TypeVar("T")


class ProcessLost(RuntimeError):
    """A collective call failed: another process is gone. Nothing can be agreed on any more."""


class Team:
    """The processes of one group. `Team()` is a process on its own: everything it asks for is its own answer."""

    def __init__(self, group: dist.ProcessGroup | None = None, device: torch.device | None = None):
        self.group = group
        self.size = 1 if group is None else dist.get_world_size(group)
        self.rank = 0 if group is None else dist.get_rank(group)
        self.device = device or torch.device("cpu")
        self.lost: ProcessLost | None = None

    # ---- sums of tensors ------------------------------------------------------------------------------------------------

    def total(self, x: Tensor) -> Tensor:
        """The sum over the processes, as a new tensor; the same bits on each."""
        return x if self.size == 1 else self._sum(x.clone())

    def mean_of(self, compute: Callable[[], Sequence[Tensor]], like: Sequence[Tensor]) -> list[Tensor]:
        """The mean over the processes of the tensors that each computes, shaped as `like`.

        Where `compute` raises on one process, it raises on all of them: one that went on alone would leave the others waiting.
        """
        if self.size == 1:
            return list(compute())
        sizes = [t.numel() for t in like]
        dtype = reduce(torch.promote_types, (t.dtype for t in like), torch.float32)
        buffer = torch.zeros(sum(sizes) + 1, dtype=dtype, device=like[0].device)  # the last entry counts failures
        failure: Exception | None = None
        try:
            buffer[:-1] = torch.cat([t.detach().reshape(-1) for t in compute()])
        except Exception as error:
            failure = error
            buffer[-1] = 1
        if float(self._sum(buffer)[-1]) > 0:
            self._raise(failure)
        pieces = buffer[:-1].div_(self.size).split(sizes)
        return [piece.view(t.shape).to(t.dtype) for piece, t in zip(pieces, like, strict=True)]

    def shares(self, like: Tensor) -> Dealt | None:
        """How vectors like this one can be dealt out over the processes; None for a process on its own."""
        return None if self.size == 1 else Dealt(self, like.numel())

    def joined(self, share: Tensor, sizes: Sequence[int]) -> Tensor:
        """Every process's entries one after the other; `sizes` says how many each has."""
        padded = torch.cat([share, share.new_zeros(max(sizes) - share.numel())])
        pieces = [torch.empty_like(padded) for _ in sizes]
        self._call(lambda: dist.all_gather(pieces, padded, group=self.group))
        return torch.cat([piece[:size] for piece, size in zip(pieces, sizes, strict=True)])

    # ---- numbers and plain objects -------------------------------------------------------------------------------------

    def sums(self, numbers: Sequence[float]) -> list[float]:
        return self._reduced(numbers, dist.ReduceOp.SUM)

    def mean(self, number: float) -> float:
        return self.sums([number])[0] / self.size

    def most(self, number: float) -> float:
        return self._reduced([number], dist.ReduceOp.MAX)[0]

    def all(self, ok: bool) -> bool:
        return ok if self.size == 1 else self.sums([ok])[0] == self.size

    def first(self, value: T, rank: int = 0) -> T:
        """The first process's value, or that of another rank."""
        if self.size == 1:
            return value
        box: list[Any] = [value]
        self._call(lambda: dist.broadcast_object_list(box, src=self._global(rank), group=self.group, device=self.device))
        return box[0]

    def gathered(self, value: T) -> list[T]:
        """Every process's value, in the order of the ranks."""
        if self.size == 1:
            return [value]
        found: list[Any] = [None] * self.size
        self._call(lambda: dist.all_gather_object(found, value, group=self.group))
        return found

    def same(self, value: object) -> bool:
        """Whether all processes have this very (plain) value."""
        return all(other == value for other in self.gathered(value))

    def together(self, compute: Callable[[], T]) -> T:
        """What `compute` gives here; where it raises on one process, it raises on all."""
        if self.size == 1:
            return compute()
        result: list[T] = []
        failure: Exception | None = None
        try:
            result.append(compute())
        except Exception as error:
            failure = error
        if not self.all(failure is None):
            self._raise(failure)
        return result[0]

    def dealt(
        self, jobs: Sequence[Callable[[], Sequence[Tensor] | None]], like: Sequence[Sequence[Tensor]]
    ) -> list[Sequence[Tensor] | None]:
        """What each job gives (tensors shaped as `like`, or None), dealt out over the processes and sent to all of them."""
        if self.size == 1:
            return [job() for job in jobs]
        packed = [torch.cat([t.reshape(-1) for t in tensors]).fill_(torch.nan) for tensors in like]  # NaN: there is none
        for job, buffer in list(zip(jobs, packed, strict=True))[self.rank :: self.size]:
            made = job()
            if made is not None:
                buffer.copy_(torch.cat([t.reshape(-1) for t in made]))
        found: list[Sequence[Tensor] | None] = []
        for j, (buffer, tensors) in enumerate(zip(packed, like, strict=True)):
            self._call(lambda j=j, x=buffer: dist.broadcast(x, src=self._global(j % self.size), group=self.group))
            pieces = buffer.split([t.numel() for t in tensors])
            whole = [piece.view(t.shape) for piece, t in zip(pieces, tensors, strict=True)]
            found.append(None if bool(buffer[0].isnan()) else whole)
        return found

    # ---- the calls themselves ---------------------------------------------------------------------------------------------

    def _raise(self, failure: Exception | None) -> None:
        """The first failure's own class and words, on every process."""
        mine = None if failure is None else (type(failure), str(failure) or type(failure).__name__)
        rank, (kind, words) = next((r, f) for r, f in enumerate(self.gathered(mine)) if f is not None)
        text = f"process {rank}: {words}"
        try:
            error = kind(text)
        except Exception:  # a class that wants other arguments
            error = RuntimeError(text)
        raise error from failure

    def _reduced(self, numbers: Sequence[float], op: dist.ReduceOp.RedOpType) -> list[float]:
        if self.size == 1:
            return list(numbers)
        shared = torch.tensor([float(x) for x in numbers], dtype=torch.float64, device=self.device)
        self._call(lambda: dist.all_reduce(shared, op, group=self.group))
        return shared.tolist()

    def _sum(self, x: Tensor) -> Tensor:
        self._call(lambda: dist.all_reduce(x, group=self.group))
        return x

    def _global(self, rank: int) -> int:
        assert self.group is not None
        return dist.get_global_rank(self.group, rank)

    def _call(self, collective: Callable[[], object]) -> None:
        """A collective; once one has failed, the others are not waited for again."""
        if self.lost is None:
            try:
                collective()
                return
            except Exception as error:
                self.lost = ProcessLost(
                    f"process {self.rank} of {self.size} could not reach the others ({str(error).partition(chr(10))[0]}): "
                    "one of them has ended, or took another way; its own error says why"
                )
        raise self.lost


class Dealt:
    """(n,) vectors cut into one run of entries a process: `curvature.Shares`."""

    def __init__(self, team: Team, n: int):
        self.team, self.size = team, team.size
        self.bounds = [n * rank // team.size for rank in range(team.size + 1)]

    def mine(self, vector: Tensor) -> Tensor:
        return vector[self.bounds[self.team.rank] : self.bounds[self.team.rank + 1]]

    def whole(self, share: Tensor) -> Tensor:
        return self.team.joined(share, [b - a for a, b in pairwise(self.bounds)])

    def total(self, x: Tensor) -> Tensor:
        return self.team.total(x)


ALONE = Team()


class Reduced:
    """The mean over the processes of their operators; vectors are whole on each, and equal. One all-reduce a product."""

    def __init__(self, inner: Operator, team: Team):
        self.inner, self.team, self.backend = inner, team, inner.backend
        (self.gradient,) = team.mean_of(lambda: [inner.gradient], [inner.gradient])
        self.products = 0

    def __call__(self, v: Tensor) -> Tensor:
        self.products += 1
        return self.team.mean_of(lambda: [self.inner(v)], [v])[0]


def operator_of(
    team: Team, build: Callable[[str | None], tuple[Operator, str | None]], backend: str | None, backends: Sequence[str]
) -> tuple[Operator, str | None]:
    """The team's operator out of what `build(backend)` gives on each process, all by the back end that the least able has."""
    H, why = team.together(lambda: build(backend))
    if team.size == 1:
        return H, why
    mine = backends.index(H.backend)
    worst = int(team.most(mine))
    if mine < worst:
        H, why = build(backends[worst])[0], "another process needs it"
    return Reduced(H, team), why


def team_of(model: nn.Module) -> Team:
    """The processes between which this module's gradients are averaged: by DistributedDataParallel, or by FSDP2."""
    ddp = ddp_in(model)
    if ddp is not None:
        return Team(ddp.process_group, next(p.device for p in ddp.parameters()))
    sharded: Any = next((p for p in model.parameters() if is_sharded(p)), None)
    if sharded is None:
        return ALONE
    mesh = sharded.device_mesh
    return Team(mesh.get_group() if mesh.ndim == 1 else dist.group.WORLD, sharded.device)


@contextmanager
def without_ddp(ddp: DistributedDataParallel | None) -> Iterator[None]:
    """Calls of this wrapper go straight to its module: a replay runs no backward, for which the reducer would wait for ever."""
    if ddp is None:
        yield
        return
    ddp.forward = ddp.module.__call__
    try:
        yield
    finally:
        del ddp.forward


def ddp_in(model: nn.Module) -> DistributedDataParallel | None:
    """The DistributedDataParallel that this module is, or that torch.compile made it of."""
    while not isinstance(model, DistributedDataParallel):
        inner = getattr(model, "_orig_mod", None)
        if inner is None:
            return None
        model = inner
    return model


def world() -> int:
    """How many processes there are, whatever they do."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def active_ddp() -> DistributedDataParallel | None:
    """The DistributedDataParallel whose forward pass is running: how its inner module learns that it has one."""
    return DistributedDataParallel._get_active_ddp_module()


class JoinedStep(JoinHook):
    """A process that has run out of batches, beside others that have not (torch.distributed.algorithms.Join).

    It takes part in what the others agree on at every step, with nothing to say; and after the last batch of all it takes over
    the optimizer's state, as DistributedDataParallel's own hook does the parameters.
    """

    def __init__(
        self,
        ddp: DistributedDataParallel,
        shadow: Callable[[], None],
        state: Callable[[], dict[str, Any]],
        take_over: Callable[[dict[str, Any]], None],
    ):
        self.ddp, self.shadow, self.state, self.take_over = ddp, shadow, state, take_over

    def main_hook(self) -> None:
        if self.ddp.require_forward_param_sync:  # as ddp's hook, just before, found: the others average gradients, and step
            self.shadow()

    def post_hook(self, is_last_joiner: bool) -> None:
        team = team_of(self.ddp)
        last = int(team.most(team.rank if is_last_joiner else -1))
        state = team.first(self.state() if team.rank == last else None, last)
        if state is not None and not is_last_joiner:
            self.take_over(state)


def check_join(ddp: DistributedDataParallel | None, optimizer: object) -> None:
    """Raises RuntimeError in a Join that has the model and not the optimizer, or the optimizer first."""
    if ddp is None or not ddp._join_config.enable:
        return
    mine = getattr(optimizer, "_join_config", None)
    if mine is None or not mine.enable or mine.is_first_joinable:
        raise RuntimeError(
            "AdaptiveOptimizer.step() inside of Join([model]) or model.join(): the optimizer too agrees on something with the "
            "other processes at every step; write `with Join([model, optimizer]):`, the model first"
        )

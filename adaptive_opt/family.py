"""Which of torch's own optimizers a base is, looked up through its base classes: another library's Adam is not torch's."""

from __future__ import annotations

from functools import cache

from torch.optim import Optimizer

ADAM = ("Adam", "AdamW", "NAdam", "RAdam")
ELEMENTWISE = (*ADAM, "Adamax", "RMSprop", "Adagrad", "Adadelta", "Rprop")  # one rule for every entry, usable in any basis
LINEAR = ("SGD", "ASGD")  # rules that are linear in the gradient: the same in every basis


def family(base: Optimizer) -> str | None:
    """Name of the torch.optim class that `base` is or derives from; None for optimizers from elsewhere."""
    own = _torchs(type(base))
    return own[0].__name__ if own else None


def own_step(base: Optimizer) -> bool:
    """The base steps by torch's very method, not by a subclass's."""
    return next((c for c in type(base).__mro__ if "step" in vars(c)), None) in _torchs(type(base))


@cache  # asked several times a step
def _torchs(kind: type[Optimizer]) -> tuple[type, ...]:
    return tuple(c for c in kind.__mro__ if c.__module__.startswith("torch.optim.") and c is not Optimizer)

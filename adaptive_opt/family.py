"""Which of torch's own optimizers a base is, looked up through its base classes: another library's Adam is not torch's."""

from __future__ import annotations

from torch.optim import Optimizer

ADAM = ("Adam", "AdamW", "NAdam", "RAdam")
ELEMENTWISE = (*ADAM, "RMSprop", "Adagrad")  # one rule for every entry, which may be applied in any basis


def family(base: Optimizer) -> str | None:
    """Name of the torch.optim class that `base` is or derives from; None for optimizers from elsewhere."""
    own = [c for c in type(base).__mro__ if c.__module__.startswith("torch.optim.") and c is not Optimizer]
    return own[0].__name__ if own else None

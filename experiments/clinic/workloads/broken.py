"""Steps that are far too long, and batches that should never have been stepped on."""

from __future__ import annotations

from ..records import Human, Workload
from .drift import RATES, deep
from .healthy import DIGITS, digits

TWIN = "digits MLP"
CAREFUL = Human("clips gradients at 1, skips what is not finite", clip=1.0, skip=True)


def hot(factor: float) -> Workload:
    return Workload(
        f"lr x{factor:g}", "broken steps", digits, DIGITS, "test_accuracy", 10.0, True, factor=factor,
        human=Human(f"divides the learning rate by {factor:g}", factor=1.0), reference=TWIN,
    )  # fmt: skip


def faulty(name: str, kind: str) -> Workload:
    return Workload(name, "broken steps", deep, RATES, "test_accuracy", 10.0, True, faults=(0.02, kind), human=CAREFUL)


WORKLOADS = (
    hot(10),
    hot(100),
    hot(1000),
    faulty("corrupted batches", "scale"),
    faulty("NaN batches", "nan"),
)

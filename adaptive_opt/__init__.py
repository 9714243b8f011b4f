"""adaptive_opt: a self-healing optimizer for PyTorch.

The public names are imported when they are first asked for: the dashboard and `watch` read a run without loading torch.
"""

import sys
from importlib import import_module
from importlib.util import find_spec
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from adaptive_opt.checkup import checkup
    from adaptive_opt.optimizer import AdaptiveOptimizer
    from adaptive_opt.policies import RandomPolicy, RoundRobinPolicy, TrialPolicy
    from adaptive_opt.policy import ConstantPolicy, RulePolicy
    from adaptive_opt.probe import LanczosProbe
    from adaptive_opt.records import Condition, Decision, Diagnosis, Event, Finding, LayerReading, Reading, StepReport

__all__ = [
    "AdaptiveOptimizer",
    "Condition",
    "ConstantPolicy",
    "Decision",
    "Diagnosis",
    "Event",
    "Finding",
    "LanczosProbe",
    "LayerReading",
    "RandomPolicy",
    "Reading",
    "RoundRobinPolicy",
    "RulePolicy",
    "StepReport",
    "TrialPolicy",
    "checkup",
]
__version__ = "0.1.0"
_FILES = {  # public name -> its file; all others are records
    "AdaptiveOptimizer": "optimizer",
    "ConstantPolicy": "policy",
    "LanczosProbe": "probe",
    "RandomPolicy": "policies",
    "RoundRobinPolicy": "policies",
    "RulePolicy": "policy",
    "TrialPolicy": "policies",
    "checkup": "checkup",
}


def __getattr__(name: str) -> Any:
    if name in __all__:
        value = getattr(import_module(f"{__name__}.{_FILES.get(name, 'records')}"), name)
        globals()[name] = value
        return value
    if not name.startswith("_") and find_spec(f"{__name__}.{name}") is not None:
        return import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*__all__, "__version__"})


class _Package(ModuleType):
    """`checkup` is a file and the function in it; importing the file must not put it in the function's place."""

    def __setattr__(self, name: str, value: object) -> None:
        super().__setattr__(name, getattr(value, name) if name == "checkup" and isinstance(value, ModuleType) else value)


sys.modules[__name__].__class__ = _Package

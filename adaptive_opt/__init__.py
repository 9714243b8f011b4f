"""adaptive_opt: a self-healing optimizer for PyTorch."""

from adaptive_opt.checkup import checkup
from adaptive_opt.optimizer import AdaptiveOptimizer
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
    "Reading",
    "RulePolicy",
    "StepReport",
    "checkup",
]
__version__ = "0.1.0"

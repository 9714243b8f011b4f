"""Modes: how a step is taken until further notice. One file a mode; a new one joins MODES."""

from collections.abc import Callable

from adaptive_opt.modes.base import BaseStep, Mode, StepContext, all_params
from adaptive_opt.modes.kfac import KFAC
from adaptive_opt.modes.sam import KFACSAM, SAM
from adaptive_opt.modes.sgd import SGDStep
from adaptive_opt.modes.standardised import Standardised

MODES: dict[str, Callable[[], Mode]] = {
    "base": BaseStep,
    "sgd": SGDStep,
    "kfac": KFAC,
    "sam": SAM,
    "kfac_sam": KFACSAM,
    "standardised": Standardised,
}

__all__ = ["KFAC", "KFACSAM", "MODES", "SAM", "BaseStep", "Mode", "SGDStep", "Standardised", "StepContext", "all_params"]

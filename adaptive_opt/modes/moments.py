"""The state of torch.optim's elementwise rules, carried from one basis into another."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from adaptive_opt.modes import kronecker as kron

# What an entry of the base's state is, by its name in torch.optim:
VECTORS = ("exp_avg", "momentum_buffer", "grad_avg", "prev")  # of gradients or steps: they rotate
SQUARES = ("exp_avg_sq", "max_exp_avg_sq", "square_avg", "sum")  # of gradients: by the squared rotation, corrected
MAGNITUDES = ("exp_inf",)  # of gradients (Adamax): as the roots of squares
SQUARED_STEPS = ("acc_delta",)  # Adadelta's: by the squared rotation; the factors know nothing of steps
STEP_SIZES = ("step_size",)  # Rprop's: as their roots


def carry(state: Mapping[str, Any], shape: torch.Size, rows: slice, left: bool, T: Tensor, correction: Tensor) -> None:
    """Rows (left) or columns of every moment of a parameter of this shape, with x_new = T' x_old.

    correction (b,): see `kronecker.correction`.
    """
    centered = "grad_avg" in state and "square_avg" in state  # RMSprop's: the variance is carried, so that it stays positive
    if centered:
        state["square_avg"].addcmul_(state["grad_avg"], state["grad_avg"], value=-1).clamp_(min=0)
    for name, moment in state.items():
        if not isinstance(moment, Tensor) or moment.shape != shape:
            continue
        if name in VECTORS:
            _rewrite(moment, rows, left, lambda X: T.T @ X)
        elif name in SQUARES:
            _rewrite(moment, rows, left, lambda V: correction.unsqueeze(1) * ((T * T).T @ V))
        elif name in MAGNITUDES:
            _rewrite(moment, rows, left, lambda A: (correction.unsqueeze(1) * ((T * T).T @ (A * A))).sqrt())
        elif name in SQUARED_STEPS:
            _rewrite(moment, rows, left, lambda V: (T * T).T @ V)
        elif name in STEP_SIZES:
            _rewrite(moment, rows, left, lambda A: ((T * T).T @ (A * A)).sqrt())
    if centered:
        state["square_avg"].addcmul_(state["grad_avg"], state["grad_avg"], value=1 + 1e-6)  # more than rounding takes off


def rescale_bias(state: Mapping[str, Any], before: float, after: float) -> None:
    """Adam's second moments as if they had been averaged with another beta2: their bias correction changes with it."""
    t = float(state.get("step", 0))
    if t < 1 or before == after:
        return
    ratio = (1 - after**t) / (1 - before**t)
    for name in ("exp_avg_sq", "max_exp_avg_sq"):
        if name in state:
            state[name].mul_(ratio)


def _rewrite(moment: Tensor, rows: slice, left: bool, rule: Any) -> None:
    M = kron.as_matrix(moment).to(torch.promote_types(moment.dtype, torch.float32), copy=True)
    if left:
        M[rows] = rule(M[rows])
    else:
        M[:, rows] = rule(M[:, rows].T).T
    moment.copy_(M.view(moment.shape))

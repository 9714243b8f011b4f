"""The state of torch.optim's elementwise rules, carried from one basis into another."""

from __future__ import annotations

from collections.abc import Callable, Mapping
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


def carry(
    state: Mapping[str, Any], shape: torch.Size, rows: slice, left: bool, T: Tensor, correction: Tensor, jensen: float = 1.0
) -> None:
    """Rows (left) or columns of every moment of a parameter of this shape, with x_new = T' x_old.

    correction (b,): see `kronecker.correction`. It does not take a second moment below the square of the mean that stands
    beside it, E[g^2] >= jensen * E[g]^2: factors that have not seen every gradient call a direction empty that the
    momentum still moves along, and such a step has no bound.
    """
    squared, C = T * T, correction.unsqueeze(1)
    moments = {k: v for k, v in state.items() if isinstance(v, Tensor) and v.shape == shape}
    centered = moments.get("square_avg") if "grad_avg" in moments else None
    if centered is not None:  # RMSprop's: the variance is carried, so that it stays positive
        centered.addcmul_(moments["grad_avg"], moments["grad_avg"], value=-1).clamp_(min=0)
    for name in VECTORS:
        _rewrite(moments.get(name), rows, left, lambda X: T.T @ X)
    mean = _part(moments["exp_avg"], rows, left) if "exp_avg" in moments else T.new_zeros(())

    def of_gradients(V: Tensor) -> Tensor:
        plain = squared.T @ V
        return torch.maximum(C * plain, torch.minimum(plain, jensen * mean * mean))

    for name in SQUARES:
        _rewrite(moments.get(name), rows, left, of_gradients)
    for name in MAGNITUDES:
        _rewrite(moments.get(name), rows, left, lambda A: of_gradients(A * A).sqrt())
    for name in SQUARED_STEPS:
        _rewrite(moments.get(name), rows, left, lambda V: squared.T @ V)
    for name in STEP_SIZES:
        _rewrite(moments.get(name), rows, left, lambda A: (squared.T @ (A * A)).sqrt())
    if centered is not None:
        centered.addcmul_(moments["grad_avg"], moments["grad_avg"], value=1 + 1e-6)  # more than rounding takes off


def jensen_factor(state: Mapping[str, Any], betas: tuple[float, float]) -> float:
    """(1 - beta2^t) / (1 - beta1^t)^2: Adam's two moments are not corrected for their bias."""
    t = max(float(state.get("step", 0)), 1.0)
    return (1 - betas[1] ** t) / (1 - betas[0] ** t) ** 2


def rescale_bias(state: Mapping[str, Any], before: float, after: float) -> None:
    """Adam's second moments as if they had been averaged with another beta2: their bias correction changes with it."""
    t = float(state.get("step", 0))
    if t < 1 or before == after:
        return
    ratio = (1 - after**t) / (1 - before**t)
    for name in ("exp_avg_sq", "max_exp_avg_sq"):
        if name in state:
            state[name].mul_(ratio)


def _part(moment: Tensor, rows: slice, left: bool) -> Tensor:
    """(b, other side): the rows, or the columns as rows."""
    M = kron.as_matrix(moment).to(torch.promote_types(moment.dtype, torch.float32))
    return M[rows] if left else M[:, rows].T


def _rewrite(moment: Tensor | None, rows: slice, left: bool, rule: Callable[[Tensor], Tensor]) -> None:
    if moment is None:
        return
    M = kron.as_matrix(moment).to(torch.promote_types(moment.dtype, torch.float32), copy=True)
    if left:
        M[rows] = rule(M[rows])
    else:
        M[:, rows] = rule(M[:, rows].T).T
    moment.copy_(M.view(moment.shape))

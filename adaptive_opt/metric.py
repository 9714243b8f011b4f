"""The base optimizer's own metric: how far its next step goes per unit of gradient, and where that becomes unstable.

A step is w -= lr * P m with P diagonal. Its stability is lr * lambda_max(P^1/2 H P^1/2) / limit; the limits are those of
Cohen et al. (2021), appendix: 2 for gradient descent, 2 (1 + beta) / (1 - dampening) for heavy ball as torch writes it,
2 (1 + beta) / (1 + 2 beta) for Nesterov, and of Cohen et al. (2022) for Adam: 2 (1 + beta1) / (1 - beta1), which is 38
at beta1 = 0.9.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from adaptive_opt.curvature import flatten
from adaptive_opt.family import ADAM, family

Group = dict[str, Any]


@dataclass(frozen=True)
class Metric:
    """The next step of the base optimizer, seen as preconditioned descent."""

    root: Tensor  # (n,): sqrt(lr * P), so that groups with different lr weigh as they step
    momentum: Tensor  # (n,): root * m, the direction of the coming step in the preconditioned coordinates
    averaged: Tensor  # (n,): the same of a gradient averaged over several steps; the momentum itself where there is one
    averages: bool  # the base keeps a momentum in every group
    limit: float  # the smallest over the groups


def metric(base: Optimizer, grads: dict[Tensor, Tensor], age: int | None = None) -> Metric | None:
    """The metric of the step that `base` is about to take with `grads`; None for an optimizer it does not know.

    The state is advanced on paper by these gradients, as `base.step()` will: at the first step too it is the step's own
    (RMSprop's without the transient of its first 1 / (1 - alpha) steps, which healthy runs survive). age: steps that the
    state has behind it since it was empty. With it, the momentum of SGD and RMSprop counts as long as it becomes once it has
    filled, which Adam's own correction does too: a heavy ball's first step is a tenth of those that it soon takes.
    """
    roots, momenta, limits = [], [], []
    for group in base.param_groups:
        rule = _rule(base, group)
        if rule is None or group.get("maximize"):
            return None
        for p in group["params"]:
            if p in grads:
                scale, m = rule(group, base.state.get(p, {}), grads[p])
                root = (float(group["lr"]) * scale).clamp_min(0).sqrt()
                roots.append(root)
                momenta.append(root * (m / _filled(group, base.state.get(p, {}), age)))
                limits.append(_limit(base, group))
    if not roots:
        return None
    momentum = flatten(momenta)
    averages = all("betas" in group or group.get("momentum") for group in base.param_groups)
    return Metric(flatten(roots), momentum, momentum, averages, min(limits))


Rule = Callable[[Group, dict[str, Any], Tensor], tuple[Tensor, Tensor]]


def _rule(base: Optimizer, group: Group) -> Rule | None:
    return RULES.get(family(base) or "")


def _limit(base: Optimizer, group: Group) -> float:
    if family(base) in (*ADAM, "Adamax"):
        beta1 = float(group["betas"][0])
        return 2 * (1 + beta1) / (1 - beta1)
    beta = float(group.get("momentum", 0.0))
    if group.get("nesterov"):
        return 2 * (1 + beta) / (1 + 2 * beta)
    damping = float(group.get("dampening", 0.0)) if beta else 0.0  # torch dampens only what has momentum
    return 2 * (1 + beta) / max(1 - damping, 1e-12)


def _filled(group: Group, state: dict[str, Any], age: int | None) -> float:
    """What a momentum that began at zero has by now of its final length, the gradient being the same at every step."""
    beta = float(group.get("momentum") or 0.0)
    damping = float(group.get("dampening", 0.0))
    if age is None or not 0 < beta < 1 or damping >= 1:
        return 1.0
    kept, final = beta**age, (1 - damping) / (1 - beta)
    length = kept + (1 - kept) * final
    return (1 + beta * length) / (1 + beta * final) if group.get("nesterov") else length / final


def _sgd(group: Group, state: dict[str, Any], g: Tensor) -> tuple[Tensor, Tensor]:
    beta = float(group["momentum"])
    buffer = state.get("momentum_buffer")
    m = g if not beta or buffer is None else beta * buffer + (1 - float(group["dampening"])) * g
    return torch.ones_like(g), g + beta * m if group["nesterov"] else m


def _adam(group: Group, state: dict[str, Any], g: Tensor) -> tuple[Tensor, Tensor]:
    beta1, beta2 = (float(b) for b in group["betas"])
    t = float(state.get("step", 0)) + 1
    m = (1 - beta1) * g + (beta1 * state["exp_avg"] if "exp_avg" in state else 0)
    v = (1 - beta2) * g * g + (beta2 * state["exp_avg_sq"] if "exp_avg_sq" in state else 0)
    if "max_exp_avg_sq" in state:
        v = torch.maximum(v, state["max_exp_avg_sq"])
    return 1 / ((v / (1 - beta2**t)).sqrt() + float(group["eps"])), m / (1 - beta1**t)


def _radam(group: Group, state: dict[str, Any], g: Tensor) -> tuple[Tensor, Tensor]:
    """Adam with the second moment's variance rectified (Liu et al., 2020); plain momentum while that variance is unknown."""
    scale, m = _adam(group, state, g)
    beta2, t = float(group["betas"][1]), float(state.get("step", 0)) + 1
    longest = 2 / (1 - beta2) - 1
    rho = longest - 2 * t * beta2**t / (1 - beta2**t)
    if rho <= 5:
        return torch.ones_like(g), m
    return scale * ((rho - 4) * (rho - 2) * longest / ((longest - 4) * (longest - 2) * rho)) ** 0.5, m


def _rmsprop(group: Group, state: dict[str, Any], g: Tensor) -> tuple[Tensor, Tensor]:
    alpha = float(group["alpha"])
    v = (1 - alpha) * g * g + (alpha * state["square_avg"] if "square_avg" in state else 0)
    # torch's has no bias correction: its first steps are up to 1/sqrt(1 - alpha) longer and recover by themselves
    v = v / (1 - alpha ** (float(state.get("step", 0)) + 1))
    if group["centered"]:
        mean = (1 - alpha) * g + (alpha * state["grad_avg"] if "grad_avg" in state else 0)
        v = v - mean * mean
    scale = 1 / (v.clamp_min(0).sqrt() + float(group["eps"]))
    buffer = state.get("momentum_buffer")
    beta = float(group["momentum"])
    # the buffer already holds preconditioned steps: undo that to have one direction in gradient units
    return scale, g if not beta or buffer is None else beta * buffer / scale + g


def _adagrad(group: Group, state: dict[str, Any], g: Tensor) -> tuple[Tensor, Tensor]:
    total = state["sum"] + g * g if "sum" in state else g * g
    t = float(state.get("step", 0))
    decay = 1 + t * float(group["lr_decay"])
    return 1 / ((total.sqrt() + float(group["eps"])) * decay), g


def _adamax(group: Group, state: dict[str, Any], g: Tensor) -> tuple[Tensor, Tensor]:
    beta1, beta2 = (float(b) for b in group["betas"])
    t = float(state.get("step", 0)) + 1
    m = (1 - beta1) * g + (beta1 * state["exp_avg"] if "exp_avg" in state else 0)
    largest = g.abs() + float(group["eps"])
    if "exp_inf" in state:
        largest = torch.maximum(beta2 * state["exp_inf"], largest)
    return 1 / largest, m / (1 - beta1**t)


def _adadelta(group: Group, state: dict[str, Any], g: Tensor) -> tuple[Tensor, Tensor]:
    rho, eps = float(group["rho"]), float(group["eps"])
    v = (1 - rho) * g * g + (rho * state["square_avg"] if "square_avg" in state else 0)
    return ((state["acc_delta"] if "acc_delta" in state else torch.zeros_like(g)) + eps).sqrt() / (v + eps).sqrt(), g


RULES: dict[str, Rule] = {
    "SGD": _sgd,
    **dict.fromkeys(ADAM, _adam),
    "RAdam": _radam,
    "Adamax": _adamax,
    "RMSprop": _rmsprop,
    "Adagrad": _adagrad,
    "Adadelta": _adadelta,
}

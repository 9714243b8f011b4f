"""Hugging Face's Trainer: an optimizer by its own rules, a factory for it, and readings in its log.

Trainer(optimizers=(adaptive(model, lr=5e-5), None))
Trainer(optimizer_cls_and_kwargs=(AdaptiveFactory, {"lr": 5e-5, "weight_decay": 0.01}))
Trainer(compute_loss_func=criterion, optimizer_cls_and_kwargs=(AdaptiveFactory, {"lr": 5e-5, "loss_fn": criterion}))
trainer.add_callback(LogReadings(trainer))
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn
from torch.optim import AdamW, Optimizer
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from adaptive_opt.integrations.unwrap import wrapper_in
from adaptive_opt.optimizer import AdaptiveOptimizer
from adaptive_opt.records import StepReport
from adaptive_opt.telemetry import scalars

OURS = ("probe", "policy", "modes", "interventions", "step_size", "validate", "sinks", "objective", "loss_fn")


def adaptive(
    model: nn.Module, base: Callable[..., Optimizer] = AdamW, *, weight_decay: float = 0.0, **kwargs: Any
) -> AdaptiveOptimizer:
    """A wrapped optimizer over the groups that Trainer itself makes: no weight decay on biases and normalisation layers.

    base: the optimizer's class. kwargs: AdaptiveOptimizer's own keywords (probe, policy, modes, interventions, step_size,
    validate, sinks, objective, loss_fn) go to it, all others (lr, betas, fused ...) to the base. The batch is replayed through
    the model's own `output.loss`. A loss that Trainer computes outside of the model can be replayed if it is a Module, given
    to both: `Trainer(compute_loss_func=criterion)` and `loss_fn=criterion`, with `forward(outputs, labels,
    num_items_in_batch=None)`. A plain function, and `label_smoothing_factor` (give CrossEntropyLoss's own in such a Module),
    switch the measurements off, with one warning. `optim` and `learning_rate` of TrainingArguments are not looked at; its
    schedule, clipping and accumulation work as always.
    """
    ours = {name: kwargs.pop(name) for name in OURS if name in kwargs}
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    decayed = set(Trainer.get_decay_parameter_names(None, model))  # type: ignore[arg-type] # it uses no self
    groups = [
        {"params": [p for name, p in trained.items() if name in decayed], "weight_decay": weight_decay},
        {"params": [p for name, p in trained.items() if name not in decayed], "weight_decay": 0.0},
    ]
    return AdaptiveOptimizer(base([g for g in groups if g["params"]], **kwargs), model, **ours)


class AdaptiveFactory:
    """`adaptive` as Trainer's `optimizer_cls_and_kwargs` wants it: made without arguments, then called with the model."""

    def __call__(self, model: nn.Module, **kwargs: Any) -> AdaptiveOptimizer:
        return adaptive(model, **kwargs)


class LogReadings(TrainerCallback):
    """Puts every reading's numbers and every event into Trainer's log, and so to wherever `report_to` sends it."""

    def __init__(self, trainer: Trainer):
        self.trainer = trainer

    def on_optimizer_step(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        report = wrapper_in(kwargs["optimizer"]).report
        if report is not None and (report.reading is not None or report.events):
            self.trainer.log(_logged(report))


def _logged(report: StepReport) -> dict[str, Any]:
    numbers = {f"adaptive/{name}": value for name, value in scalars(report).items()}
    return numbers | ({"adaptive/events": "; ".join(e.sentence() for e in report.events)} if report.events else {})

"""The public surface as a strictly typed program uses it: pyright checks it in strict mode (make lint); nothing runs it."""

from collections.abc import Callable
from typing import assert_type

import torch
from torch import Tensor, nn
from torch.optim import SGD, Optimizer
from torch.optim.lr_scheduler import StepLR

from adaptive_opt import (
    AdaptiveOptimizer,
    Condition,
    ConstantPolicy,
    Decision,
    Diagnosis,
    LanczosProbe,
    LayerReading,
    Reading,
    RulePolicy,
    StepReport,
    checkup,
)
from adaptive_opt.telemetry import ConsoleSink, JsonlSink, LoggingSink, scalars


def as_any_optimizer(model: nn.Module, criterion: nn.Module, closure: Callable[[], float]) -> None:
    optimizer = AdaptiveOptimizer(
        SGD(model.parameters(), lr=0.1),
        model,
        loss_fn=criterion,
        probe=LanczosProbe(overhead=0.05, num_steps=10),
        policy=RulePolicy(),
        validate=lambda: 0.0,
        sinks=[ConsoleSink(every=10), JsonlSink("runs/typed"), LoggingSink(), print],
    )
    plain: Optimizer = optimizer
    StepLR(plain, 1).step()
    assert_type(optimizer.step(), None)
    assert_type(optimizer.step(closure), float)
    optimizer.zero_grad(set_to_none=True)
    optimizer.add_param_group({"params": list(model.parameters())})
    optimizer.load_state_dict(optimizer.state_dict())
    assert_type(optimizer.base, Optimizer)
    assert_type(optimizer.steps, int)
    assert_type(optimizer.reading, Reading | None)
    assert_type(optimizer.report, StepReport | None)
    assert_type(optimizer.probe_now(), Reading)


def by_objective(w: Tensor) -> AdaptiveOptimizer:
    return AdaptiveOptimizer(SGD([w], lr=0.1), objective=lambda: (w**2).sum(), policy=ConstantPolicy("kfac"))


def what_is_read(report: StepReport, model: nn.Module, criterion: nn.Module) -> list[LayerReading]:
    assert_type(scalars(report), dict[str, float])
    reading = checkup(model, criterion, (torch.zeros(1, 2), torch.zeros(1, 2)))
    assert_type(reading.kappa, float | None)
    assert_type(reading.delta, int | None)
    return list(reading.layers)


class Cautious:
    """A policy of one's own."""

    def decide(self, diagnosis: Diagnosis, history: object) -> Decision:
        return Decision(interventions=("rollback",) if diagnosis.has(Condition.NON_FINITE) else ())


def with_own_policy(model: nn.Module) -> AdaptiveOptimizer:
    return AdaptiveOptimizer(SGD(model.parameters(), lr=0.1), model, policy=Cautious())

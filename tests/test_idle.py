"""A wrapper with nothing to do: probe off, policy "base". What it costs in time is measured by scripts/bench_idle.py."""

import pickle

import pytest
import torch
from problems import BASES, make

from adaptive_opt import AdaptiveOptimizer, ConstantPolicy, LanczosProbe
from scripts.bench_idle import MODELS, memory

IDLE = {"probe": LanczosProbe(overhead=0), "policy": ConstantPolicy("base")}
RNG = torch.get_rng_state().nbytes
LOSS_AND_WEIGHT = 8


def idle(name="mlp", base="adamw"):
    problem = make(name, 6)
    base = BASES[base](problem.model.parameters())
    return problem, AdaptiveOptimizer(base, problem.model, loss_fn=problem.criterion, **IDLE)


def backward(problem, optimizer, step):
    x, y = problem.batches[step]
    optimizer.zero_grad()
    problem.criterion(problem.model(x), y).backward()


@pytest.mark.parametrize("name", MODELS)
def test_it_holds_the_batch_and_its_generators_state_until_the_step_and_nothing_after(name):
    assert memory(name) == (RNG + LOSS_AND_WEIGHT, 0)


def test_it_measures_when_it_is_asked_and_trains_as_the_base_does():
    problem, optimizer = idle("cnn")
    bare = make("cnn", 6)
    base = BASES["adamw"](bare.model.parameters())
    for step in range(6):
        torch.manual_seed(step)
        backward(problem, optimizer, step)
        if step == 3:
            assert optimizer.probe_now().stability > 0
        optimizer.step()
        torch.manual_seed(step)
        backward(bare, base, step)
        base.step()
    assert all(torch.equal(a, b) for a, b in zip(problem.model.parameters(), bare.model.parameters(), strict=True))


def test_its_report_is_of_the_step_that_was_taken_whenever_it_is_asked_for():
    problem, optimizer = idle()
    assert optimizer.report is None
    for step in range(3):
        backward(problem, optimizer, step)
        optimizer.step()
        optimizer.param_groups[0]["lr"] *= 0.5  # a scheduler steps after it
    report = optimizer.report
    assert (report.step, report.lr, report.lr_scale, report.mode, report.stepped) == (2, 3e-3 / 4, 1.0, "base", True)
    assert optimizer.report is report
    assert optimizer.steps == 3
    assert pickle.loads(pickle.dumps(optimizer)).report == report


def test_it_wakes_up_when_it_is_given_another_policy_or_probe():
    problem, optimizer = idle()
    for step in range(2):
        backward(problem, optimizer, step)
        optimizer.step()
    assert optimizer.reading is None
    optimizer.control.probe = LanczosProbe(every=1, num_steps=3)
    backward(problem, optimizer, 2)
    optimizer.step()
    assert optimizer.reading.step == 2

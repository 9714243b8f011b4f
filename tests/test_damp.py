"""What is seen at once of a learning rate that is too high, what that costs a healthy run, and how damp lets go."""

import pytest
import torch
from torch import nn
from torch.nn.utils import clip_grad_norm_

from adaptive_opt import AdaptiveOptimizer, ConstantPolicy, RulePolicy
from adaptive_opt.interventions import Damp
from adaptive_opt.records import Reading
from experiments.tasks.digits import Digits

BASES = {
    "adamw": lambda p, factor: torch.optim.AdamW(p, lr=1e-3 * factor),
    "heavy ball": lambda p, factor: torch.optim.SGD(p, lr=0.02 * factor, momentum=0.9),
    "sgd": lambda p, factor: torch.optim.SGD(p, lr=0.05 * factor),
    "rmsprop": lambda p, factor: torch.optim.RMSprop(p, lr=3e-4 * factor),
}


def run(steps, base, factor=1.0, task=None, clip=None, **kwargs):
    """The reports of a run on digits."""
    task, reports = Digits(steps=steps) if task is None else task, []
    optimizer = AdaptiveOptimizer(
        BASES[base](task.model.parameters(), factor), task.model, loss_fn=task.loss_fn, sinks=[reports.append], **kwargs
    )
    torch.manual_seed(0)
    for step in range(steps):
        optimizer.zero_grad()
        x, y = task.batch(step)
        task.loss_fn(task.model(x), y).backward()
        if clip is not None:
            clip_grad_norm_(task.model.parameters(), clip)
        optimizer.step()
    return reports, optimizer


@pytest.mark.parametrize("factor", [100, 1000])
@pytest.mark.parametrize("base", BASES)
def test_a_rate_far_too_high_is_held_in_the_very_first_step(base, factor):
    (report,), optimizer = run(1, base, factor, task=Digits(depth=12, steps=1))
    assert report.reading.kind == "cheap"
    assert report.reading.stability > 2
    assert report.reading.layers
    assert report.lr_scale < 0.1
    assert optimizer.control.damp.engaged


@pytest.mark.parametrize("base", ["adamw", "rmsprop"])
def test_a_healthy_run_pays_ten_gradients_for_seeing_that_it_is(base):
    reports, _ = run(80, base, policy=RulePolicy(tries=()))
    first, *later = (r.reading for r in reports if r.reading is not None)
    assert (first.step, first.kind, first.stability, later) == (0, "layers", None, [])
    assert first.layers
    assert first.loss == pytest.approx(reports[0].loss)
    assert first.grad_norm == pytest.approx(reports[0].grad_norm)
    assert reports[-1].probe_cost < 7  # early readings took 24
    assert not any(r.events for r in reports)


def test_the_layers_alone_are_the_layers_of_a_full_reading():
    reports, _ = run(1, "adamw")
    task = Digits(steps=1)
    optimizer = AdaptiveOptimizer(BASES["adamw"](task.model.parameters(), 1), task.model, loss_fn=task.loss_fn)
    torch.manual_seed(0)
    x, y = task.batch(0)
    task.loss_fn(task.model(x), y).backward()
    full = optimizer.probe_now()
    for alone, layer in zip(reports[0].reading.layers, full.layers, strict=True):
        assert alone.name == layer.name
        assert alone.sigma_max == pytest.approx(layer.sigma_max, rel=0.3)  # four steps from another start
        assert alone.sigma_rms == pytest.approx(layer.sigma_rms, rel=0.5)


def test_an_exploding_stack_is_seen_at_the_first_step_without_a_reading_of_curvature():
    task = Digits(depth=12, steps=1)
    with torch.no_grad():
        for m in task.model:
            if isinstance(m, nn.Linear):
                m.weight.mul_(3)
    (report,), _ = run(1, "adamw", task=task)
    assert report.reading.kind == "layers"
    assert "brought sigma_rms of 13 layers to 1" in report.events[0].done


def test_where_looks_say_nothing_the_early_readings_are_taken():
    clipped, _ = run(20, "heavy ball", clip=0.1)  # a clipped gradient is not the loss's slope
    constant, _ = run(20, "adamw", policy=ConstantPolicy("base"))  # nothing would be done about it: the numbers are the aim
    for reports in (clipped, constant):
        readings = [(r.step, r.reading.kind) for r in reports if r.reading is not None]
        assert readings == [(step, "cheap") for step in (0, 1, 2, 4, 8, 16)]


def held(step, overshoot, stability):
    """A damp that was engaged at `step` by these numbers."""
    damp = Damp()
    damp.since, damp.asked, damp.readings, damp.fraction = step, step, 1, 0.15
    damp.follow(Reading(step + 1, 1.0, 1.0, stability=stability, overshoot=overshoot))
    return damp


def test_looks_ahead_lengthen_a_held_step_and_ask_for_the_reading_that_lets_it_go():
    damp = held(0, overshoot=50.0, stability=10.0)
    before, asked = damp.scale, []
    for step in range(2, 300):
        damp.look(step, 0.2)
        if damp.asks(step):
            asked.append(step)
    assert damp.scale > 3 * before
    assert asked == [30, 80, 180]  # calm for 30 steps; then every reading that does not let go doubles the wait
    done = [damp.follow(Reading(step, 1.0, 1.0, stability=0.5, overshoot=0.2)) for step in (300, 301)]
    assert done == [None, "let the learning rate return"]
    assert not damp.engaged


def test_a_look_at_a_step_that_is_still_too_long_asks_for_nothing():
    damp = held(0, overshoot=50.0, stability=10.0)
    for step in range(2, 200):
        damp.look(step, 1.5)
        assert not damp.asks(step)


@pytest.mark.slow
@pytest.mark.parametrize("depth", [3, 12])
@pytest.mark.parametrize("factor", [100, 1000])
@pytest.mark.parametrize("base", BASES)
def test_a_rate_far_too_high_trains_to_the_end(base, factor, depth):
    task = Digits(depth=depth, steps=400)
    run(400, base, factor, task=task)
    assert task.evaluate()["test_accuracy"] > 90

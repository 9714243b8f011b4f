"""The price of a reading: measured time keeps the budget, and a given price makes the schedule a function of the seed."""

import time

import pytest
import torch
from problems import make
from torch.optim import AdamW

from adaptive_opt import AdaptiveOptimizer, ConstantPolicy, LanczosProbe
from adaptive_opt.clock import Clock
from adaptive_opt.memory import ProbeMemory
from adaptive_opt.records import Trend

CPU = torch.device("cpu")


def spin(seconds):
    end = time.process_time() + seconds
    while time.process_time() < end:
        pass


def test_the_clock_counts_work_and_not_sleep_and_probing_is_part_of_the_whole():
    clock = Clock()
    clock.tick(CPU)
    spin(0.02)
    with clock.measuring(CPU):
        spin(0.03)
        time.sleep(0.2)
    clock.tick(CPU)
    assert 0.03 <= clock.probing < 0.1
    assert clock.probing + 0.02 <= clock.total < 0.15


def test_the_clock_goes_on_after_a_checkpoint_without_the_time_between():
    clock, later = Clock(), Clock()
    clock.tick(CPU)
    spin(0.01)
    clock.tick(CPU)
    later.load_state_dict(clock.state_dict())
    spin(0.01)
    later.tick(CPU)  # the first step after the resume: what came before belongs to nobody
    assert later.total == clock.total


@pytest.mark.parametrize(("before", "factor", "after"), [(1, 1.05, 1), (1, 1.3, 2**0.5), (1, 7.9, 8), (4, 3.0, 4), (4, 0.5, 1)])
def test_a_price_changes_only_where_it_is_clearly_wrong(before, factor, after):
    memory = ProbeMemory(torch.Generator(), spent=10.0, price=before)
    memory.clock.probing, memory.clock.total = factor * 10 * 0.5, factor * 10 * 0.5 + 100 * 0.5  # half a second a step
    memory.reprice(100)
    assert memory.price == pytest.approx(after)


def trained(steps, probe, extra=0.0):
    """A run whose readings take `extra` seconds more than they should; the steps at which it read, and its clock."""
    problem = make("mlp", 32)
    optimizer = AdaptiveOptimizer(
        AdamW(problem.model.parameters()), problem.model, loss_fn=problem.criterion, probe=probe, policy=ConstantPolicy("base")
    )
    measure, readings = optimizer.control._read, []
    optimizer.control._read = lambda *args, **kwargs: (spin(extra), measure(*args, **kwargs))[1]
    for step in range(steps):
        x, y = problem.batches[step % 32]
        optimizer.zero_grad()
        problem.criterion(problem.model(x), y).backward()
        optimizer.step()
        if optimizer.report.reading is not None:
            readings.append(step)
    return readings, optimizer.control.memory


def test_readings_that_take_longer_than_counted_come_less_often_and_the_share_is_kept():
    readings, memory = trained(3000, LanczosProbe(overhead=0.05), extra=0.02)
    usual, _ = trained(3000, LanczosProbe(overhead=0.05, price=1.0), extra=0.02)
    assert memory.price > 2
    assert len(readings) < len(usual)
    late = [step for step in readings if step > 128]
    assert memory.clock.probing / memory.clock.total < 0.05 * 1.3 or not late  # the first, financed ones are paid back first


def test_a_given_price_makes_the_schedule_a_function_of_counts_alone():
    first, second = (trained(600, LanczosProbe(overhead=0.05, price=1.0), extra=e)[0] for e in (0.0, 0.002))
    assert first == second


def test_a_price_spaces_healthy_readings_out_and_spares_who_is_watched():
    dear, cheap = LanczosProbe(overhead=0.05, price=4.0), LanczosProbe(overhead=0.05, price=1.0)
    memory = ProbeMemory(torch.Generator(), spent=20.0, last_cheap=600, last_full=600)
    trend = Trend(800, 1.0, 1.0)
    assert cheap.due(trend, memory, 2.5, 100.0) == "cheap"
    assert dear.due(trend, memory, 2.5, 100.0) is None
    assert dear.due(trend, memory, 2.5, 100.0, watchful=True) == "cheap"


@pytest.mark.parametrize(
    "kwargs",
    [{"price": 0.0}, {"price": -1.0}, {"curvature": "fisher"}, {"backend": "magic"}, {"memory": 0}, {"layers": "weight"}],
)
def test_settings_that_make_no_sense_are_refused_in_the_callers_words(kwargs):
    with pytest.raises(ValueError, match=r"LanczosProbe\(" + next(iter(kwargs)) + "="):
        LanczosProbe(**kwargs)


@pytest.mark.parametrize("batch", [1, 5, 33, 64, 500])
def test_what_a_reading_costs_at_least_is_less_than_what_it_costs_on_any_batch(batch):
    problem = make("mlp", 1, batch=batch)
    optimizer = AdaptiveOptimizer(AdamW(problem.model.parameters()), problem.model, loss_fn=problem.criterion)
    x, y = problem.batches[0]
    problem.criterion(problem.model(x), y).backward()
    control = optimizer.control
    objective = control.gate.context(control.modes["base"]).objective
    for least, cost in zip(control.probe.least, control.probe.costs(objective, control.memory, False), strict=True):
        assert least <= cost


def test_looks_ahead_come_where_early_readings_did_and_then_for_a_tenth_of_the_budget():
    probe, memory, looked = LanczosProbe(overhead=0.05), ProbeMemory(torch.Generator()), []
    for step in range(390):
        assert probe.due(Trend(step, 1.0, 1.0), memory, 10.0, 60.0, early=False, first=False) is None
        if probe.glances(step, memory, 0.35):
            looked.append(step)
            memory.last_look = step
    assert looked == [0, 1, 2, 4, 8, 16, 32, 64, 134, 204, 274, 344]
    assert not LanczosProbe(every=10).glances(0, memory, 0.35)
    assert not LanczosProbe(overhead=0).glances(0, memory, 0.35)

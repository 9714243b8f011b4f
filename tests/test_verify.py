"""Trials and verdicts: what counts as a gain, how long a trial lasts, and that a run stopped in one goes on in it."""

import io
import math
from dataclasses import replace

import pytest
import torch
from problems import make
from test_contracts import assert_equal
from test_healing import Eager, wrap

from adaptive_opt import AdaptiveOptimizer, LanczosProbe
from adaptive_opt.interventions import Damp
from adaptive_opt.interventions.base import Patient
from adaptive_opt.modes import BaseStep, StepContext
from adaptive_opt.records import Event, Reading, Trend
from adaptive_opt.verify import Trial, below_its_start, better_mode, faster_progress, slope
from experiments.loop import train
from experiments.tasks.digits import Digits


def noisy(rate, alike, sigma, n, generator):
    """n losses that fall by `rate` a step, with noise of lag-one autocorrelation `alike` in the logarithm."""
    noise, out = 0.0, []
    for t in range(n):
        noise = alike * noise + sigma * math.sqrt(1 - alike**2) * float(torch.randn((), generator=generator))
        out.append(math.exp(-rate * t + noise))
    return out


@pytest.mark.parametrize("alike", [0.0, 0.5, 0.8])
def test_the_slopes_error_holds_where_neighbouring_losses_are_alike(alike):
    generator = torch.Generator().manual_seed(0)
    fits = [slope(noisy(0.01, alike, 0.2, 50, generator)) for _ in range(400)]
    covered = sum(abs(b + 0.01) <= 2 * error for b, error in fits) / len(fits)
    assert covered > 0.8  # least squares alone: 0.95, 0.75, 0.51


def falling(rate, sigma, start=1.0, n=50, seed=0):
    return [start * loss for loss in noisy(rate, 0.0, sigma, n, torch.Generator().manual_seed(seed))]


@pytest.mark.parametrize(
    ("before", "since", "kept", "why"),
    [
        (falling(0.01, 0.05), falling(0.05, 0.05, 0.6), True, "faster"),
        (falling(0.02, 0.05), falling(0.001, 0.05, 0.36), False, "slower"),
        (falling(0.0, 0.05), falling(-0.03, 0.05), False, "slower"),
        (falling(0.0, 3.0), falling(-0.01, 0.02), False, "the loss rises"),
        (falling(0.0192, 1.0), falling(-0.007, 1.0, 0.2, seed=3), None, "too little to tell"),  # was once taken for a gain
        (falling(0.01, 0.3), falling(0.009, 0.3, 0.5, seed=1), None, "too little to tell"),
        (falling(0.02, 0.05), falling(0.025, 0.05, 0.5), None, "too little to tell"),  # faster, but not by half
        (falling(0.01, 0.05)[:5], falling(0.02, 0.05), None, "too few losses"),
    ],
)
def test_a_gain_is_shown_or_it_is_none(before, since, kept, why):
    verdict = faster_progress((range(-len(before), 0), before), (range(len(since)), since))
    assert verdict.kept is kept, verdict.result
    assert why in verdict.result
    if len(before) >= 10:
        assert "+-" in verdict.result


def test_validation_overrules_progress():
    event, before = Event(50, "kfac", "", ""), falling(0.01, 0.05)
    kfac = Trial("kfac", event, 100, 1.0, list(range(50)), before, validation=0.5)
    steps, faster, worse = range(50, 100), falling(0.05, 0.05, 0.6), falling(-0.01, 0.05)
    assert better_mode(kfac, (steps, faster), 0.6).kept is False
    assert better_mode(kfac, (steps, worse), 0.4).kept is False
    assert better_mode(kfac, (steps, faster), 0.4).kept is True


def test_progress_counts_in_the_bases_time_and_against_a_loss_that_falls_like_a_power():
    def power(a, b, exponent):
        return range(a, b), [step**-exponent for step in range(a, b)]

    before, on = power(1, 51, 1.0), power(51, 101, 1.0)
    assert "too little to tell" in faster_progress(before, on, at=50).result  # the same curve is no slower, whatever its slope
    assert faster_progress(before, on).kept is False  # held against the steep beginning it would be
    twice = range(51, 101), [50 * (step - 25) ** -2.0 for step in range(51, 101)]
    assert faster_progress(before, twice, at=50).kept is True
    assert faster_progress(before, twice, at=50, price=4.0).kept is not True


def test_losses_that_are_seldom_seen_count_by_their_steps():
    often, seldom = range(100), range(0, 100, 10)
    curve = [math.exp(-0.01 * step) for step in range(100)]
    assert slope(curve, often)[0] == pytest.approx(slope(curve[::10], seldom)[0])


class Restless(BaseStep):
    """A mode that goes nowhere: every step is undone by the next."""

    name = "kfac"

    def __init__(self):
        self.sign = 1.0

    def step(self, ctx):
        self.sign = -self.sign
        with torch.no_grad():
            for p in ctx.params:
                p.add_(p.grad, alpha=0.02 * self.sign)


def test_a_trial_that_tells_nothing_is_made_longer_and_then_taken_back():
    problem = make("mlp", 250, batch=4)  # losses of four samples: nothing but noise
    base = torch.optim.SGD(problem.model.parameters(), lr=1e-5)
    optimizer = AdaptiveOptimizer(
        base, problem.model, loss_fn=problem.criterion, policy=Eager(), modes={"base": BaseStep(), "kfac": Restless()}
    )
    said = []
    for x, y in problem.batches:
        optimizer.zero_grad()
        problem.criterion(problem.model(x), y).backward()
        optimizer.step()
        said += [e for e in optimizer.report.events if e.name == "kfac"]
    longer = [e for e in said if "25 steps more" in e.result]
    assert [e.step for e in longer] == [60, 60, 60]
    assert all(e.outcome == "pending" and "too little to tell" in e.result for e in longer)
    verdict = next(e for e in said if e.outcome != "pending")
    assert verdict.outcome == "reverted"
    assert "no gain in 100 steps" in verdict.result


def test_damp_does_not_let_go_on_one_calm_reading():
    ctx = StepContext(torch.optim.SGD([torch.zeros(2, requires_grad=True)], lr=1.0), [], [], None)
    damp, wild = Damp(calm=30), Reading(step=0, loss=1.0, grad_norm=1.0, stability=50.0, overshoot=20.0)
    assert damp.apply(Patient(ctx, Trend(0, 1.0, 1.0), wild)) is not None
    held = damp.scale
    assert damp.follow(replace(wild, step=10, stability=1.0, overshoot=0.3)) is None
    assert damp.engaged
    assert damp.scale < 0.5
    assert damp.scale > held
    said = [damp.follow(replace(wild, step=step, stability=1.0, overshoot=0.3)) for step in range(20, 100, 10)]
    assert "let the learning rate return" in said
    assert damp.scale < 1  # by and by
    damp.good_step()
    assert damp.scale < 1


class Run:
    """A run of digits that can be stopped: kfac goes on trial at step 60 and has its verdicts from step 85 on."""

    def __init__(self):
        self.task = Digits(seed=3)
        self.model, self.optimizer = self.task.model, wrap(
            self.task,
            torch.optim.AdamW(self.task.model.parameters(), 1e-3),
            policy=Eager(),
            probe=LanczosProbe(overhead=0.05, price=1.0),
        )  # fmt: skip
        self.batches = [self.task.batch(i) for i in range(140)]
        self.done, self.said = 0, []

    def to(self, step):
        for x, y in self.batches[self.done : step]:
            self.optimizer.zero_grad()
            self.task.loss_fn(self.model(x), y).backward()
            self.optimizer.step()
            self.said += [event.sentence() for event in self.optimizer.report.events]
        self.done = step
        return self


@pytest.fixture(scope="module")
def whole():
    return Run().to(140)


@pytest.mark.parametrize("stop", [61, 84])
def test_a_run_stopped_in_the_middle_of_a_trial_goes_on_in_it_bit_for_bit(stop, whole):
    run = Run().to(stop)
    assert run.optimizer.control.trial is not None
    file = io.BytesIO()
    torch.save({"model": run.model.state_dict(), "optimizer": run.optimizer.state_dict()}, file)
    file.seek(0)
    loaded, other = torch.load(file, weights_only=True), Run()
    other.model.load_state_dict(loaded["model"])
    other.optimizer.load_state_dict(loaded["optimizer"])
    other.done = stop
    other.to(140)
    assert_equal(whole.model.state_dict().values(), other.model.state_dict().values())
    assert run.said + other.said == whole.said
    assert any("-> kept" in line or "-> reverted" in line for line in other.said)


def test_the_same_seed_gives_the_same_treatments_and_the_same_bits():
    def run():
        task = Digits(depth=6, steps=120)
        base = torch.optim.SGD(task.model.parameters(), lr=2.0, momentum=0.9)
        outcome = train(task, wrap(task, base, probe=LanczosProbe(overhead=0.05, price=1.0)))
        return task, outcome

    (one, first), (two, second) = run(), run()
    assert first.treatments
    assert first.treatments == second.treatments
    assert_equal(one.model.state_dict().values(), two.model.state_dict().values())


@pytest.mark.parametrize(
    ("since", "kept"),
    [
        ([0.70] + [0.65, 0.71] * 6, True),  # lower than the next batch's loss at the start
        ([0.70] + [0.69, 0.75] * 6, None),  # within the batches' spread
        ([0.70] + [2.7] * 12, False),
        ([], None),
    ],
)
def test_a_start_is_compared_within_the_spread_of_batches(since, kept):
    assert below_its_start(0.68, since).kept is kept

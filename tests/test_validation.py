"""What only validation shows: learning by heart is seen, SAM is tried on it and judged by it, and asking leaves no trace."""

import io
import math
from itertools import pairwise

import pytest
import torch
from problems import make
from test_contracts import assert_equal
from test_healing import SharpPolicy, wrap
from torch import nn

from adaptive_opt import AdaptiveOptimizer, Condition, ConstantPolicy, LanczosProbe, Reading
from adaptive_opt.diagnosis import diagnose, memorising
from adaptive_opt.records import Look, Trend
from adaptive_opt.validation import MOST, SHARE, Validation
from adaptive_opt.verify import better_validation
from experiments.loop import train
from experiments.tasks.digits import Digits
from experiments.tasks.mnist import MNIST

CALM = Trend(step=100, loss=1.0, grad_norm=1.0)
LEARNT = [2.5, 1.8, 1.6, 1.52, 1.5]
FALLING = [2.5, 1.9, 1.6, 1.4, 1.2, 1.0, 0.9, 0.8, 0.7, 0.6]


def looks(validation, training, every=10):
    return [Look(every * i, v, t) for i, (v, t) in enumerate(zip(validation, training, strict=True))]


@pytest.mark.parametrize(
    ("validation", "training", "seen"),
    [
        ([*LEARNT, 1.55, 1.6, 1.68, 1.72, 1.8], FALLING, True),
        ([*LEARNT, 1.5, 1.51, 1.52, 1.51, 1.53], FALLING, False),  # a hundredth of what was gained
        ([*LEARNT, 1.48, 1.47, 1.46, 1.45, 1.44], FALLING, False),  # it still falls
        ([*LEARNT, 1.8, 1.5, 1.45, 1.9, 1.5], FALLING, False),  # noise
        ([*LEARNT, 1.55, 1.6, 1.68, 1.72, 1.8], [*FALLING[:5], 1.3, 1.35, 1.4, 1.5, 1.6], False),  # training is worse too
        ([*LEARNT, 1.55, 1.6], FALLING[:7], False),  # too short to tell
        ([*LEARNT, 1.55, math.nan, 1.6, 1.68, 1.72, 1.8], [*FALLING, 0.5], True),  # a look that broke says nothing
        ([math.nan, *LEARNT, 1.55, 1.6, 1.68, 1.72], FALLING, False),  # what was gained is not known
    ],
)
def test_learning_by_heart_is_a_validation_loss_that_rises_while_the_training_loss_falls(validation, training, seen):
    found = memorising(looks(validation, training))
    assert (found is not None) is seen
    if found is not None:
        assert found.condition is Condition.SHARP
        assert "learns by heart: since step 20 the validation loss rose from 1.52 to" in found.evidence


def test_with_a_validation_loss_the_edge_of_stability_alone_is_healthy():
    edge = Reading(step=100, loss=1.0, grad_norm=1.0, stability=1.0)
    sick = looks([*LEARNT, 1.55, 1.6, 1.68, 1.72, 1.8], FALLING)
    assert diagnose(CALM, edge).has(Condition.SHARP)
    assert diagnose(CALM, edge, looks=()).has(Condition.HEALTHY)
    assert diagnose(CALM, edge, looks=sick).has(Condition.SHARP)


RISING = looks([1.50, 1.56, 1.59, 1.65, 1.70, 1.75], FALLING[:6])
SINKING = looks([2.0, 1.91, 1.79, 1.70, 1.61, 1.50], FALLING[:6])


@pytest.mark.parametrize(
    ("before", "since", "kept"),
    [
        (RISING, [1.70, 1.69, 1.68], True),
        (RISING, [1.80, 1.85, 1.90], None),  # just as before: standing in for the base is no gain
        (RISING, [1.95, 2.00, 2.10], False),
        (SINKING, [1.40, 1.30, 1.20], False),  # as the base would have at half of the compute
        (SINKING, [1.20, 1.00, 0.80], True),
        (RISING[:3], [1.6], False),  # no line yet: against the latest look
        (RISING[:3], [1.5], True),
        (RISING, [], None),
    ],
)
def test_sam_is_judged_by_the_line_that_the_validation_loss_was_on(before, since, kept):
    end = before[-1].step
    verdict = better_validation(before, [Look(end + 10 * (i + 1), v, 1.0) for i, v in enumerate(since)])
    assert verdict.kept is kept, verdict.result
    assert "validation loss" in verdict.result


class Careless(nn.Module):
    """A validation function that draws random numbers, leaves modes as it likes and moves running statistics."""

    def __init__(self, problem):
        super().__init__()
        self.problem, self.asked = [problem], 0

    def forward(self):
        (problem,) = self.problem
        self.asked += 1
        x, y = problem.batches[0]
        problem.model.train()
        loss = float(problem.criterion(problem.model(x + torch.randn_like(x)), y))
        problem.model.eval()
        return loss


@pytest.mark.parametrize("name", ["mlp", "cnn"])
def test_asking_for_the_validation_loss_changes_no_bit_of_the_run(name):
    def run(wrapped):
        problem = make(name, 60)
        optimizer, careless = torch.optim.AdamW(problem.model.parameters(), lr=3e-3), Careless(problem)
        if wrapped:
            probe = LanczosProbe(every=20, num_steps=4)
            optimizer = AdaptiveOptimizer(
                optimizer, problem.model, loss_fn=problem.criterion, policy=ConstantPolicy(), probe=probe, validate=careless
            )
        torch.manual_seed(1)
        for x, y in problem.batches:
            optimizer.zero_grad()
            problem.criterion(problem.model(x), y).backward()
            optimizer.step()
        assert problem.model.training
        return problem.model.state_dict(), torch.get_rng_state(), careless.asked, optimizer

    (bare, rng, *_), (state, after, asked, optimizer) = run(False), run(True)
    assert asked == 5  # 32 rows of a batch of 32 are 0.35 gradients: every 12 steps
    assert [look.step for look in optimizer.control.validation.looks] == [0, 12, 24, 36, 48]
    assert_equal(bare.values(), state.values())
    assert torch.equal(rng, after)
    assert optimizer.report.treatment_cost == pytest.approx(5 * 0.35)


def test_looks_keep_within_their_share_and_thin_out():
    v = Validation()
    for step in range(20_000):
        if v.due(step):
            v.remember(step, 1.0, 3.0, [1.0])
    gaps = {b.step - a.step for a, b in pairwise(v.looks)}
    assert 3.0 * len(v.looks) <= SHARE * 20_000
    assert len(v.looks) <= MOST
    assert v.looks[0].step == 0
    assert gaps == {v.spacing}


def test_a_slow_validation_function_is_asked_by_its_time():
    v = Validation()
    v.calls, v.clock.total, v.clock.probing = 1, 1.5, 1.0  # a step takes 0.05 seconds, a call 1: 20 steps, 32 at most
    v.remember(0, 1.0, 0.5, [])
    assert v.spacing == 17
    v.reprice(v.measured(10))
    assert v.spacing == math.ceil(32 / SHARE)
    assert Validation(reproducible=True).measured(10) == 0


def test_a_validation_function_that_raises_is_said_once_and_asked_no_more():
    problem = make("mlp", 30)
    optimizer = AdaptiveOptimizer(
        torch.optim.SGD(problem.model.parameters(), lr=0.05),
        problem.model,
        loss_fn=problem.criterion,
        validate=lambda: 1 / 0,  # pyright: ignore[reportReturnType]
    )
    said = []
    with pytest.warns(UserWarning, match=r"validation loss any more: validate\(\) raised ZeroDivisionError"):
        for x, y in problem.batches:
            optimizer.zero_grad()
            problem.criterion(problem.model(x), y).backward()
            optimizer.step()
            said += [e for e in optimizer.report.events if e.name == "validate"]
    assert len(said) == 1
    assert not optimizer.control._history().can_validate


CONTROLS = {
    "digits": (
        lambda: Digits(batch_size=128, width=512, steps=600, validation=200),
        2e-3,
        0.1,
    ),  # as the noisy ones
    "MNIST": (lambda: MNIST(width=4, steps=500, validation=400), 3e-3, 0.05),
}


@pytest.mark.slow
@pytest.mark.parametrize("base", ["AdamW", "SGD"])
@pytest.mark.parametrize("name", CONTROLS)
def test_a_healthy_run_that_overfits_mildly_is_left_alone_bit_for_bit(name, base):
    def run(wrapped):
        make_task, adam, sgd = CONTROLS[name]
        task = make_task()
        params = task.model.parameters()
        optimizer = torch.optim.AdamW(params, adam) if base == "AdamW" else torch.optim.SGD(params, sgd, momentum=0.9)
        if wrapped:
            optimizer = wrap(task, optimizer, validate=task.validation_loss)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, task.steps)
        torch.manual_seed(1000)
        return task, train(task, optimizer, schedule=schedule), optimizer

    (bare, _, _), (task, outcome, optimizer) = run(False), run(True)
    assert outcome.treatments == []
    assert len(optimizer.control.validation.looks) > 5
    assert_equal(bare.model.state_dict().values(), task.model.state_dict().values())


def noisy(seed=0, steps=400):
    return Digits(seed, batch_size=128, width=256, steps=steps, label_noise=0.4, validation=200)


def with_validation(task):
    base = torch.optim.AdamW(task.model.parameters(), lr=3e-3)
    return wrap(task, base, validate=task.validation_loss, probe=LanczosProbe(overhead=0.05, price=1.0))


class Run:
    """A run on labels that are noise, which can be stopped."""

    def __init__(self):
        self.task = noisy()
        self.optimizer, self.done, self.said = with_validation(self.task), 0, []
        self.batches = [self.task.batch(i) for i in range(self.task.steps)]

    def to(self, step):
        for x, y in self.batches[self.done : step]:
            self.optimizer.zero_grad()
            self.task.loss_fn(self.task.model(x), y).backward()
            self.optimizer.step()
            self.said += self.optimizer.report.events
        self.done = step
        return self


@pytest.fixture(scope="module")
def whole():
    return Run().to(400)


def test_sam_is_tried_when_labels_are_learnt_by_heart(whole):
    bare = noisy()
    learnt = train(bare, torch.optim.AdamW(bare.model.parameters(), lr=3e-3))
    begun = [e for e in whole.said if e.name == "sam" and "learns by heart" in e.seen and e.outcome == "pending"]
    assert begun[0].done == "switched from kfac to sam, rho 0.01 -> 0.02"  # which had learnt it faster
    assert not any(e.name == "rollback" for e in whole.said)  # training progress that sam undoes is not lost
    assert any(e.name == "sam" and e.outcome == "kept" for e in whole.said)
    assert whole.task.evaluate()["test_accuracy"] > learnt.metrics["test_accuracy"] + 4


def test_a_larger_dose_that_is_no_better_is_taken_back_to_the_one_before():
    problem, said = make("mlp", 160), []

    def validate():
        step = optimizer.steps
        problem.model(problem.batches[0][0])  # 0.35 gradients: asked every 12 steps
        return 2 + 0.01 * step if step <= 50 else 1 + 0.002 * step if step <= 100 else 5.0

    optimizer = AdaptiveOptimizer(
        torch.optim.SGD(problem.model.parameters(), lr=0.05),
        problem.model,
        loss_fn=problem.criterion,
        policy=SharpPolicy(),
        validate=validate,
        probe=LanczosProbe(every=20, num_steps=4),
    )
    for x, y in problem.batches:
        optimizer.zero_grad()
        problem.criterion(problem.model(x), y).backward()
        optimizer.step()
        said += [(e.step, e.done, e.outcome) for e in optimizer.report.events if e.name == "sam"]
    first, second = "switched from base to sam, rho 0.01 -> 0.02", "sam with rho 0.02 -> 0.04"
    assert said == [(50, first, "pending"), (50, first, "kept"), (100, second, "pending"), (100, second, "reverted")]
    assert optimizer.control.mode == "sam"
    assert optimizer.control.modes["sam"].dose == 2
    assert optimizer.control.validation.looks[-1].step > 150  # those of the larger dose are forgotten
    assert not [look for look in optimizer.control.validation.looks if 100 < look.step < 150]


def test_a_run_stopped_in_the_middle_of_sams_trial_goes_on_in_it_bit_for_bit(whole):
    began = next(e for e in whole.said if e.name == "sam")
    stop = began.step + 30
    run = Run().to(stop)
    assert run.optimizer.control.trial.name == "sam"
    file = io.BytesIO()
    torch.save({"model": run.task.model.state_dict(), "optimizer": run.optimizer.state_dict()}, file)
    file.seek(0)
    loaded, other = torch.load(file, weights_only=True), Run()
    other.task.model.load_state_dict(loaded["model"])
    other.optimizer.load_state_dict(loaded["optimizer"])
    other.done = stop
    other.to(400)
    assert run.said + other.said == whole.said
    assert_equal(whole.task.model.state_dict().values(), other.task.model.state_dict().values())

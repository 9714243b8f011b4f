"""step_size="auto": the learning rate comes from curvature, the user's and its schedule give only the shape."""

import copy
import itertools
import math

import pytest
import torch
from torch import nn
from torch.optim import SGD, AdamW
from torch.optim.lr_scheduler import LambdaLR

from adaptive_opt import AdaptiveOptimizer, ConstantPolicy, LanczosProbe, RulePolicy
from adaptive_opt.ahead import overshoot_ahead
from adaptive_opt.interventions import AutoStep
from adaptive_opt.interventions.auto_step import BEYOND, GROWTH
from adaptive_opt.metric import metric
from adaptive_opt.objective import GivenLoss, Objective
from adaptive_opt.probe import FORWARD
from adaptive_opt.records import Reading


class Bowl(nn.Module):
    """w'Aw / 2 with eigenvalues up to 4: gradient descent is stable below a learning rate of 2 / 4."""

    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.tensor([3.0, -2.0, 1.0], dtype=torch.float64))
        self.a = torch.tensor([4.0, 1.0, 0.5], dtype=torch.float64)

    def loss(self):
        return (self.a * self.w**2).sum() / 2


def run(lr, steps=40, base=SGD, shape=None, step_size="auto", every=10, **kwargs):
    model = Bowl()
    opt = AdaptiveOptimizer(
        base([model.w], lr=lr),
        objective=model.loss,
        probe=LanczosProbe(every=every),
        policy=ConstantPolicy("base"),
        step_size=step_size,
        **kwargs,
    )
    schedule = None if shape is None else LambdaLR(opt, shape)
    effective, reports = [], []
    for _ in range(steps):
        opt.zero_grad()
        model.loss().backward()
        opt.step()
        reports.append(opt.report)
        effective.append(opt.report.lr * opt.report.lr_scale)
        if schedule is not None:
            schedule.step()
    return model, effective, reports, opt


@pytest.mark.parametrize("base", [SGD, AdamW])
def test_the_users_learning_rate_does_not_matter(base):
    runs = [run(lr, base=base) for lr in (1e-6, 1e-2, 1e4)]
    for model, effective, _, _ in runs[1:]:
        assert torch.allclose(model.w, runs[0][0].w, rtol=1e-6, atol=1e-9)
        assert effective == pytest.approx(runs[0][1], rel=1e-5)


def test_on_a_quadratic_the_step_stays_near_its_limit_and_descends():
    """Where the sharpest direction is spent the step may go beyond its limit, until the next reading sees it again."""
    model, effective, _, _ = run(1e3)
    assert 0.1 * 2 / 4 < min(effective) < max(effective) < 2 * 2 / 4
    assert model.loss() < 1e-2 * Bowl().loss()


@pytest.mark.parametrize("step_size", ["user", "auto"])
@pytest.mark.parametrize("lr", [1e-2, 0.2])
def test_the_report_says_where_the_limit_is_and_how_old_that_is(lr, step_size):
    reports = run(lr, steps=15, step_size=step_size)[2]
    assert [r.lr_limit_age for r in reports] == [*range(10), *range(5)]
    assert reports[0].lr_limit == pytest.approx(2 / 4, rel=1e-6)


def test_an_empty_momentum_is_reckoned_as_full():
    """Heavy ball's first step is a tenth of what the same gradient makes of it by and by."""
    plain, heavy = (run(1.0, steps=1, base=lambda p, lr, m=m: SGD(p, lr, momentum=m))[3] for m in (0.0, 0.9))
    seen = [opt.control.interventions["damp"] for opt in (plain, heavy)]
    assert seen[1].overshoot - seen[0].overshoot == pytest.approx(math.log(10))


@pytest.mark.parametrize("share", [1e-3, 0.1, 1.0])
@pytest.mark.parametrize("base", [lambda p: SGD(p, lr=0.7, momentum=0.9), lambda p: AdamW(p, lr=0.3, weight_decay=0)])
def test_a_look_ahead_sees_the_overshoot_of_a_quadratic(base, share):
    """(d'Ad / 2) / |g'd| of the step that the optimizer takes, whatever share of it is looked at; nothing else changes."""
    model = Bowl()
    opt = base([model.w])
    for _ in range(3):
        opt.zero_grad()
        model.loss().backward()
        opt.step()
    before = model.w.detach().clone()
    opt.zero_grad()
    model.loss().backward()
    objective = Objective(GivenLoss(model.loss, [], None), [model.w])
    found, passes = overshoot_ahead(objective, metric(opt, {model.w: model.w.grad}), model.w.grad, share)
    assert torch.equal(model.w, before)
    opt.step()
    d = model.w.detach() - before
    slope = float(d @ (model.a * before))
    assert passes == 2  # no hook saw the loss
    assert found == (pytest.approx(float(d @ (model.a * d)) / 2 / -slope) if slope < 0 else None)


class Two(nn.Module):
    """A net small enough to train in a blink, on fixed noise."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Dropout(0.2), nn.Linear(16, 3))

    def forward(self, x):
        return self.net(x)


def looked(steps=60, clip=None, **kwargs):
    """Losses, and what was spent so far, of a captured run, where the hooks see the loss."""
    model, loss_fn = Two(), nn.CrossEntropyLoss()
    opt = AdaptiveOptimizer(
        AdamW(model.parameters(), lr=1e-4),
        model,
        loss_fn=loss_fn,
        step_size="auto",
        probe=LanczosProbe(price=1.0),
        policy=RulePolicy(tries=()),
        **kwargs,
    )
    g = torch.Generator().manual_seed(1)
    losses, spent = [], []
    for _ in range(steps):
        x = torch.randn(32, 8, generator=g)
        opt.zero_grad()
        loss = loss_fn(model(x), x[:, :3].argmax(1))
        loss.backward()
        if clip is not None:
            nn.utils.clip_grad_norm_(model.parameters(), clip)
        opt.step()
        losses.append(loss.item())
        spent.append(opt.report.probe_cost)
    return losses, spent


def test_looks_ahead_cost_a_forward_pass_and_leave_everything_as_it_was():
    torch.manual_seed(3)
    losses, spent = looked()
    assert losses[-1] < 0.6 * losses[0]
    looks = [b - a for a, b in itertools.pairwise(spent) if 0 < b - a < 0.5]
    assert looks == pytest.approx([FORWARD] * len(looks))
    assert len(looks) >= 15 + (60 - 16) // 11  # at each of the first steps, then every 1.5 * 0.35 / 0.05
    torch.manual_seed(3)
    assert looked()[0] == losses


def test_a_clipped_gradient_is_no_slope_to_look_along():
    _, spent = looked(clip=1e-3)
    assert not [b - a for a, b in itertools.pairwise(spent) if 0 < b - a < 0.5]


def looking(stability=0.15, overshoot=0.5):
    """With momentum, at a learning rate of 1, after one reading: by default of the step that the rule wants."""
    auto = AutoStep()
    auto.choose(AdamW([torch.zeros(2, requires_grad=True)]))
    auto.see(1.0)
    assert "took 1 as the learning rate" in auto.follow(Reading(0, 1.0, 1.0, stability=stability, overshoot=overshoot))
    return auto


def test_a_step_grows_to_the_bottom_and_is_shortened_only_beyond():
    flat, fitting, steep = looking(), looking(), looking()
    flat.look(1, 0.25)
    assert flat.wanted == pytest.approx(GROWTH)
    fitting.look(1, 0.5 * 1.1)
    assert fitting.wanted == 1
    for step in range(1, 20):
        steep.look(step, 2.0)
    assert steep.wanted == pytest.approx(BEYOND * 0.5 / 2.0, rel=1e-2)


def test_sharpness_that_answers_a_decay_does_not_shorten_the_step_again():
    """Where the rate has fallen to a tenth and the curvature has risen tenfold, the step that is taken fits as before."""
    auto = looking()
    auto.see(0.1)
    for step in range(1, 20):
        auto.look(step, 0.5)
    assert auto.wanted == 1


def test_the_schedule_gives_the_shape():
    constant = run(1.0, every=1000)[1]
    halved = run(1.0, shape=lambda t: 1.0 if t < 20 else 0.5, every=1000)[1]
    assert halved[:20] == pytest.approx(constant[:20])
    assert halved[20:] == pytest.approx([x / 2 for x in constant[20:]])


def test_a_warm_up_comes_of_itself():
    """While a schedule rises, its present value is its maximum so far."""
    assert run(1.0, shape=lambda t: (t + 1) / 40, every=1000)[1] == pytest.approx(run(1.0, every=1000)[1])


def test_a_reading_in_the_middle_of_a_decay_counts_for_the_whole_schedule():
    _, effective, _, opt = run(1.0, steps=12, shape=lambda t: 0.5**t, every=5)
    auto = opt.control.interventions["damp"]
    assert effective[-1] == pytest.approx(auto.wanted * 0.5**11)
    assert effective[0] / 2 < auto.wanted < effective[0] * 2  # a quadratic's curvature stays; the schedule has fallen to 1/1024


def test_bounds_hold():
    assert max(run(1.0, step_size=AutoStep(bounds=(0.0, 0.01)))[1]) == pytest.approx(0.01)
    assert min(run(1.0, step_size=AutoStep(bounds=(0.45, 0.5)))[1]) == pytest.approx(0.45)


def test_it_is_said_once_and_the_users_groups_keep_their_values():
    _, _, reports, opt = run(0.7)
    said = [e.sentence() for r in reports for e in r.events if e.name == "damp"]
    assert len(said) == 1
    assert "0.7 gives only the shape" in said[0]
    assert opt.param_groups[0]["lr"] == 0.7


def test_a_run_goes_on_bit_for_bit_from_its_checkpoint():
    whole = run(1.0, steps=30, every=7)[0].w
    model, _, _, opt = run(1.0, steps=15, every=7)
    state = copy.deepcopy(opt.state_dict())
    again = Bowl()
    again.load_state_dict(model.state_dict())
    fresh = AdaptiveOptimizer(
        SGD([again.w], lr=1.0),
        objective=again.loss,
        probe=LanczosProbe(every=7),
        policy=ConstantPolicy("base"),
        step_size="auto",
    )
    fresh.load_state_dict(state)
    for _ in range(15):
        fresh.zero_grad()
        again.loss().backward()
        fresh.step()
    assert torch.equal(again.w, whole)


def test_what_cannot_give_a_learning_rate_is_refused():
    model = Bowl()
    with pytest.raises(ValueError, match="never measures by itself"):
        AdaptiveOptimizer(SGD([model.w], lr=1.0), objective=model.loss, probe=LanczosProbe(overhead=0), step_size="auto")
    with pytest.raises(ValueError, match="stability limit of its steps is not known"):
        AdaptiveOptimizer(torch.optim.Rprop([model.w]), objective=model.loss, step_size="auto")
    with pytest.raises(ValueError, match="the least learning rate, then a larger one"):
        AutoStep(bounds=(1.0, 0.1))

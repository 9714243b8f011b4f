"""The policies that the rules are measured against: pure, deterministic, and TrialPolicy finds what is best."""

import itertools
from collections import Counter
from dataclasses import replace

import pytest
import torch

from adaptive_opt import AdaptiveOptimizer, LanczosProbe, RandomPolicy, RoundRobinPolicy, TrialPolicy
from adaptive_opt.policies.trial import gain
from adaptive_opt.records import Condition, Diagnosis, Finding, History, Stay
from adaptive_opt.stays import KEPT, LEVELS, Stays
from experiments.tasks.canyon import Canyon
from experiments.tasks.digits import Digits

CALM = Diagnosis(0, (Finding(Condition.HEALTHY, 0.0, 0.0, ""),))
ABLE = History(can_replay=True)


def modes_over(policy, steps, history=ABLE):
    return [policy.decide(CALM, replace(history, step=step)).mode for step in range(steps)]


def test_a_random_policy_is_a_function_of_seed_and_step():
    first, other = RandomPolicy(dwell=10, seed=0), RandomPolicy(dwell=10, seed=1)
    assert modes_over(first, 400) == modes_over(RandomPolicy(dwell=10, seed=0), 400)
    assert modes_over(first, 400) != modes_over(other, 400)
    turns = [set(modes_over(first, 400)[i : i + 10]) for i in range(0, 400, 10)]
    assert all(len(turn) == 1 for turn in turns)
    assert set(Counter(modes_over(first, 400))) == {"base", "sgd", "kfac", "sam"}


def test_round_robin_gives_every_mode_its_turn():
    assert modes_over(RoundRobinPolicy(dwell=2), 10) == ["base"] * 2 + ["sgd"] * 2 + ["kfac"] * 2 + ["sam"] * 2 + ["base"] * 2


@pytest.mark.parametrize("policy", [RandomPolicy(dwell=1), RoundRobinPolicy(dwell=1)], ids=lambda p: type(p).__name__)
def test_what_cannot_be_entered_is_not_chosen(policy):
    assert "sam" not in modes_over(policy, 200, History(can_replay=False))
    assert set(modes_over(policy, 200, replace(ABLE, available=frozenset({"base", "kfac"})))) == {"base", "kfac"}
    assert set(modes_over(policy, 20, replace(ABLE, available=frozenset()))) == {"base"}


@pytest.mark.parametrize("make", [RandomPolicy, RoundRobinPolicy, TrialPolicy])
def test_interventions_are_allowed_by_name_and_by_the_rules_conditions(make):
    sick = Diagnosis(0, (Finding(Condition.UNSTABLE, 9.0, 2.0, "too long a step"),))
    assert make().decide(sick, ABLE).interventions == ()
    assert make(interventions=("damp",)).decide(sick, ABLE).interventions == ("damp",)


@pytest.mark.parametrize(
    ("make", "kwargs", "message"),
    [
        (RandomPolicy, {"dwell": 0}, r"RandomPolicy\(dwell=0"),
        (RoundRobinPolicy, {"modes": ()}, r"RoundRobinPolicy\(dwell=50, modes=\(\)"),
        (TrialPolicy, {"modes": ("base", "base")}, "each named once"),
        (TrialPolicy, {"modes": "base"}, "modes='base'"),
        (TrialPolicy, {"reopen": 2}, r"TrialPolicy\(reopen=2\)"),
    ],
)
def test_arguments_that_make_no_sense_are_refused(make, kwargs, message):
    with pytest.raises(ValueError, match=message):
        make(**kwargs)


# ---- stays ----------------------------------------------------------------------------------------------------------------


def test_a_stay_counts_its_steps_what_it_spent_and_the_level_of_every_ten():
    stays = Stays()
    for step in range(25):
        stays.remember(step, "sam" if step >= 5 else "base", float(step), treatment_cost=max(0, step - 4))
    base, sam = stays.stays
    assert base == Stay("base", 0, 5, 5.0)
    assert sam == Stay("sam", 5, 20, 40.0, (9.5, 19.5))


def test_what_is_kept_of_the_past_is_bounded_and_goes_through_a_checkpoint():
    stays, other = Stays(), Stays()
    for step in range(3000):
        stays.remember(step, "base" if step > 1500 or step % 2 else "sgd", 1.0, 0.0)
    assert len(stays.stays) == KEPT
    assert len(stays.stays[-1].levels) == LEVELS
    other.load_state_dict(stays.state_dict())
    assert vars(other) == vars(stays)


def test_the_gain_is_the_slope_of_the_logarithm_a_gradient():
    levels = tuple(0.9**i for i in range(8))
    assert gain(Stay("base", 0, 80, 80.0, levels), 60) == pytest.approx(0.010536, rel=1e-3)  # -log(0.9) / 10
    assert gain(Stay("sam", 0, 80, 160.0, levels), 60) == pytest.approx(0.005268, rel=1e-3)  # it pays two a step
    assert gain(Stay("base", 0, 20, 20.0, levels[:2]), 60) == float("-inf")
    bent = (*levels[:3], *[levels[2]] * 5)
    assert gain(Stay("base", 0, 80, 80.0, bent), 30, first=True) > 0.01
    assert gain(Stay("base", 0, 80, 80.0, bent), 30) == pytest.approx(0.0)


# ---- trials ---------------------------------------------------------------------------------------------------------------


def simulated(policy, rates, steps, price=None, change=None):
    """Modes over the steps of a made-up run: in each mode the loss's logarithm falls by its rate a step."""
    stays, level, treatment, modes = Stays(), 0.0, 0.0, []
    for step in range(steps):
        mode = policy.decide(CALM, replace(ABLE, step=step, stays=tuple(stays.stays))).mode
        rate = (change[1] if change and step >= change[0] else rates)[mode]
        treatment += (price or {}).get(mode, 1.0) - 1.0
        stays.remember(step, mode, 2.0**level, treatment)
        level -= rate
        modes.append(mode)
    return modes


RATES = {"base": 0.01, "sgd": 0.002, "kfac": 0.03, "sam": 0.005}


def test_every_mode_is_tried_and_the_best_is_kept():
    modes = simulated(TrialPolicy(window=60), RATES, 600)
    assert list(dict.fromkeys(modes)) == ["base", "sgd", "kfac", "sam"]
    assert Counter(modes[:240]) == {"base": 60, "sgd": 60, "kfac": 60, "sam": 60}
    assert set(modes[240:]) == {"kfac"}


def test_a_mode_that_pays_two_gradients_a_step_gets_half_the_steps():
    modes = simulated(TrialPolicy(window=60), RATES, 400, price={"sam": 2.0})
    assert Counter(modes)["sam"] == 30


def test_gain_counts_by_compute_and_not_by_step():
    rates = {**RATES, "sam": 0.05}  # fastest a step, and 2 gradients each: 0.025 a gradient
    assert simulated(TrialPolicy(window=60), rates, 400, price={"sam": 2.0})[-1] == "kfac"


def test_the_last_mode_tried_can_be_the_best():
    modes = simulated(TrialPolicy(window=60), {**RATES, "sam": 0.1}, 400)
    assert set(modes[180:]) == {"sam"}


def test_a_new_round_begins_when_the_gain_is_gone_and_finds_what_is_best_now():
    later = {"base": 0.02, "sgd": 0.0, "kfac": 0.001, "sam": 0.0}
    modes = simulated(TrialPolicy(window=60), RATES, 1200, change=(500, later))
    assert set(modes[240:500]) == {"kfac"}
    assert modes[-1] == "base"
    assert {"sgd", "sam"} <= set(modes[500:])


def test_no_new_round_begins_while_the_gain_lasts():
    assert set(simulated(TrialPolicy(window=60), RATES, 3000)[240:]) == {"kfac"}


# ---- in real runs ---------------------------------------------------------------------------------------------------------


def trained(task, base, policy, steps, resume_at=None, probe=LanczosProbe(overhead=0)):  # noqa: B008
    """Loss of every step and mode after it; `resume_at`: through a checkpoint into new objects at that step."""
    make = lambda: AdaptiveOptimizer(  # noqa: E731
        base(task.model.parameters()), task.model, loss_fn=task.loss_fn, probe=probe, policy=policy,
        sinks=[lambda report: None],
    )  # fmt: skip
    optimizer, losses, modes = make(), [], []
    for step in range(steps):
        if step == resume_at:
            state = optimizer.state_dict()
            optimizer.detach()
            optimizer = make()
            optimizer.load_state_dict(state)
        x, y = task.batch(step)
        optimizer.zero_grad()
        loss = task.loss_fn(task.model(x), y)
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
        modes.append(optimizer.report.mode)
    return losses, modes


def test_trials_find_preconditioning_in_the_canyon():
    losses, modes = trained(Canyon(), lambda p: torch.optim.SGD(p, lr=2.0), TrialPolicy(modes=("base", "kfac")), 170)
    assert modes == ["base"] * 60 + ["kfac"] * 110  # tried, and kept as the best
    bare, _ = trained(Canyon(), lambda p: torch.optim.SGD(p, lr=2.0), RoundRobinPolicy(modes=("base",)), 170)
    assert losses[-1] < 1e-2 * bare[-1]


def test_a_new_round_gives_every_mode_its_whole_window_again():
    _, modes = trained(Canyon(), lambda p: torch.optim.SGD(p, lr=2.0), TrialPolicy(modes=("base", "kfac")), 700)
    lengths = [len(list(same)) for _, same in itertools.groupby(modes)]
    assert len(lengths) > 2  # kfac's gain is soon used up: there is a second round
    assert all(length >= 59 for length in lengths[:-1])


def test_sam_is_tried_for_as_much_compute_as_the_base():
    probe, policy = LanczosProbe(every=1000), TrialPolicy(window=60, modes=("base", "sam"))
    _, modes = trained(Digits(seed=0), lambda p: torch.optim.AdamW(p, lr=1e-3), policy, 130, probe=probe)
    assert [(mode, len(list(same))) for mode, same in itertools.groupby(modes)] == [("base", 60), ("sam", 30), ("base", 40)]


@pytest.mark.parametrize("at", [75, 130])
def test_a_run_goes_on_from_a_checkpoint_in_the_middle_of_a_trial_bit_for_bit(at):
    base, policy = (lambda p: torch.optim.SGD(p, lr=2.0)), TrialPolicy(modes=("base", "sgd", "kfac"))
    whole = trained(Canyon(), base, policy, 220)
    assert trained(Canyon(), base, policy, 220, resume_at=at) == whole

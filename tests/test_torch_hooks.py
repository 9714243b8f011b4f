"""Hooks, warnings and refusals as torch's own optimizers have them: one outer step looks like one step."""

import warnings

import pytest
import torch
from problems import BASES, make
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from adaptive_opt import AdaptiveOptimizer, ConstantPolicy, LanczosProbe

POLICIES = {
    "idle": {"policy": ConstantPolicy("base"), "probe": LanczosProbe(overhead=0)},
    "probed": {"policy": ConstantPolicy("base"), "probe": LanczosProbe(every=1, num_steps=3)},
    "kfac": {"policy": ConstantPolicy("kfac")},
    "sam": {"policy": ConstantPolicy("sam")},
}


def wrapped(name="mlp", base="adamw", **kwargs):
    problem = make(name, 4)
    return problem, AdaptiveOptimizer(
        BASES[base](problem.model.parameters()), problem.model, loss_fn=problem.criterion, **kwargs
    )


def train(problem, optimizer):
    for x, y in problem.batches:
        optimizer.zero_grad()
        problem.criterion(problem.model(x), y).backward()
        optimizer.step()


@pytest.mark.parametrize("policy", POLICIES)
def test_global_step_hooks_fire_once_a_step_and_see_the_wrapper(policy):
    problem, optimizer = wrapped(**POLICIES[policy])
    seen = []
    handles = [
        register_optimizer_step_pre_hook(lambda opt, *_: seen.append(("before", opt))),
        register_optimizer_step_post_hook(lambda opt, *_: seen.append(("after", opt))),
    ]
    try:
        train(problem, optimizer)
        torch.optim.SGD(problem.model.parameters()).step()  # another optimizer's step is seen as before
    finally:
        for handle in handles:
            handle.remove()
    assert [name for name, _ in seen] == ["before", "after"] * 5
    assert all(opt is optimizer for _, opt in seen[:8])


def test_global_hooks_are_there_again_after_a_step_that_raises():
    _, optimizer = wrapped()
    fired, handle = [], register_optimizer_step_pre_hook(lambda *_: fired.append(1))
    try:
        for _ in range(2):
            with pytest.raises(ArithmeticError):
                optimizer.step(lambda: 1 / 0)
    finally:
        handle.remove()
    assert fired == [1, 1]


def test_a_pre_hook_may_replace_the_closure_as_torch_allows():
    _, optimizer = wrapped()
    optimizer.register_step_pre_hook(lambda opt, args, kwargs: (args, {"closure": lambda: 5.0}))
    assert optimizer.step() == 5.0


def test_hooks_of_the_base_fire_too():
    problem, optimizer = wrapped()
    fired = []
    optimizer.base.register_step_post_hook(lambda *_: fired.append(1))
    train(problem, optimizer)
    assert fired == [1] * 4


def test_state_dict_hooks_of_the_wrapper_fire_and_may_replace_what_they_are_given():
    _, optimizer = wrapped()
    fired = []
    optimizer.register_state_dict_pre_hook(lambda opt: fired.append("state_dict"))
    optimizer.register_state_dict_post_hook(lambda opt, d: {**d, "mine": 7})
    optimizer.register_load_state_dict_pre_hook(lambda opt, d: {k: v for k, v in d.items() if k != "mine" or fired.append(v)})
    optimizer.register_load_state_dict_post_hook(lambda opt: fired.append("loaded"))
    saved = optimizer.state_dict()
    assert {"mine", "adaptive", "state", "param_groups"} == saved.keys()
    optimizer.load_state_dict(saved)
    assert fired == ["state_dict", 7, "loaded"]
    assert "mine" in saved  # the caller's own dict is left alone


def test_what_cannot_be_loaded_changes_nothing():
    problem, optimizer = wrapped()
    train(problem, optimizer)
    saved = optimizer.state_dict()
    groups, steps = optimizer.param_groups, optimizer.steps
    other_mode = {**saved, "adaptive": {**saved["adaptive"], "mode": "unheard_of"}}
    for bad, message in ((other_mode, "unheard_of"), ({**saved, "param_groups": []}, "number of parameter groups")):
        with pytest.raises(ValueError, match=message):
            optimizer.load_state_dict(bad)
        assert optimizer.param_groups is groups is optimizer.base.param_groups
        assert optimizer.steps == steps


@pytest.mark.parametrize("hooked", [False, True])
@pytest.mark.parametrize("scheduled", [False, True])
def test_a_warning_points_to_the_users_line(scheduled, hooked):
    problem = make("mlp", 1)
    optimizer = AdaptiveOptimizer(BASES["sgd"](problem.model.parameters()))  # nothing to replay: said once
    if scheduled:  # replaces `step` by a wrapper of its own
        torch.optim.lr_scheduler.StepLR(optimizer, 1)
    if hooked:
        optimizer.register_step_post_hook(lambda *_: None)
    x, y = problem.batches[0]
    problem.criterion(problem.model(x), y).backward()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        optimizer.step()  # this very line
    assert [w.filename for w in caught] == [__file__]
    with open(__file__) as source:
        assert "this very line" in source.readlines()[caught[0].lineno - 1]


def test_a_differentiable_base_is_refused_by_name():
    problem = make("mlp", 1)
    base = torch.optim.Adam(problem.model.parameters(), differentiable=True)
    with pytest.raises(ValueError, match=r"Adam\(\.\.\., differentiable=True\)"):
        AdaptiveOptimizer(base, problem.model, loss_fn=problem.criterion)

"""What cannot work is refused: the message quotes the call and shows the way out."""

import pytest
import torch
from problems import MLP, make
from torch import nn
from torch.nn import functional as F
from torch.optim import SGD

from adaptive_opt import AdaptiveOptimizer, LanczosProbe, RulePolicy
from adaptive_opt.modes import BaseStep
from adaptive_opt.objective import ReplayError


class WithMode:
    mode = "adagrad"

    def decide(self, diagnosis, history):
        raise NotImplementedError


def sgd(model=None):
    return SGD((model or MLP()).parameters(), lr=0.1)


def emptied():
    base = sgd()
    base.param_groups[0]["params"] = []
    return base


CASES = {
    "a class": (TypeError, r"base=SGD\): an optimizer that exists, for example AdamW", lambda: AdaptiveOptimizer(SGD)),
    "a model": (TypeError, r"base=MLP\): an optimizer that exists", lambda: AdaptiveOptimizer(MLP())),
    "wrapped twice": (TypeError, "wrapped already", lambda: AdaptiveOptimizer(AdaptiveOptimizer(sgd()))),
    "L-BFGS": (
        ValueError,
        "LBFGS.*calls its closure",
        lambda: AdaptiveOptimizer(torch.optim.LBFGS(MLP().parameters())),
    ),
    "no parameters": (ValueError, "has no parameters", lambda: AdaptiveOptimizer(emptied())),
    "policy": (TypeError, r"policy='kfac'\): an object with decide", lambda: AdaptiveOptimizer(sgd(), policy="kfac")),
    "no base mode": (
        ValueError,
        "'base' must be among them",
        lambda: AdaptiveOptimizer(sgd(), modes={"b": BaseStep()}),
    ),
    "unknown mode": (ValueError, "'adagrad' is not one of", lambda: AdaptiveOptimizer(sgd(), policy=WithMode())),
    "step size": (
        ValueError,
        r"step_size='automatic'\): 'user', 'auto', or",
        lambda: AdaptiveOptimizer(sgd(), step_size="automatic"),
    ),
    "model": (TypeError, r"model=function\): a torch.nn.Module", lambda: AdaptiveOptimizer(sgd(), lambda x: x)),
    "loss function": (
        TypeError,
        r"loss_fn=cross_entropy\): a plain function cannot be listened to; give the Module",
        lambda: AdaptiveOptimizer(sgd(), MLP(), loss_fn=F.cross_entropy),
    ),
    "no model": (ValueError, "the model is needed too", lambda: AdaptiveOptimizer(sgd(), loss_fn=nn.MSELoss())),
    "objective": (
        TypeError,
        r"objective=Tensor\): a callable",
        lambda: AdaptiveOptimizer(sgd(), objective=torch.ones(())),
    ),
    "another model": (ValueError, "none of the base optimizer's parameters is in this model", lambda: wrong_model()),
    "attach": (ValueError, "none of the base optimizer's parameters", lambda: AdaptiveOptimizer(sgd()).attach(MLP())),
    "probe": (ValueError, r"every=5, overhead=0.1\): give one", lambda: LanczosProbe(every=5, overhead=0.1)),
    "every": (ValueError, r"every=0\): a whole number", lambda: LanczosProbe(every=0)),
    "overhead": (ValueError, r"overhead=-1\): a share", lambda: LanczosProbe(overhead=-1)),
    "num_steps": (ValueError, r"num_steps=2\): a whole number, 3 at least", lambda: LanczosProbe(num_steps=2)),
    "fraction": (ValueError, r"fraction=0\): a share", lambda: LanczosProbe(fraction=0)),
}


def wrong_model():
    return AdaptiveOptimizer(sgd(), MLP(), loss_fn=nn.MSELoss())


@pytest.mark.parametrize("case", CASES)
def test_an_argument_that_cannot_work_is_refused_with_the_way_out(case):
    error, match, call = CASES[case]
    with pytest.raises(error, match=match):
        call()


def test_a_refused_call_leaves_no_hooks_and_an_untouched_base():
    model, other = MLP(), MLP()
    base = sgd(model)
    groups = base.param_groups
    with pytest.raises(ValueError, match="none of"):
        AdaptiveOptimizer(base, other, loss_fn=nn.MSELoss())
    assert base.param_groups is groups
    assert not other._forward_hooks
    assert not other._forward_pre_hooks


def test_detach_takes_the_hooks_off():
    model, criterion = MLP(), nn.CrossEntropyLoss()
    optimizer = AdaptiveOptimizer(sgd(model), model, loss_fn=criterion)
    assert model._forward_hooks
    optimizer.detach()
    assert not model._forward_hooks
    assert not model._forward_pre_hooks
    assert not criterion._forward_hooks


@pytest.mark.parametrize("policy", [None, RulePolicy()])
def test_without_any_source_step_says_so_once_and_trains(policy):
    def run(wrapped):
        problem = make("mlp", 6)
        optimizer = base = sgd(problem.model)
        if wrapped:
            optimizer = AdaptiveOptimizer(base, policy=policy)
            with pytest.raises(ReplayError, match=r"probe_now\(\): no parameter has a gradient"):
                optimizer.probe_now()
        for x, y in problem.batches:
            optimizer.zero_grad()
            problem.criterion(problem.model(x), y).backward()
            optimizer.step()
        return list(problem.model.parameters())

    with pytest.warns(UserWarning, match=r"no way to evaluate the loss again: give AdaptiveOptimizer model=") as said:
        wrapped = run(True)
    assert len(said) == 1
    assert all(torch.equal(a, b) for a, b in zip(wrapped, run(False), strict=True))


def test_step_before_backward_says_that_there_is_no_gradient():
    problem = make("mlp", 1)
    optimizer = AdaptiveOptimizer(sgd(problem.model), problem.model, loss_fn=problem.criterion)
    before = [p.detach().clone() for p in problem.model.parameters()]
    with pytest.warns(UserWarning, match="no parameter has a gradient: run backward"):
        optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(before, problem.model.parameters(), strict=True))


def test_a_loss_fn_that_returns_no_tensor_is_refused_by_name():
    class Pair(nn.Module):
        def forward(self, out, y):
            return F.cross_entropy(out, y), 1.0

    problem, criterion = make("mlp", 1), Pair()
    optimizer = AdaptiveOptimizer(sgd(problem.model), problem.model, loss_fn=criterion)
    x, y = problem.batches[0]
    criterion(problem.model(x), y)[0].backward()
    with pytest.warns(UserWarning, match="loss_fn returned tuple, not a tensor"):
        optimizer.step()

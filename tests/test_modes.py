"""Modes: identities first, then independent references, then every mode on every problem."""

import pytest
import torch
from problems import BASES, MODELS, make

from adaptive_opt import AdaptiveOptimizer, ConstantPolicy, LanczosProbe
from adaptive_opt.modes import KFAC, MODES, SAM, BaseStep, SGDStep, StepContext

OFF = LanczosProbe(overhead=0)


def train(problem, optimizer, until=None):
    losses = []
    for x, y in problem.batches[:until]:
        optimizer.zero_grad()
        loss = problem.criterion(problem.model(x), y)
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    return losses


def wrapped(problem, base, mode, instance):
    modes = {"base": BaseStep(), mode: instance}
    given = {"model": problem.model, "loss_fn": problem.criterion}
    return AdaptiveOptimizer(base, **given, probe=OFF, policy=ConstantPolicy(mode), modes=modes)


def assert_same(a, b, **tol):
    for (name, x), y in zip(a.state_dict().items(), b.state_dict().values(), strict=True):
        torch.testing.assert_close(x.double(), y.double(), msg=lambda m, name=name: f"{name}: {m}", **tol)


@pytest.mark.parametrize(
    ("mode", "limit"),
    [("sam", SAM(rho=0.0)), ("kfac", KFAC(max_dim=1, max_blocks=1))],
    ids=["sam with rho 0", "kfac with no side to rotate"],
)
@pytest.mark.parametrize("base", BASES)
def test_in_its_limit_a_mode_is_the_base_bit_for_bit(mode, limit, base):
    bare, other = make("cnn", 15), make("cnn", 15)
    torch.manual_seed(1)
    train(bare, BASES[base](bare.model.parameters()))
    torch.manual_seed(1)
    train(other, wrapped(other, BASES[base](other.model.parameters()), mode, limit))
    assert_same(bare.model, other.model, rtol=0, atol=0)


def test_sam_gives_the_user_back_the_gradient_that_was_there():
    problem = make("mlp", 1)
    optimizer = wrapped(problem, torch.optim.SGD(problem.model.parameters(), lr=0.1), "sam", SAM(rho=0.1))
    x, y = problem.batches[0]
    problem.criterion(problem.model(x), y).backward()
    grads = [(p.grad, p.grad.clone()) for p in problem.model.parameters()]
    optimizer.step()
    for p, (same, value) in zip(problem.model.parameters(), grads, strict=True):
        assert p.grad is same
        assert torch.equal(p.grad, value)


def test_sam_every_second_step_climbs_every_second_step():
    problem = make("mlp", 6)
    optimizer = wrapped(problem, torch.optim.SGD(problem.model.parameters(), lr=0.1), "sam", SAM(rho=0.1, every=2))
    train(problem, optimizer)
    assert optimizer.report.treatment_cost == 3


def test_sgd_takes_its_learning_rate_from_the_bases_steps():
    """For a base whose step is c * g the estimate is c, by SWATS' formula."""
    p = torch.randn(10, dtype=torch.float64, requires_grad=True)
    base = torch.optim.RMSprop([p], lr=0.1, alpha=0.0, eps=1e6)  # 1 / (|g| + 1e6) is constant: a plain c
    mode = SGDStep(momentum=0.0, warm_up=3)
    ctx = StepContext(base, [p], [0], None)
    mode.enter(ctx)
    for _ in range(3):
        p.grad = torch.randn(10, dtype=torch.float64)
        mode.step(ctx)
    before = p.detach().clone()
    p.grad = torch.randn(10, dtype=torch.float64)
    mode.step(ctx)
    torch.testing.assert_close(p.detach() - before, -0.1 / 1e6 * p.grad, rtol=1e-5, atol=0)


def test_an_sgd_base_in_sgd_mode_is_itself_bit_for_bit():
    bare, other = make("mlp", 15), make("mlp", 15)
    train(bare, BASES["sgd"](bare.model.parameters()))
    train(other, wrapped(other, BASES["sgd"](other.model.parameters()), "sgd", SGDStep()))
    assert_same(bare.model, other.model, rtol=0, atol=0)


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("mode", MODES)
def test_every_mode_trains_every_problem(mode, name, base):
    problem = make(name, 40)
    optimizer = wrapped(problem, BASES[base](problem.model.parameters()), mode, MODES[mode]())
    losses = train(problem, optimizer)
    assert optimizer.report.mode == mode
    assert sum(losses[-10:]) < sum(losses[:10])


@pytest.mark.parametrize(
    "bad", [lambda: SAM(rho=-1), lambda: KFAC(beta=1.0), lambda: KFAC(every=0), lambda: SGDStep(momentum=1)]
)
def test_hyperparameters_that_make_no_sense_are_refused(bad):
    with pytest.raises(ValueError, match=r"\(.*="):
        bad()

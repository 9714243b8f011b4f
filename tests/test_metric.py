"""The metric against the step that torch's real optimizer takes, and its limits against simulated descent."""

import pytest
import torch
from oracles import DEVICES
from torch import nn, optim

from adaptive_opt.curvature import flatten
from adaptive_opt.metric import metric

EXACT = {
    "sgd": lambda p: optim.SGD(p, lr=0.1),
    "heavy ball": lambda p: optim.SGD(p, lr=0.1, momentum=0.9),
    "dampened": lambda p: optim.SGD(p, lr=0.1, momentum=0.8, dampening=0.3),
    "adam": lambda p: optim.Adam(p, lr=0.01),
    "adam with other betas": lambda p: optim.Adam(p, lr=0.01, betas=(0.5, 0.9), eps=1e-3),
    "amsgrad": lambda p: optim.Adam(p, lr=0.01, betas=(0.9, 0.5), amsgrad=True),
    "adamw": lambda p: optim.AdamW(p, lr=0.01, weight_decay=0),
    "adamax": lambda p: optim.Adamax(p, lr=0.01),
    "adadelta": lambda p: optim.Adadelta(p, lr=0.5),
    "adadelta with a larger eps": lambda p: optim.Adadelta(p, lr=1.0, rho=0.8, eps=1e-3),
    "adagrad": lambda p: optim.Adagrad(p, lr=0.1),
    "adagrad with decay": lambda p: optim.Adagrad(p, lr=0.1, lr_decay=0.2, initial_accumulator_value=0.5),
}


class Walk:
    """Real steps of an optimizer over two groups with different lr, along random gradients of growing scale."""

    def __init__(self, make, device="cpu", seed=0):
        self.rng = torch.Generator().manual_seed(seed)
        self.device = device
        shapes = ((3, 4), (5,), (2, 2))
        self.params = [nn.Parameter(torch.randn(*s, generator=self.rng, dtype=torch.float64).to(device)) for s in shapes]
        self.base = make([{"params": self.params[:2]}, {"params": self.params[2:]}])
        self.base.param_groups[1]["lr"] = 0.3 * self.base.param_groups[0]["lr"]

    def step(self):
        """(metric before the step, gradient, displacement w_before - w_after)."""
        for p in self.params:
            p.grad = torch.randn(p.shape, generator=self.rng, dtype=torch.float64).to(self.device) + 0.5
        m = metric(self.base, {p: p.grad for p in self.params})
        before = flatten(self.params)
        self.base.step()
        return m, flatten([p.grad for p in self.params]), before - flatten(self.params)

    def state(self, key):
        return flatten([self.base.state[p][key] for p in self.params])

    @property
    def lr(self):
        return flatten([torch.full_like(p, g["lr"]) for g in self.base.param_groups for p in g["params"]])


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", EXACT)
def test_root_times_momentum_is_the_step_that_the_optimizer_takes(name, device):
    walk = Walk(EXACT[name], device)
    for _ in range(12):
        m, _, taken = walk.step()
        assert torch.allclose(m.root * m.momentum, taken, rtol=1e-12, atol=1e-14)
        assert m.averaged is m.momentum


def test_the_foreach_and_the_single_tensor_optimizers_have_the_same_metric():
    for foreach in (False, True):
        walk = Walk(lambda p: optim.Adam(p, lr=0.01, foreach=foreach))
        for _ in range(3):
            m, _, taken = walk.step()
            assert torch.allclose(m.root * m.momentum, taken, rtol=1e-12, atol=1e-14)


def test_the_metric_is_that_of_the_step_to_come_and_leaves_the_state_as_it_is():
    walk = Walk(lambda p: optim.Adam(p, lr=0.01))
    walk.step()
    before = [walk.state(k).clone() for k in ("exp_avg", "exp_avg_sq", "step")]
    grads = {p: torch.ones_like(p) for p in walk.params}
    one, two = metric(walk.base, grads), metric(walk.base, grads)
    assert torch.equal(one.root, two.root)
    assert all(torch.equal(b, walk.state(k)) for b, k in zip(before, ("exp_avg", "exp_avg_sq", "step"), strict=True))


@pytest.mark.parametrize("kwargs", [{}, {"momentum": 0.7}, {"centered": True, "momentum": 0.3}], ids=str)
def test_rmsprops_step_is_met_after_its_transient(kwargs):
    walk = Walk(lambda p: optim.RMSprop(p, lr=0.01, alpha=0.5, **kwargs))
    for step in range(90):
        m, _, taken = walk.step()
        if step > 60:
            assert torch.allclose(m.root * m.momentum, taken, rtol=1e-10, atol=1e-13)


def test_rmsprops_transient_is_left_out_by_design_and_by_just_its_missing_bias_correction():
    walk = Walk(lambda p: optim.RMSprop(p, lr=0.01, alpha=0.9, eps=1e-30))
    for t in range(1, 20):
        m, _, taken = walk.step()
        assert torch.allclose(m.root * m.momentum, taken * (1 - 0.9**t) ** 0.5, rtol=1e-12)


def test_nesterovs_step_looks_ahead():
    walk = Walk(lambda p: optim.SGD(p, lr=0.1, momentum=0.9, nesterov=True))
    for _ in range(6):
        m, g, taken = walk.step()
        assert torch.allclose(m.root * m.momentum, taken, rtol=1e-12)
        assert torch.allclose(walk.lr * (g + 0.9 * walk.state("momentum_buffer")), taken, rtol=1e-12)


def test_nadams_metric_is_its_own_and_its_look_ahead_is_left_out_by_design():
    walk = Walk(lambda p: optim.NAdam(p, lr=0.01, momentum_decay=4e-3))
    product = 1.0
    for t in range(1, 12):
        m, g, taken = walk.step()
        mu, ahead = (0.9 * (1 - 0.5 * 0.96 ** (k * 4e-3)) for k in (t, t + 1))
        product *= mu
        direction = (1 - mu) / (1 - product) * g + ahead / (1 - product * ahead) * walk.state("exp_avg")
        assert torch.allclose(m.root**2 * direction, taken, rtol=1e-10)
        assert torch.allclose(m.momentum, m.root * walk.state("exp_avg") / (1 - 0.9**t), rtol=1e-10)


def test_radams_step_is_rectified_and_not_preconditioned_at_first():
    walk = Walk(lambda p: optim.RAdam(p, lr=0.01, betas=(0.9, 0.95), eps=1e-30))
    for t in range(1, 100):
        m, _, taken = walk.step()
        assert torch.allclose(m.root * m.momentum, taken, rtol=1e-10, atol=1e-14), t


def test_decoupled_weight_decay_is_the_one_thing_left_out_of_adamws_step():
    walk = Walk(lambda p: optim.AdamW(p, lr=0.01, weight_decay=0.1))
    for _ in range(4):
        w = flatten(walk.params)
        m, _, taken = walk.step()
        assert torch.allclose(m.root * m.momentum + walk.lr * 0.1 * w, taken, rtol=1e-12, atol=1e-14)


LIMITS = {
    "gradient descent": ({}, 2.0),
    "heavy ball": ({"momentum": 0.9}, 3.8),
    "dampened": ({"momentum": 0.8, "dampening": 0.3}, 2 * 1.8 / 0.7),
    "nesterov": ({"momentum": 0.9, "nesterov": True}, 2 * 1.9 / 2.8),
    "averaged as in Adam": ({"momentum": 0.9, "dampening": 0.9}, 38.0),
}


@pytest.mark.parametrize("name", LIMITS)
def test_descent_on_a_parabola_diverges_just_above_the_limit_and_not_just_below(name):
    kwargs, limit = LIMITS[name]
    for factor, escapes in ((0.98, False), (1.02, True)):
        w = nn.Parameter(torch.ones(1, dtype=torch.float64))
        base = optim.SGD([w], lr=factor * limit, **kwargs)  # curvature 1, so that stability = lr / limit
        w.grad = w.detach().clone()
        assert metric(base, {w: w.grad}).limit == pytest.approx(limit)
        for _ in range(2000):
            w.grad = w.detach().clone()
            base.step()
        assert bool(w.abs() > 1e3) == escapes


def test_adams_limit_is_that_of_averaged_descent_and_groups_share_the_smallest():
    w = [nn.Parameter(torch.ones(2)) for _ in range(2)]
    base = optim.Adam([{"params": w[:1]}, {"params": w[1:], "betas": (0.5, 0.99)}])
    grads = {p: torch.ones(2) for p in w}
    assert metric(base, grads).limit == pytest.approx(6.0)  # 2 (1 + 0.5) / (1 - 0.5)
    assert metric(optim.Adam(w), grads).limit == pytest.approx(38.0)


def test_only_a_base_with_momentum_in_every_group_averages():
    w = [nn.Parameter(torch.ones(2)) for _ in range(2)]
    grads = {p: torch.ones(2) for p in w}
    assert metric(optim.Adam(w), grads).averages
    assert not metric(optim.Adagrad(w), grads).averages
    mixed = optim.SGD([{"params": w[:1], "momentum": 0.9}, {"params": w[1:]}], lr=0.1)
    assert not metric(mixed, grads).averages


def test_a_zero_gradient_gives_a_finite_metric():
    w = nn.Parameter(torch.ones(3))
    for make in (
        optim.SGD, optim.Adam, optim.NAdam, optim.RAdam, optim.Adamax, optim.RMSprop, optim.Adagrad, optim.Adadelta,
    ):  # fmt: skip
        m = metric(make([w], lr=0.1), {w: torch.zeros(3)})
        assert m.root.isfinite().all()
        assert not m.momentum.any()


def test_unknown_and_maximizing_optimizers_have_no_metric():
    w = nn.Parameter(torch.ones(2))
    for base in (optim.Rprop([w]), optim.SGD([w], lr=0.1, maximize=True)):
        assert metric(base, {w: torch.ones(2)}) is None
    assert metric(optim.SGD([w], lr=0.1), {}) is None  # no gradient, no step


def test_parameters_without_a_gradient_take_no_part():
    a, b = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(3))
    assert metric(optim.SGD([a, b], lr=0.1), {b: torch.ones(3)}).root.numel() == 3


@pytest.mark.parametrize("kind", [{}, {"nesterov": True}, {"dampening": 0.3}, {"dampening": 0.9}])
def test_a_momentum_that_is_still_filling_counts_as_long_as_it_becomes(kind):
    w, g = nn.Parameter(torch.zeros(3, dtype=torch.float64)), torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64)
    base = optim.SGD([w], lr=0.1, momentum=0.9, **kind)
    seen = []
    for t in range(400):
        w.grad = g.clone()
        m = metric(base, {w: g}, age=t)
        seen.append(m.root * m.momentum)
        before = w.detach().clone()
        base.step()
    final = before - w.detach()
    for displacement in seen:
        torch.testing.assert_close(displacement, final)

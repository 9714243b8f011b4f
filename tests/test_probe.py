"""LanczosProbe: readings against dense oracles, the schedule against its budget."""

import copy
import math

import numpy as np
import pytest
import torch
from oracles import DEVICES, NETS, Net, dense_hessian
from torch import nn, optim
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from adaptive_opt.curvature import flatten
from adaptive_opt.memory import ProbeMemory
from adaptive_opt.objective import GivenLoss, Objective
from adaptive_opt.probe import LanczosProbe
from adaptive_opt.records import Trend
from adaptive_opt.schedule import FINANCED

BASES = {
    "sgd": (lambda p: optim.SGD(p, lr=0.1), 2.0),
    "heavy ball": (lambda p: optim.SGD(p, lr=0.1, momentum=0.9), 3.8),
    "nesterov": (lambda p: optim.SGD(p, lr=0.1, momentum=0.9, nesterov=True), 2 * 1.9 / 2.8),
    "adam": (lambda p: optim.Adam(p, lr=0.01), 38.0),
    "adagrad": (lambda p: optim.Adagrad(p, lr=0.05), 2.0),
}


def measure(loss, params, base=None, model=None, num_steps=60, kind="full", memory=None, **kwargs):
    """A reading, and the parameters' gradients as the step to come needs them."""
    objective = Objective(GivenLoss(loss, list(model.modules()) if model is not None else [], None), params)
    if base is not None:
        base.zero_grad()
        loss().backward()
    memory = memory or ProbeMemory(torch.Generator().manual_seed(0))
    return LanczosProbe(every=1, num_steps=num_steps).measure(objective, base, model, memory, 7, kind, **kwargs)


def trained(net, base, steps=3):
    for _ in range(steps):
        net.backward()
        base.step()
    net.backward()


def coming_step(net, base):
    """What the real optimizer does next: displacement, and sqrt(lr P) from the state that it leaves."""
    model, twin = copy.deepcopy((net.model, base))
    for p, q in zip(model.parameters(), net.params, strict=True):
        p.grad = q.grad.clone()
    before = flatten(list(model.parameters()))
    twin.step()
    group, roots = twin.param_groups[0], []
    for p in model.parameters():
        state = twin.state[p]
        scale = torch.ones_like(p)
        if "exp_avg_sq" in state:
            scale = 1 / ((state["exp_avg_sq"] / (1 - group["betas"][1] ** float(state["step"]))).sqrt() + group["eps"])
        elif "sum" in state:
            scale = 1 / (state["sum"].sqrt() + group["eps"])
        roots.append((group["lr"] * scale).sqrt())
    return flatten(list(model.parameters())) - before, flatten(roots)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", NETS)
def test_a_full_reading_equals_the_dense_hessian(name, device):
    net = Net(name, device=device)
    r = measure(net.loss, net.params, num_steps=net.n, model=net.model)
    true = torch.linalg.eigvalsh(net.hessian()).numpy()
    assert (r.lambda_max, r.lambda_min) == pytest.approx((true[-1], true[0]), rel=1e-8)
    assert r.epsilon == pytest.approx(np.abs(true).max(), rel=1e-8)
    assert r.delta <= (true < -r.delta_tol * r.epsilon * (1 - 1e-9)).sum()
    assert r.kappa * max(np.abs(true).min() - 1e-13 * r.epsilon, 0) <= r.epsilon * (1 + 1e-9)
    assert abs(r.trace - true.sum()) < 4 * r.trace_stderr
    assert r.loss == pytest.approx(net.loss().item(), rel=1e-14)
    assert r.grad_norm == pytest.approx(float(flatten(torch.autograd.grad(net.loss(), net.params)).norm()), rel=1e-12)
    assert sum(r.ritz_weights) == pytest.approx(1, abs=1e-12)
    assert (r.step, r.kind, r.backend, r.hvps) == (7, "full", "exact", net.n)
    assert r.notes == ("stability, kappa_effective: the coming step is not an optimizer's own",)
    assert len(r.layers) == sum(isinstance(m, (nn.Linear, nn.Conv2d)) for m in net.model.modules())


@pytest.mark.parametrize("kind", ["full", "cheap"])
@pytest.mark.parametrize("base", BASES)
def test_stability_and_overshoot_equal_those_of_the_optimizers_real_step(base, kind):
    make, limit = BASES[base]
    net = Net("layernorm", seed=3)
    optimizer = make(net.params)
    trained(net, optimizer)
    d, root = coming_step(net, optimizer)
    h = net.hessian()
    memory = ProbeMemory(torch.Generator().manual_seed(0))
    for _ in range(1 if kind == "full" else 12):  # cheap readings warm each other up
        r = measure(net.loss, net.params, optimizer, kind=kind, memory=memory, num_steps=net.n)
    true = torch.linalg.eigvalsh(root[:, None] * h * root).numpy() / limit
    assert r.stability == pytest.approx(true[-1], rel=1e-8 if kind == "full" else 1e-3)
    assert r.stability <= true[-1] * (1 + 1e-12)
    assert np.abs(true - r.stability).min() <= r.stability_error + 1e-14
    assert r.sharpness_score == pytest.approx(100 * min(1, r.stability))
    g = flatten([p.grad for p in net.params])
    curvature = float(d @ h @ d)
    assert r.overshoot == (pytest.approx(curvature / 2 / abs(float(g @ d)), rel=1e-9) if curvature > 0 else None)


@pytest.mark.parametrize("kappa", [1.0, 10.0, 1000.0])
def test_kappa_effective_of_sgd_on_an_even_parabola_is_its_condition_number(kappa):
    """Kantorovich: a start with equal weight on both ends, and on nothing else, attains the bound."""
    h = torch.tensor([1.0, kappa], dtype=torch.float64)
    w = nn.Parameter(1 / h)  # so that the gradient is (1, 1)
    r = measure(lambda: (h * w**2).sum() / 2, [w], optim.SGD([w], lr=0.1))
    assert r.kappa_effective == pytest.approx(kappa, rel=1e-6)
    assert r.kappa == pytest.approx(kappa, rel=1e-9)
    assert r.stability == pytest.approx(0.1 * kappa / 2)


def test_kappa_effective_follows_the_kantorovich_formula_and_sees_what_adam_whitens():
    h = torch.tensor([1.0, -3.0, 20.0, 100.0], dtype=torch.float64)
    w = nn.Parameter(torch.ones(4, dtype=torch.float64))
    r = measure(lambda: (h * w**2).sum() / 2, [w], optim.SGD([w], lr=0.1))
    a, g2 = h.abs(), h**2  # gradient h: weights g_i^2
    c = 2 * float((a * g2).sum() * (g2 / a).sum() / g2.sum() ** 2) - 1
    assert r.kappa_effective == pytest.approx(c + math.sqrt(c * c - 1), rel=1e-9)
    whitened = measure(lambda: (h * w**2).sum() / 2, [w], optim.Adam([w], lr=0.1, eps=1e-30))  # P = 1 / |h|
    assert whitened.kappa_effective == pytest.approx(1, abs=1e-6)


def test_a_sick_loss_gives_a_reading_of_nones_with_notes():
    net = Net("mlp")
    for factor in (float("nan"), float("inf")):
        r = measure(lambda: net.loss() * factor, net.params, optim.SGD(net.params, lr=0.1), net.model)
        assert (r.epsilon, r.kappa, r.delta, r.lambda_max, r.stability, r.overshoot, r.trace) == (None,) * 7
        assert "curvature: the loss or its gradient is not finite" in r.notes
        assert all(layer.gain is None for layer in r.layers)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_linear_loss_has_zero_curvature_and_no_condition_number(dtype):
    w = nn.Parameter(torch.ones(5, dtype=dtype))
    r = measure(lambda: w.sum(), [w], optim.SGD([w], lr=0.1))
    assert (r.epsilon, r.lambda_max, r.delta, r.trace, r.stability) == (0,) * 5
    assert r.overshoot is None  # nothing curves upwards
    assert (r.kappa, r.kappa_effective) == (None, None)


def test_unused_frozen_and_tied_parameters_are_measured_as_what_they_are():
    net = Net("mlp")
    extra = nn.Sequential(nn.Linear(3, 6, dtype=torch.float64), nn.Tanh(), net.model[2])
    tied = nn.Sequential(net.model, extra, nn.Linear(3, 3, dtype=torch.float64))
    tied[1][0].bias = net.model[0].bias  # a tied vector, beside the shared module extra[2]
    tied[2].bias.requires_grad_(False)
    unused = nn.Parameter(torch.ones(2, dtype=torch.float64))
    params = [p for p in tied.parameters() if p.requires_grad] + [unused]

    def loss():
        return F.cross_entropy(tied(net.x), net.y)

    true = torch.linalg.eigvalsh(dense_hessian(loss(), params))
    r = measure(loss, params, num_steps=sum(p.numel() for p in params), model=tied)
    assert (r.lambda_max, r.lambda_min) == pytest.approx((float(true[-1]), float(true[0])), rel=1e-8)
    assert [layer.name for layer in r.layers] == ["0.0", "0.2", "1.0", "2"]  # the shared layer at its first call


def test_bfloat16_parameters_are_measured_to_their_own_precision():
    net = Net("layernorm", samples=32)
    model = copy.deepcopy(net.model).bfloat16()
    net.model.load_state_dict(model.state_dict())
    params = list(model.parameters())
    r = measure(lambda: F.cross_entropy(model(net.x.bfloat16()).float(), net.y), params, optim.AdamW(params), model, 10)
    net.x = net.x.bfloat16().double()
    assert r.lambda_max == pytest.approx(float(torch.linalg.eigvalsh(net.hessian())[-1]), rel=0.05)
    assert r.stability > 0


class Cube(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x**3

    @staticmethod
    @once_differentiable
    def backward(ctx, g):
        return 3 * ctx.saved_tensors[0] ** 2 * g


@pytest.mark.parametrize("place", ["inside", "last"])
def test_a_model_without_second_derivatives_is_measured_by_finite_differences_and_says_so(place):
    net = Net("layernorm")

    def loss(f):
        out = net.model(net.x)
        return f(out).square().mean() if place == "inside" else f(out - 1).mean()

    before = [p.detach().clone() for p in net.params]
    r = measure(lambda: loss(Cube.apply), net.params, num_steps=net.n)
    true = torch.linalg.eigvalsh(dense_hessian(loss(lambda x: x**3), net.params))
    assert r.backend == "finite_difference"
    assert any("Cube" in note and "finite differences" in note for note in r.notes)
    assert (r.lambda_max, r.lambda_min) == pytest.approx((float(true[-1]), float(true[0])), rel=1e-5)
    assert all(torch.equal(p, b) for p, b in zip(net.params, before, strict=True))


def test_the_same_seed_gives_the_same_reading_and_memory_survives_its_state_dict():
    net, readings = Net("mlp"), []
    first, second = ProbeMemory(torch.Generator().manual_seed(3)), ProbeMemory(torch.Generator())
    measure(net.loss, net.params, optim.SGD(net.params, lr=0.1), memory=first)
    second.load_state_dict(first.state_dict())
    for memory in (first, second):
        readings.append(measure(net.loss, net.params, optim.SGD(net.params, lr=0.1), memory=memory, num_steps=5))
    assert readings[0].ritz_values == readings[1].ritz_values
    assert readings[0].stability == readings[1].stability


def run_schedule(probe, steps, cheap=10.0, full=60.0, **kwargs):
    """The kinds of readings by step, with the memory kept as the controller keeps it."""
    memory, kinds = ProbeMemory(torch.Generator()), {}
    for step in range(steps):
        kind = probe.due(Trend(step, 1.0, 1.0), memory, cheap, full, **kwargs)
        if kind is not None:
            kinds[step] = kind
            memory.spent += cheap if kind == "cheap" else full
            memory.last_cheap = step
            memory.last_full = step if kind == "full" else memory.last_full
        assert memory.spent <= (probe.overhead or math.inf) * (step + FINANCED if kwargs else max(step, FINANCED))
    return kinds


def test_every_n_steps_means_every_n_steps_and_no_overhead_means_never():
    assert run_schedule(LanczosProbe(every=7), 30) == dict.fromkeys((0, 7, 14, 21, 28), "full")
    assert run_schedule(LanczosProbe(overhead=0), 2000) == {}
    assert LanczosProbe(overhead=0).idle
    assert not LanczosProbe().idle


@pytest.mark.parametrize("overhead", [0.02, 0.05, 0.5])
def test_the_budget_is_kept_at_every_step_and_used(overhead):
    kinds = run_schedule(LanczosProbe(overhead=overhead), 20000)
    spent = sum({"cheap": 10.0, "full": 60.0}[k] for k in kinds.values())
    assert 0.5 * overhead * 20000 <= spent <= overhead * 20000
    assert {"cheap", "full"} == set(kinds.values())


def test_early_readings_come_at_powers_of_two_and_a_treatment_or_an_alarm_bring_more():
    probe = LanczosProbe(overhead=0.2)
    assert [s for s in run_schedule(probe, 65, full=1e9) if s <= 64] == [0, 1, 2, 4, 8, 16, 32, 64]
    watched = run_schedule(probe, 3000, full=1e9, watchful=True)
    assert len(watched) > 1.5 * len(run_schedule(probe, 3000, full=1e9))
    memory = ProbeMemory(torch.Generator(), last_cheap=99, last_full=0, spent=90.0)
    assert probe.due(Trend(101, 1.0, 1.0), memory, 10.0, 60.0) is None
    assert probe.due(Trend(101, 1.0, 1.0), memory, 10.0, 60.0, alarm=True) == "cheap"
    assert probe.due(Trend(101, 1.0, 1.0, stalled=True), memory, 10.0, 60.0) is None
    memory.spent = 50.0
    assert probe.due(Trend(101, 1.0, 1.0, stalled=True), memory, 10.0, 60.0) == "full"


NONSENSE = [{"every": 0}, {"every": 2.5}, {"every": 1, "overhead": 0.1}, {"overhead": -0.1}, {"overhead": float("nan")}]
NONSENSE += [{"num_steps": 2}, {"fraction": 0.0}, {"fraction": 1.5}]


@pytest.mark.parametrize("kwargs", NONSENSE, ids=str)
def test_numbers_that_make_no_sense_are_refused_in_the_callers_words(kwargs):
    with pytest.raises(ValueError, match=r"LanczosProbe\(" + next(iter(kwargs)) + "="):
        LanczosProbe(**kwargs)

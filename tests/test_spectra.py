"""What a reading is made of: cheap ones in two metrics, Gauss-Newton, back ends and budgets, through LanczosProbe."""

import copy

import numpy as np
import pytest
import torch
from oracles import Net, dense_hessian, dense_jacobian
from test_probe import coming_step, measure, trained
from torch import nn, optim
from torch.nn import functional as F

from adaptive_opt.curvature import flatten
from adaptive_opt.memory import ProbeMemory
from adaptive_opt.objective import GivenLoss, Objective
from adaptive_opt.probe import LanczosProbe


def reading(net, base=None, model=None, kind="full", known=None, **kwargs):
    """As test_probe.measure, with the probe's own settings."""
    objective = Objective(GivenLoss(net.loss, list(net.model.modules()), None), net.params)
    if base is not None:
        net.backward()
    memory = known or ProbeMemory(torch.Generator().manual_seed(0))
    return LanczosProbe(every=1, **kwargs).measure(objective, base, model, memory, 7, kind)


@pytest.mark.parametrize("base", [lambda p: optim.SGD(p, lr=0.1, momentum=0.9), lambda p: optim.AdamW(p, lr=0.01)])
def test_cheap_readings_close_in_on_both_largest_eigenvalues_with_five_products_at_most(base):
    net = Net("layernorm", seed=3)
    optimizer = base(net.params)
    trained(net, optimizer)
    h, (_, root) = net.hessian(), coming_step(net, optimizer)
    in_h, in_a = (torch.linalg.eigvalsh(m).numpy() for m in (h, root[:, None] * h * root))
    memory = ProbeMemory(torch.Generator().manual_seed(0))
    cold = reading(net, optimizer, kind="cheap", known=memory)
    reading(net, optimizer, known=memory)  # a full one knows H's own top vector
    for _ in range(20):
        r = reading(net, optimizer, kind="cheap", known=memory)
        assert r.hvps in (4, 5)
        assert r.lambda_max <= in_h[-1] * (1 + 1e-12)
        assert np.abs(in_h - r.lambda_max).min() <= r.lambda_max_error * (1 + 1e-9)
        assert np.abs(in_a - r.stability * metric_limit(optimizer)).min() <= r.stability_error * metric_limit(optimizer) + 1e-12
    assert cold.hvps == 7
    assert r.lambda_max == pytest.approx(in_h[-1], rel=1e-3)
    assert r.stability * metric_limit(optimizer) == pytest.approx(in_a[-1], rel=1e-3)
    assert (r.lambda_min, r.epsilon, r.kappa, r.delta, r.trace) == (None,) * 5  # one end only


def metric_limit(optimizer):
    return 38.0 if isinstance(optimizer, optim.AdamW) else 3.8


def test_without_a_known_step_a_cheap_reading_still_gives_lambda_max():
    net, memory = Net("mlp"), ProbeMemory(torch.Generator().manual_seed(0))
    for _ in range(12):
        r = reading(net, kind="cheap", known=memory)
    assert r.lambda_max == pytest.approx(float(torch.linalg.eigvalsh(net.hessian())[-1]), rel=1e-3)
    assert (r.stability, r.overshoot) == (None, None)


def test_parameters_with_no_learning_rate_take_no_part_in_the_cheap_pairs_either():
    net = Net("mlp")
    optimizer = optim.SGD([{"params": net.params[:2], "lr": 0.1}, {"params": net.params[2:], "lr": 0.0}], lr=0.1)
    memory = ProbeMemory(torch.Generator().manual_seed(0))
    for _ in range(10):
        r = reading(net, optimizer, kind="cheap", known=memory)
    n = sum(p.numel() for p in net.params[:2])
    block = torch.linalg.eigvalsh(net.hessian()[:n, :n])
    assert r.stability == pytest.approx(0.1 * float(block[-1]) / 2, rel=1e-3)
    assert r.stability <= 0.1 * float(block[-1]) / 2 * (1 + 1e-9)


def test_the_gauss_newton_matrix_of_cross_entropy_is_measured_and_has_no_negative_eigenvalue():
    net = Net("mlp")
    r = reading(net, model=net.model, num_steps=net.n, curvature="gauss_newton")
    z = net.model(net.x)
    J = torch.stack(
        [torch.cat([g.flatten() for g in torch.autograd.grad(e, net.params, retain_graph=True)]) for e in z.flatten()]
    )
    p = z.softmax(1).detach()
    HL = torch.block_diag(*[torch.diag(row) - torch.outer(row, row) for row in p]) / len(p)
    true = torch.linalg.eigvalsh(J.T @ HL @ J)
    assert r.lambda_max == pytest.approx(float(true[-1]), rel=1e-8)
    assert r.lambda_min == pytest.approx(0, abs=1e-12 * r.lambda_max)
    assert (r.curvature, r.delta) == ("gauss_newton", 0)


def test_gauss_newton_without_a_model_is_named_as_not_measured():
    r = reading(Net("mlp"), curvature="gauss_newton")
    assert r.epsilon is None
    assert any("gauss_newton" in note and "output" in note for note in r.notes)


@pytest.mark.parametrize("backend", ["exact", "exact_rebuilt", "finite_difference"])
def test_every_back_end_gives_the_same_numbers_and_its_name(backend):
    net = Net("layernorm")
    true = torch.linalg.eigvalsh(net.hessian())
    r = reading(net, num_steps=net.n, backend=backend)
    tolerance = 1e-5 if backend == "finite_difference" else 1e-8
    assert (r.lambda_max, r.lambda_min) == pytest.approx((float(true[-1]), float(true[0])), rel=tolerance)
    assert r.backend == backend


def test_a_memory_budget_changes_the_method_and_the_ends_stay_within_their_errors():
    net = Net("layernorm")
    n, true = net.n, torch.linalg.eigvalsh(net.hessian()).numpy()
    methods = set()
    for vectors in (None, 20, 13, 6):
        r = reading(net, num_steps=60, memory=None if vectors is None else 8 * n * vectors)
        methods.add(r.method)
        assert np.abs(true - r.lambda_max).min() <= r.lambda_max_error * (1 + 1e-9)
        assert r.lambda_max == pytest.approx(true[-1], rel=2e-2)
    assert methods == {"full", "half", "restarted", "two-pass"}


def test_a_budget_for_fewer_than_five_vectors_is_named_as_not_enough():
    r = reading(Net("mlp"), memory=100)
    assert r.epsilon is None
    assert any("five vectors" in note for note in r.notes)


def test_the_outer_ends_hold_the_spectrum_and_the_ritz_values_have_their_residuals():
    net = Net("attention")
    true = torch.linalg.eigvalsh(net.hessian()).numpy()
    r = reading(net, num_steps=14)
    assert r.lambda_min_outer <= true[0]
    assert r.lambda_max_outer >= true[-1]
    assert len(r.ritz_values) == len(r.ritz_residuals) == 14
    assert all(np.abs(true - v).min() <= e * (1 + 1e-9) for v, e in zip(r.ritz_values, r.ritz_residuals, strict=True))
    assert r.weight_norm == pytest.approx(float(flatten(net.params).norm()))


class Crooked(torch.autograd.Function):
    """x^2 with the backward of x^3: its products are those of no Hessian."""

    @staticmethod
    def forward(ctx, x, y):
        ctx.save_for_backward(x, y)
        return x * y

    @staticmethod
    def backward(ctx, g):
        x, y = ctx.saved_tensors
        return g * y * x.exp(), g * x


def test_products_of_a_wrong_backward_are_called_not_symmetric():
    w = nn.Parameter(torch.linspace(0.5, 2, 8, dtype=torch.float64))
    r = measure(lambda: Crooked.apply(w[:4], w[4:]).sum(), [w], num_steps=8)
    assert r.asymmetry > 0.05
    assert any("not symmetric" in note for note in r.notes)


def test_the_lipschitz_numbers_come_with_whole_batches_and_where_they_are_asked_for():
    net = Net("mlp")
    x = net.x.clone().requires_grad_()
    J = dense_jacobian(net.model(x), [x])
    r = reading(net, model=net.model, lipschitz=True)
    assert r.lipschitz_local <= float(torch.linalg.svdvals(J)[0]) * (1 + 1e-12) <= r.lipschitz_bound * (1 + 1e-9)
    assert reading(net, model=net.model, lipschitz=False).lipschitz_local is None
    assert reading(net, model=net.model, kind="cheap", lipschitz=True).lipschitz_local is None


def test_tied_and_frozen_parameters_and_a_uneven_sum_are_one_hessian():
    net = Net("mlp")
    twin = copy.deepcopy(net.model)
    twin[2].bias.requires_grad_(False)
    params = [p for p in twin.parameters() if p.requires_grad]

    def loss():
        return F.cross_entropy(twin(net.x), net.y)

    true = torch.linalg.eigvalsh(dense_hessian(loss(), params))
    r = measure(loss, params, num_steps=sum(p.numel() for p in params))
    assert r.lambda_max == pytest.approx(float(true[-1]), rel=1e-8)

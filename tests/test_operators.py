"""Operators against dense float64 matrices, and which back end is chosen for what reason."""

import copy
import weakref

import numpy as np
import pytest
import torch
from oracles import DEVICES, NETS, Net, dense_hessian, dense_jacobian, start
from torch import nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from adaptive_opt.curvature import (
    FiniteDifferenceHessian,
    GaussNewton,
    Hessian,
    Part,
    Rebuilt,
    Sum,
    flatten,
    lanczos,
    operator_on,
)
from adaptive_opt.curvature.backend import graph_bytes


def matrix(operator, n, dtype=torch.float64, device="cpu"):
    """(n, n): the operator on every unit vector."""
    return torch.stack([operator(e) for e in torch.eye(n, dtype=dtype, device=device)]).T


def forward(net):
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        z = net.model(net.x)
    return z, F.cross_entropy(z, net.y)


def part(net, weight=1.0, where=slice(None)):
    def evaluate():
        z = net.model(net.x[where])
        return Part(weight * F.cross_entropy(z, net.y[where]), (z,))

    return evaluate


def gauss_newton(net):
    z, loss = forward(net)
    return GaussNewton([z], loss, net.params)


# ---- Gauss-Newton


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", NETS)
def test_gauss_newton_equals_the_dense_product_of_jacobians_and_is_semi_definite(name, device):
    net = Net(name, device=device)
    z, loss = forward(net)
    J = dense_jacobian(z, net.params)
    free = z.detach().requires_grad_()
    H_L = dense_hessian(F.cross_entropy(free, net.y), [free])
    dense = J.T @ H_L @ J
    G = GaussNewton([z], loss, net.params)
    found = matrix(G, net.n, device=device)
    assert torch.allclose(found, dense, rtol=1e-9, atol=1e-12 * float(dense.abs().max()))
    assert G.products == net.n
    assert torch.linalg.eigvalsh(found.cpu()).min() > -1e-12 * float(dense.abs().max()) * net.n
    assert torch.allclose(G.gradient, flatten(torch.autograd.grad(net.loss(), net.params)), rtol=1e-12)


def test_gauss_newton_is_the_hessian_where_the_model_is_linear():
    model, x, y = nn.Linear(4, 3).double(), start(20).view(5, 4), torch.tensor([0, 1, 2, 0, 1])
    params = list(model.parameters())
    for criterion in (lambda z: F.cross_entropy(z, y), lambda z: (z**2).mean(), lambda z: F.huber_loss(z, 0.1 * z.detach())):
        z = model(x)
        found = matrix(GaussNewton([z], criterion(z), params), 15)
        assert torch.allclose(found, dense_hessian(criterion(model(x)), params), rtol=1e-10, atol=1e-14)


def test_gauss_newton_of_several_outputs_couples_them_and_leaves_out_what_passes_them_by():
    net = Net("mlp")
    head = nn.Linear(5, 2).double()
    params = [*net.params, *head.parameters()]

    def loss_of(z, u):
        return F.cross_entropy(z, net.y) + (z.sum(1) * u.sum(1)).mean() + u.exp().mean()

    z, u = net.model(net.x), head(net.x)
    penalty = sum((p**2).sum() for p in params)
    G = matrix(GaussNewton([z, u], loss_of(z, u) + penalty, params), net.n + 12)
    J = torch.cat([dense_jacobian(z, params), dense_jacobian(u, params)])
    free = [z.detach().requires_grad_(), u.detach().requires_grad_()]
    assert torch.allclose(G, J.T @ dense_hessian(loss_of(*free), free) @ J, rtol=1e-9, atol=1e-12)


def test_gauss_newton_of_losses_linear_in_the_output_is_zero_and_without_a_graph_refused():
    net = Net("mlp")
    z = net.model(net.x)
    assert not GaussNewton([z], z.sum(), net.params)(start(net.n)).any()
    with pytest.raises(ValueError, match="no output hangs on a parameter"):
        GaussNewton([z.detach()], z.sum(), net.params)
    z, other = net.model(net.x), torch.ones(3, dtype=torch.float64, requires_grad=True)
    mixed = (z**2).sum() + (other**2).sum()
    assert torch.allclose(
        GaussNewton([z, other], mixed, net.params)(start(net.n)),
        2 * dense_jacobian(z, net.params).T @ (dense_jacobian(z, net.params) @ start(net.n)),
    )
    alone = torch.ones(3, dtype=torch.float64, requires_grad=True)
    assert not GaussNewton([alone], (alone**2).sum(), net.params)(start(net.n)).any()  # no output reaches a parameter


# ---- sums over batches


def test_sums_weighted_by_samples_equal_the_whole_batch_and_an_uneven_last_one_counts_less():
    net = Net("layernorm", samples=12)
    cuts = [slice(0, 5), slice(5, 10), slice(10, 12)]
    parts = [part(net, (c.stop - c.start) / 12, c) for c in cuts]
    v, dense = start(net.n), net.hessian()
    kept, reason = operator_on(parts, net.params)
    assert isinstance(kept, Sum)
    assert reason is None
    rebuilt, _ = operator_on(parts, net.params, backend="exact_rebuilt")
    for operator in (kept, rebuilt):
        assert torch.allclose(operator(v), dense @ v, rtol=1e-10, atol=1e-13)
        assert torch.allclose(operator.gradient, flatten(torch.autograd.grad(net.loss(), net.params)), rtol=1e-10, atol=1e-14)
        assert operator.products == 1
    even, _ = operator_on([part(net, 1 / 3, c) for c in cuts], net.params)
    assert not torch.allclose(even(v), dense @ v, rtol=1e-3)
    assert (kept.backend, rebuilt.backend) == ("exact", "exact_rebuilt")


def test_rebuilt_products_equal_kept_ones_bit_for_bit_and_hold_one_graph_at_a_time():
    net, alive, most = Net("mlp"), weakref.WeakSet(), []

    def build():
        for c in (slice(0, 4), slice(4, 8), slice(8, 12)):
            operator = Hessian(part(net, where=c)().loss, net.params)
            alive.add(operator)
            most.append(len(alive))
            yield operator
            del operator

    rebuilt = Rebuilt(build)
    v = start(net.n)
    assert torch.equal(rebuilt(v), Sum(list(build()))(v))
    assert max(most[:6]) == 1
    assert rebuilt.products == 1


# ---- finite differences


def test_finite_differences_leave_the_parameters_bit_for_bit_also_when_the_gradient_raises():
    net = Net("layernorm")
    before, calls = [p.detach().clone() for p in net.params], []

    @torch.enable_grad()
    def gradient():
        calls.append(1)
        if len(calls) == 3:
            raise RuntimeError("out of paper")
        return flatten(torch.autograd.grad(net.loss(), net.params))

    fd = FiniteDifferenceHessian(gradient, net.params)
    with pytest.raises(RuntimeError, match="out of paper"):
        fd(start(net.n))
    assert all(torch.equal(p, b) for p, b in zip(net.params, before, strict=True))
    assert not fd(torch.zeros(net.n, dtype=torch.float64)).any()
    assert torch.allclose(fd(1e-6 * start(net.n)), 1e-6 * fd(start(net.n)), rtol=1e-5)  # the step does not hang on |v|


@pytest.mark.parametrize(("dtype", "error"), [(torch.bfloat16, 0.2), (torch.float16, 0.05)])
def test_finite_differences_in_half_precision_move_the_weights_by_more_than_they_round(dtype, error):
    net = Net("layernorm")
    half = copy.deepcopy(net)
    half.model.to(dtype)
    half.params = list(half.model.parameters())
    half.x = half.x.to(dtype)
    with torch.no_grad():  # the same weights
        for p, q in zip(net.params, half.params, strict=True):
            p.copy_(q)

    @torch.enable_grad()
    def gradient():
        return flatten(torch.autograd.grad(F.cross_entropy(half.model(half.x).float(), half.y), half.params))

    fd = FiniteDifferenceHessian(gradient, half.params)
    for scale in (1.0, 1e-4):  # h overflows float16 beside so short a vector
        v = start(net.n).float() * scale
        true = net.hessian() @ v.double()
        assert (fd(v).double() - true).norm() < error * true.norm()


# ---- which back end


class Once(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x**3

    @staticmethod
    @once_differentiable
    def backward(ctx, g):
        return 3 * ctx.saved_tensors[0] ** 2 * g


def cubes(w):
    z = Once.apply(w)
    return Part(z.sum(), (z,))


def test_one_batch_is_exact_on_a_kept_graph_and_named_back_ends_are_taken():
    net = Net("mlp")
    for backend, kind in (
        (None, Hessian),
        ("exact", Hessian),
        ("exact_rebuilt", Rebuilt),
        ("finite_difference", FiniteDifferenceHessian),
    ):
        operator, reason = operator_on([part(net)], net.params, backend=backend)
        assert isinstance(operator, kind)
        assert reason is None
        assert operator.backend == (backend or "exact")
        assert torch.allclose(operator(start(net.n)), net.hessian() @ start(net.n), rtol=1e-4, atol=1e-5)
    curved, _ = operator_on([part(net)], net.params, "gauss_newton")
    assert isinstance(curved, GaussNewton)


def test_graphs_that_exceed_the_memory_are_rebuilt_and_the_reason_has_the_figures():
    net = Net("mlp")
    parts = [part(net, 0.5, slice(0, 6)), part(net, 0.5, slice(6, 12))]
    one = graph_bytes(parts[0], net.params)
    assert one > 6 * 6 * 8  # at least the hidden layer
    operator, reason = operator_on(parts, net.params, memory=2 * one - 1)
    assert operator.backend == "exact_rebuilt"
    assert reason.startswith("the kept graphs would take")
    operator, reason = operator_on(parts, net.params, memory=2 * one)
    assert (operator.backend, reason) == ("exact", None)
    curved, reason = operator_on(parts, net.params, "gauss_newton", memory=1)
    assert curved.backend == "exact_rebuilt"
    whole, _ = operator_on(parts, net.params, "gauss_newton")
    assert torch.equal(curved(start(net.n)), whole(start(net.n)))


@pytest.mark.parametrize(
    "error", [torch.OutOfMemoryError("CUDA out of memory"), RuntimeError("DefaultCPUAllocator: can't allocate memory")]
)
def test_running_out_of_memory_with_all_graphs_falls_back_to_one_at_a_time(error):
    net, calls = Net("mlp"), []

    def second():
        calls.append(1)
        if len(calls) == 1:
            raise error
        return part(net, 0.5, slice(6, 12))()

    operator, reason = operator_on([part(net, 0.5, slice(0, 6)), second], net.params)
    assert operator.backend == "exact_rebuilt"
    assert "ran out of memory" in reason
    assert torch.allclose(operator(start(net.n)), net.hessian() @ start(net.n), rtol=1e-10, atol=1e-13)


def test_no_second_derivative_falls_back_to_differences_unless_exact_ones_were_asked_for():
    w = start(4).requires_grad_()
    operator, reason = operator_on([lambda: cubes(w)], [w])
    assert operator.backend == "finite_difference"
    assert reason == "an exact product failed (Once is once_differentiable: it has no second derivative)"
    assert torch.allclose(operator(torch.ones(4, dtype=torch.float64)), 6 * w.detach(), rtol=1e-6)
    for memory in (1, 10**9):
        assert operator_on([lambda: cubes(w)] * 2, [w], memory=memory)[0].backend == "finite_difference"
    for options in ({"backend": "exact"}, {"backend": "exact_rebuilt"}, {"curvature": "gauss_newton"}):
        with pytest.raises(RuntimeError, match="once_differentiable"):
            operator_on([lambda: cubes(w)], [w], **options)


def test_names_that_are_none_no_data_and_no_output_are_refused():
    net = Net("mlp")
    for options in ({"backend": "magic"}, {"curvature": "fisher"}):
        with pytest.raises(ValueError, match="one of"):
            operator_on([part(net)], net.params, **options)
    for backend in (None, "exact", "exact_rebuilt", "finite_difference"):
        with pytest.raises(ValueError, match="the data is empty"):
            operator_on([], net.params, backend=backend)
    with pytest.raises(ValueError, match="the data is empty"):
        Sum([])
    with pytest.raises(ValueError, match="needs the model's output"):
        operator_on([lambda: Part(part(net)().loss)], net.params, "gauss_newton")
    with pytest.raises(ValueError, match="no Gauss-Newton matrix"):
        operator_on([part(net)], net.params, "gauss_newton", "finite_difference")


# ---- parameters


@pytest.mark.parametrize("name", NETS)
def test_a_layers_block_is_the_dense_hessians_diagonal_block(name):
    net = Net(name)
    dense, at = net.hessian(), 0
    z, loss = forward(net)
    whole = matrix(gauss_newton(net), net.n)
    for module in net.model.modules():
        own = list(module.parameters(recurse=False))
        size = sum(p.numel() for p in own)
        if not own:
            continue
        rows = slice(at, at + size)
        at += size
        assert torch.allclose(matrix(Hessian(loss, own), size), dense[rows, rows], rtol=1e-9, atol=1e-13)
        assert torch.allclose(matrix(GaussNewton([z], loss, own), size), whole[rows, rows], rtol=1e-9, atol=1e-13)
    assert at == net.n


def test_tied_weights_count_once_and_both_of_their_uses_do():
    embed = nn.Embedding(7, 3).double()
    head = nn.Linear(3, 7, bias=False).double()
    head.weight = embed.weight
    model = nn.Sequential(embed, nn.Tanh(), head)
    tokens, y = torch.tensor([0, 3, 3, 6]), torch.tensor([1, 0, 2, 5])
    params = list(model.parameters())
    assert len(params) == 1

    def loss_at(w):
        return F.cross_entropy(torch.tanh(w[tokens]) @ w.T, y)

    w = embed.weight.detach().clone().requires_grad_()
    dense = dense_hessian(loss_at(w), [w])
    assert torch.allclose(matrix(Hessian(F.cross_entropy(model(tokens), y), params), 21), dense, rtol=1e-10, atol=1e-14)


def test_frozen_parameters_are_constants_and_unused_ones_rows_of_zeros():
    net = Net("layernorm")
    dense = net.hessian()
    net.params[0].requires_grad_(False)
    rest, frozen = net.params[1:], net.params[0].numel()
    found = matrix(Hessian(net.loss(), rest), net.n - frozen)
    assert torch.allclose(found, dense[frozen:, frozen:], rtol=1e-9, atol=1e-13)
    unused = torch.ones(2, dtype=torch.float64, requires_grad=True)
    for make in (
        lambda p: Hessian(net.loss(), p),
        lambda p: GaussNewton([z := net.model(net.x)], F.cross_entropy(z, net.y), p),
    ):
        wider = matrix(make([*rest, unused]), net.n - frozen + 2)
        assert not wider[-2:].any()
        assert not wider[:, -2:].any()


def test_batch_normalisation_is_differentiated_through_its_batch_statistics():
    net = Net("batchnorm")
    net.model.train()
    training = net.hessian()
    found = matrix(Hessian(net.loss(), net.params), net.n)
    assert torch.allclose(found, training, rtol=1e-9, atol=1e-12)
    net.model.eval()
    evaluating = matrix(Hessian(net.loss(), net.params), net.n)
    assert torch.allclose(evaluating, net.hessian(), rtol=1e-9, atol=1e-12)
    assert not torch.allclose(training, evaluating, rtol=0.1)  # it matters which mode is measured


@pytest.mark.parametrize("name", ["mlp", "layernorm", "batchnorm"])
def test_bfloat16_parameters_are_measured_to_their_own_precision(name):
    net = Net(name)
    half = copy.deepcopy(net)
    half.model.bfloat16()
    half.params, half.x = list(half.model.parameters()), half.x.bfloat16()
    with torch.no_grad():
        for p, q in zip(net.params, half.params, strict=True):
            p.copy_(q)
        net.x.copy_(half.x)
    z = half.model(half.x)
    h = Hessian(F.cross_entropy(z.float(), half.y), half.params)
    assert h.gradient.dtype == torch.float32
    dense, v = net.hessian(), start(net.n, dtype=torch.float32)
    assert (h(v).double() - dense @ v.double()).norm() < 0.1 * (dense @ v.double()).norm()
    s = lanczos(h, v, 12)
    true = torch.linalg.eigvalsh(dense).numpy()
    # what rounding made asymmetric is in the residuals
    assert (np.abs(true[None] - s.ritz_values[:, None]).min(1) <= s.residuals).all()
    assert abs(s.ritz_values[-1] - true[-1]) < 0.05 * true[-1]
    assert s.residuals[-1] < 0.2 * true[-1]


def test_a_loss_that_is_linear_in_the_parameters_has_a_spectrum_of_zeros():
    w = start(5).requires_grad_()
    s = lanczos(Hessian((w * start(5, 1)).sum(), [w]), start(5, 2), 5)
    assert s.exhausted
    assert np.array_equal(s.ritz_values, [0.0])

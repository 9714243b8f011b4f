"""Operators, Lanczos, quadrature and layer Jacobians, each against a dense float64 oracle."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from oracles import DEVICES, NETS, Net, Scalars, Transfers, dense_jacobian, start, symmetric
from torch import nn
from torch.autograd.function import once_differentiable

from adaptive_opt.curvature import (
    FiniteDifferenceHessian,
    Hessian,
    condition_number_bound,
    count_below,
    effective_condition_number,
    ends,
    estimate_below,
    flatten,
    lanczos,
    layer_spectrum,
    scaled,
    trace_estimate,
    unflatten,
)
from adaptive_opt.curvature.vectors import on_host, total_norm

ROUNDING = 1e-13  # of the products and of the dense eigenvalues, relative to the largest: some 50 n eps


def check_bounds(spectrum, true, delta_tol=0.01):
    """Everything a Spectrum promises, against all eigenvalues."""
    true = np.asarray(true)
    largest, smallest = np.abs(true).max(), np.abs(true).min()
    slack = ROUNDING * len(true) * largest + 1e-300
    k = len(spectrum.ritz_values)
    assert spectrum.dim == len(true)
    assert k <= len(true)
    assert true.min() - slack <= spectrum.ritz_values[0] <= spectrum.ritz_values[-1] <= true.max() + slack  # the hull
    assert abs(spectrum.weights.sum() - 1) < 1e-12
    assert spectrum.weights.min() >= 0
    assert spectrum.orthogonality < 1e-10
    nearest = np.abs(true[None] - spectrum.ritz_values[:, None]).min(1)
    assert (nearest <= spectrum.residuals + slack).all()
    threshold = -delta_tol * spectrum.epsilon
    assert count_below(spectrum, threshold) <= (true < threshold + slack).sum()
    kappa = condition_number_bound(spectrum)
    if largest > 0:
        assert kappa * max(smallest - slack, 0.0) <= largest * (1 + 1e-9)
    assert not effective_condition_number(spectrum) < 1


VALUES = st.one_of(
    st.floats(-1e3, 1e3).filter(lambda x: x == 0 or abs(x) > 1e-6), st.sampled_from([0.0, 1.0, 1.0 + 1e-9, -5.0])
)


@settings(max_examples=150, deadline=None)
@given(st.lists(VALUES, min_size=1, max_size=24), st.integers(1, 30), st.integers(0, 10**6))
def test_every_bound_holds_on_random_symmetric_matrices(eigenvalues, num_steps, seed):
    a = symmetric(eigenvalues, seed)
    spectrum = lanczos(lambda v: a @ v, start(len(a), seed + 1), num_steps)
    check_bounds(spectrum, torch.linalg.eigvalsh(a))


@pytest.mark.parametrize(
    "eigenvalues",
    [[0.0] * 7, [3.0] * 7, [-2.0], [0.0], [1.0, 1.0, 1.0, 2.0, 2.0], [-9.0, -8.0, 1.0], [4.0] + [0.0] * 30],
)
def test_degenerate_spectra_are_exhausted_and_their_ends_exact(eigenvalues):
    for dtype, tol in ((torch.float64, 1e-13), (torch.float32, 2e-6)):
        a = symmetric(eigenvalues, 0).to(dtype)
        spectrum = lanczos(lambda v: a @ v, start(len(a), dtype=dtype), len(a))
        assert spectrum.exhausted
        assert np.isfinite(spectrum.orthogonality)
        assert np.allclose(spectrum.ritz_values[[0, -1]], [min(eigenvalues), max(eigenvalues)], rtol=tol, atol=10 * tol)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", NETS)
def test_both_ends_of_a_nets_hessian_equal_the_dense_ones(name, device):
    net = Net(name, device=device)
    true = torch.linalg.eigvalsh(net.hessian())
    h = Hessian(net.loss(), net.params)
    spectrum = lanczos(h, start(net.n, device=device), net.n)
    assert abs(spectrum.ritz_values[-1] - true[-1]) <= 1e-8 * abs(true[-1])
    assert abs(spectrum.ritz_values[0] - true[0]) <= 1e-8 * abs(true[0])
    check_bounds(spectrum, true)
    assert h.products == net.n


@settings(max_examples=12, deadline=None)
@given(st.sampled_from(sorted(NETS)), st.integers(0, 10**6), st.integers(1, 40))
def test_every_bound_holds_on_random_nets(name, seed, num_steps):
    net = Net(name, seed)
    spectrum = lanczos(Hessian(net.loss(), net.params), start(net.n, seed), num_steps)
    check_bounds(spectrum, torch.linalg.eigvalsh(net.hessian()))


@pytest.mark.parametrize("name", NETS)
def test_products_equal_the_dense_hessian_times_the_vector(name):
    net = Net(name)
    v, d, h = start(net.n), start(net.n, 1).abs(), Hessian(net.loss(), net.params)
    dense = net.hessian()
    assert torch.allclose(h(v), dense @ v, rtol=1e-11, atol=1e-12)
    assert torch.allclose(scaled(h, d)(v), d * (dense @ (d * v)), rtol=1e-11, atol=1e-12)
    assert torch.equal(h.gradient, flatten(torch.autograd.grad(net.loss(), net.params)))


def test_finite_differences_agree_with_the_exact_hessian_and_put_the_parameters_back():
    net = Net("layernorm")
    before = [p.detach().clone() for p in net.params]
    v = start(net.n)

    @torch.enable_grad()
    def gradient():
        return flatten(torch.autograd.grad(net.loss(), net.params))

    fd = FiniteDifferenceHessian(gradient, net.params)
    assert torch.allclose(fd(v), net.hessian() @ v, rtol=1e-6, atol=1e-7)
    assert all(torch.equal(p, b) for p, b in zip(net.params, before, strict=True))


def test_flatten_widens_half_precision_and_unflatten_undoes_it():
    tensors = [torch.randn(2, 3).bfloat16(), torch.randn(4).bfloat16(), torch.randn(()).bfloat16()]
    flat = flatten(tensors)
    assert flat.dtype == torch.float32
    assert all(torch.equal(a, b) for a, b in zip(unflatten(flat, tensors), tensors, strict=True))


def test_unused_and_linearly_used_parameters_have_zero_rows():
    a, b, c = (torch.randn(3, dtype=torch.float64, requires_grad=True) for _ in range(3))
    h = Hessian((a**2).sum() + b.sum(), [a, b, c])
    v = start(9)
    assert torch.equal(h(v), torch.cat([2 * v[:3], torch.zeros(6, dtype=torch.float64)]))
    assert not Hessian(b.sum() + 0 * c.sum(), [a, b, c])(v).any()


def test_an_operation_without_second_derivative_raises():
    class Once(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            ctx.save_for_backward(x)
            return x**3

        @staticmethod
        @once_differentiable
        def backward(ctx, g):
            return 3 * ctx.saved_tensors[0] ** 2 * g

    w = torch.ones(2, dtype=torch.float64, requires_grad=True)
    for loss in (Once.apply(w).sum(), (Once.apply(w) ** 2).sum(), Once.apply(w**2).sum()):  # autograd says nothing here
        with pytest.raises(RuntimeError, match="Once is once_differentiable"):
            Hessian(loss, [w])


def test_bases_stay_orthonormal_in_float32_at_twenty_thousand_parameters():
    d = torch.cat([torch.logspace(-4, 1, 19990), torch.linspace(50, 1000, 10)])
    spectrum = lanczos(lambda v: d * v, start(20000, dtype=torch.float32), 80)
    assert spectrum.orthogonality < 1e-5
    assert abs(spectrum.ritz_values[-1] - 1000) < 1e-5 * 1000
    top = spectrum.ritz_vector(-1)
    assert abs(top.norm() - 1) < 1e-5
    assert (d * top - spectrum.ritz_values[-1] * top).norm() <= spectrum.residuals[-1] + 1e-5 * 1000


def test_a_run_without_tolerance_waits_for_the_device_once(as_on_a_device):
    a, v = symmetric(list(range(1, 31)), 0), start(30)
    with Transfers() as transfers, Scalars() as scalars:
        lanczos(lambda x: a @ x, v, 25)
    assert transfers.count == 1
    assert scalars.count == 0
    with Scalars() as scalars:
        float(v[0])
    assert scalars.count == 1  # the counter counts


def test_a_tolerance_ends_the_run_early_and_is_kept():
    a, products = symmetric([-50.0, *np.linspace(0, 1, 60), 100.0], 0), []
    spectrum = lanczos(lambda v: products.append(1) or a @ v, start(62), 60, until=ends(1e-3))
    assert len(products) == len(spectrum.ritz_values) < 30
    assert abs(spectrum.ritz_values[-1] - 100) < 1e-3 * 100
    assert abs(spectrum.ritz_values[0] + 50) < 1e-3 * 100


def test_a_negative_end_behind_a_bulk_at_zero_is_not_passed_over():
    """Residuals alone end the run on the bulk; the lowest eigenvalue must lie as far below as promised at most."""
    d = torch.cat([torch.linspace(-0.5, 0.5, 20000), torch.tensor([-4.0, 20.0, 40.0, 100.0])]).double()

    def passed_over(question, seed):
        s = lanczos(lambda v: d * v, start(len(d), seed), 100, until=question)
        return s.ritz_values[0] - -4 > max(0.1 * abs(s.ritz_values[0]), 0.01 * 100)

    plain, careful = ends(0.01, 0.1, 0.01), ends(0.01, 0.1, 0.01, failure=0.1)
    assert np.mean([passed_over(plain, seed) for seed in range(40)]) > 0.5
    assert np.mean([passed_over(careful, seed) for seed in range(200)]) <= 0.1


def test_lanczos_refuses_what_it_cannot_run():
    with pytest.raises(ValueError, match="at least one step"):
        lanczos(lambda v: v, start(3), 0)
    for v, product in ((start(3), lambda v: v * float("nan")), (torch.zeros(3), lambda v: v)):
        with pytest.raises(FloatingPointError, match="not finite"):
            lanczos(product, v, 3)


@pytest.mark.parametrize("num_runs", [1, 4])
@pytest.mark.parametrize("threshold", [None, -0.5, 0.3])
def test_estimates_stay_within_four_standard_errors_that_are_neither_wide_nor_narrow(threshold, num_runs):
    a = symmetric(list(np.random.default_rng(0).normal(size=30)), 0)
    true = torch.linalg.eigvalsh(a).numpy()
    answer = true.sum() if threshold is None else (true < threshold).sum()
    found = []
    for seed in range(200):
        spectra = [lanczos(lambda v: a @ v, start(30, num_runs * seed + i), 30) for i in range(num_runs)]
        found.append(trace_estimate(spectra) if threshold is None else estimate_below(spectra, threshold))
    estimates, errors = np.array(found).T
    assert (np.abs(estimates - answer) <= 4 * errors).mean() >= 0.95
    assert 0.85 < estimates.std() / np.sqrt((errors**2).mean()) < 1.15  # +- 5 % from 200 runs
    assert abs(estimates.mean() - answer) < 4 * estimates.std() / np.sqrt(200)


@pytest.mark.parametrize("layer", ["linear", "conv"])
def test_layer_spectra_equal_the_dense_jacobians_singular_values(layer):
    module, x = {
        "linear": (nn.Linear(6, 5), torch.randn(3, 6)),
        "conv": (nn.Conv2d(2, 3, 3, padding=1), torch.randn(2, 2, 4, 4)),
    }[layer]
    x = x.double().requires_grad_()
    output = torch.relu(module.double()(x))
    sigma = torch.linalg.svdvals(dense_jacobian(output, [x])).numpy()
    rms = np.sqrt((sigma**2).sum() / output.numel())
    exact = layer_spectrum(output, x, torch.Generator().manual_seed(0), x.numel())
    assert abs(exact.sigma_max - sigma[0]) < 1e-8 * sigma[0]
    short = [layer_spectrum(output, x, torch.Generator().manual_seed(seed), 4) for seed in range(40)]
    assert all(s.sigma_max <= sigma[0] * (1 + 1e-12) for s in short)
    assert all(np.abs(sigma - s.sigma_max).min() <= s.sigma_max_error + 1e-12 for s in short)
    assert np.mean([abs(s.sigma_rms - rms) <= 4 * s.sigma_rms_error for s in short]) >= 0.95


def test_a_layer_that_passes_nothing_has_a_zero_spectrum():
    x = torch.randn(2, 3, dtype=torch.float64, requires_grad=True)
    dead = layer_spectrum(torch.relu(x - 100), x, torch.Generator().manual_seed(0))
    assert (dead.sigma_max, dead.sigma_rms, dead.sigma_rms_error) == (0, 0, 0)


@pytest.mark.parametrize("device", DEVICES)
def test_the_norm_of_many_tensors_is_torchs_own_bit_for_bit_and_all_numbers_come_with_one_look(device):
    torch.manual_seed(0)
    tensors = [torch.randn(shape, device=device) for shape in [(7, 3), (5,), (), (2, 2, 2)]]
    size = total_norm(tensors)
    assert torch.equal(size, torch.nn.utils.get_total_norm(tensors).reshape(1))
    sparse = torch.eye(3, device=device).to_sparse()
    torch.testing.assert_close(total_norm([*tensors, sparse, sparse]), (size**2 + 6).sqrt())
    assert on_host([size, tensors[1], tensors[2]]) == [size.tolist(), tensors[1].tolist(), [tensors[2].item()]]

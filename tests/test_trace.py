"""Traces, randomised eigenpairs and densities against dense float64 spectra; every error bar against what it covers."""

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from oracles import LiveBytes, Net, Scalars, Transfers, start, symmetric

from adaptive_opt.curvature import (
    Hessian,
    density,
    hutchinson,
    hutchpp,
    lanczos,
    randomized_eigh,
    two_pass_lanczos,
    xtrace,
)

METHODS = {"hutchinson": hutchinson, "hutch++": hutchpp, "xtrace": xtrace}
VALUES = st.one_of(st.floats(-100, 100).filter(lambda x: abs(x) > 1e-6), st.sampled_from([0.0, 1.0, -5.0]))
RNG = np.random.default_rng(0)
SPECTRA = {
    "indefinite": np.r_[50.0, -45.0, RNG.normal(size=58)],
    "decaying": 1 / np.arange(1.0, 61),
    "one outlier": np.r_[100.0, np.full(59, 0.3)],
}


def generator(seed):
    return torch.Generator().manual_seed(seed)


def like(n, dtype=torch.float64):
    return torch.empty(n, dtype=dtype)


def runs(method, eigenvalues, count, **options):
    a = symmetric(list(eigenvalues), 0)
    found = [METHODS[method](lambda v: a @ v, like(len(a)), generator(seed), **options) for seed in range(count)]
    return found, np.array([f.value for f in found]), np.array([f.stderr for f in found])


@pytest.mark.parametrize("method", ["hutch++", "xtrace"])
def test_operators_of_low_rank_have_their_trace_exactly(method):
    eigenvalues = [7.0, -3.0, 1e-3, *[0.0] * 27]
    found, values, errors = runs(method, eigenvalues, 5, max_products=30, tol=None)
    assert np.allclose(values, sum(eigenvalues), rtol=1e-12, atol=0)
    assert (errors < 1e-6).all()
    assert {f.products for f in found} == {30}


@settings(max_examples=25, deadline=None)
@given(st.lists(VALUES, min_size=1, max_size=8), st.integers(0, 99))
@example([-14.0, -88.0, -24.0], 37)  # a left-out test vector that the others nearly span
def test_spaces_that_the_products_fill_have_their_trace_exactly(eigenvalues, seed):
    a = symmetric(eigenvalues, seed)
    slack = 1e-10 * (1 + np.abs(eigenvalues).max())
    for found in (
        hutchpp(lambda v: a @ v, like(len(a)), generator(seed), rank=len(a)),
        xtrace(lambda v: a @ v, like(len(a)), generator(seed), tol=None),
    ):
        assert abs(found.value - sum(eigenvalues)) < slack
        assert found.stderr < slack
        assert found.converged
        assert found.products == 2 * len(a)


@pytest.mark.parametrize("method", METHODS)
def test_zero_one_by_one_and_multiples_of_one_are_exact_and_end_at_the_first_look(method):
    for eigenvalues in ([0.0] * 20, [-4.0], [3.0] * 20):
        (found,), _, _ = runs(method, eigenvalues, 1, max_products=60)
        assert abs(found.value - sum(eigenvalues)) < 1e-12 * 60
        assert found.stderr < 1e-6
        assert found.converged


@pytest.mark.parametrize("spectrum", SPECTRA)
@pytest.mark.parametrize("method", METHODS)
def test_errors_are_unbiased_and_as_large_as_stated(method, spectrum):
    true = SPECTRA[spectrum].sum()
    _, values, errors = runs(method, SPECTRA[spectrum], 100, max_products=30, tol=None)
    assert abs(values.mean() - true) < 4 * values.std() / np.sqrt(100)
    assert 0.6 < values.std() / np.sqrt((errors**2).mean()) < 1.3
    assert (np.abs(values - true) <= 2 * errors).mean() >= 0.85  # 0.95 for normal errors that are known


@pytest.mark.parametrize("spectrum", ["decaying", "one outlier"])
@pytest.mark.parametrize("method", METHODS)
def test_stopping_by_the_error_does_not_spoil_its_coverage(method, spectrum):
    true = SPECTRA[spectrum].sum()
    few = {"rank": 4} if method == "hutch++" else {}
    found, values, errors = runs(method, SPECTRA[spectrum], 60, max_products=400, tol=0.15, **few)
    assert all(f.converged and f.stderr <= 0.15 * abs(f.value) and f.products < 400 for f in found)
    assert (np.abs(values - true) <= 2 * errors + 1e-12 * true).mean() >= 0.83


@pytest.mark.parametrize("method", METHODS)
def test_a_cap_that_comes_first_is_said(method):
    (found,), _, _ = runs(method, SPECTRA["indefinite"], 1, max_products=30, tol=1e-6)
    assert not found.converged
    assert found.products == 30
    assert found.stderr > 1e-6 * abs(found.value)
    (found,), _, _ = runs(method, SPECTRA["indefinite"], 1, max_products=60, tol=None, atol=60.0)  # absolute instead
    assert found.converged
    assert found.stderr <= 60
    assert found.products < 60


def test_on_a_decaying_spectrum_each_method_is_better_than_the_one_before():
    eigenvalues = 0.7 ** np.arange(60.0)
    errors = [np.abs(runs(m, eigenvalues, 20, max_products=36, tol=None)[1] - eigenvalues.sum()).mean() for m in METHODS]
    assert errors[0] > 10 * errors[1] > 20 * errors[2]


@pytest.mark.parametrize("method", METHODS)
def test_the_trace_of_a_nets_hessian_in_float32_is_within_four_errors(method):
    net = Net("attention")
    true = float(net.hessian().trace())
    h = Hessian(net.loss(), net.params)
    found = METHODS[method](lambda v: h(v.double()).float(), like(net.n, torch.float32), generator(0), 60, tol=None)
    assert abs(found.value - true) < 4 * found.stderr
    assert found.products == h.products == 60


@pytest.mark.parametrize("method", METHODS)
def test_without_a_tolerance_the_host_waits_once_and_with_one_at_each_look(method):
    a = symmetric(list(SPECTRA["indefinite"]), 0)
    for tol, least, most in ((None, 1, 1), (1e-9, 3, 12)):
        with Transfers() as transfers, Scalars() as scalars:
            METHODS[method](lambda v: a @ v, like(60), generator(0), 60, tol=tol)
        assert least <= transfers.count <= most
        assert scalars.count == 0


def test_estimates_keep_the_vectors_that_they_say():
    n, d, v = 1 << 14, torch.linspace(-1, 1, 1 << 14, dtype=torch.float64), like(1 << 14)
    for method, vectors in (("hutchinson", 4), ("hutch++", 8 + 4), ("xtrace", 3 * 12 + 4)):
        with LiveBytes() as memory:
            METHODS[method](lambda v: d * v, v, generator(0), 24, tol=None)
        assert memory.peak <= vectors * n * 8 * 1.01


def test_products_that_are_not_finite_and_budgets_of_no_use_are_refused():
    for method in METHODS.values():
        with pytest.raises(FloatingPointError, match="not finite"):
            method(lambda v: v * float("nan"), like(5), generator(0), 30)
    for method, products in ((hutchinson, 0), (hutchpp, 2), (xtrace, 1)):
        with pytest.raises(ValueError, match="too few products"):
            method(lambda v: v, like(5), generator(0), products)
    with pytest.raises(ValueError, match="too few products"):
        hutchpp(lambda v: v, like(50), generator(0), 30, rank=15)


def test_few_test_vectors_leave_xtraces_error_unknown():
    found = xtrace(lambda v: torch.arange(20.0) * v, like(20, torch.float32), generator(0), 6)
    assert found.stderr == np.inf
    assert not found.converged


@settings(max_examples=25, deadline=None)
@given(
    st.lists(VALUES, min_size=1, max_size=20),
    st.integers(1, 20),
    st.integers(0, 6),
    st.integers(0, 2),
    st.integers(0, 99),
)
def test_randomised_eigenpairs_are_near_eigenvalues_within_their_residuals(eigenvalues, rank, oversampling, power, seed):
    a = symmetric(eigenvalues, seed)
    rank = min(rank, len(a))
    found = randomized_eigh(lambda v: a @ v, like(len(a)), rank, generator(seed), oversampling, power)
    true = torch.linalg.eigvalsh(a).numpy()
    slack = 1e-12 * (1 + np.abs(true).max())
    assert (np.abs(true[None] - found.values[:, None]).min(1) <= found.residuals + slack).all()
    assert (np.diff(np.abs(found.values)) <= slack).all()
    assert torch.allclose(found.vectors @ found.vectors.T, torch.eye(rank, dtype=torch.float64), atol=1e-10)
    residuals = (found.vectors @ a - torch.as_tensor(found.values)[:, None] * found.vectors).norm(dim=1).numpy()
    assert (residuals <= found.residuals + slack).all()


def test_randomised_eigenpairs_find_dominating_ones_of_either_sign_and_know_what_they_missed():
    eigenvalues = [-90.0, 80.0, -60.0, *np.linspace(-1, 1, 57)]
    a = symmetric(eigenvalues, 0)
    for seed in range(10):
        found = randomized_eigh(lambda v: a @ v, like(60), 3, generator(seed), power_iterations=2)
        assert np.allclose(found.values, [-90, 80, -60], rtol=1e-6)
        assert found.products == 4 * 13 + 2
        rest = 1.0  # what is left of A
        assert rest * 0.5 < found.missed < 100 * rest
    assert randomized_eigh(lambda v: a @ v, like(60), 60, generator(0)).missed < 1e-10
    with Transfers() as transfers, Scalars() as scalars:
        randomized_eigh(lambda v: a @ v, like(60), 3, generator(0))
    assert (transfers.count, scalars.count) == (1, 0)
    with pytest.raises(ValueError, match="a rank from 1 to 60"):
        randomized_eigh(lambda v: a @ v, like(60), 61, generator(0))
    with pytest.raises(FloatingPointError, match="not finite"):
        randomized_eigh(lambda v: a @ v * float("inf"), like(60), 2, generator(0))


def smooth(eigenvalues, grid, width):
    z = (grid[:, None] - np.asarray(eigenvalues)) / width
    return (np.exp(-0.5 * z**2) / (width * np.sqrt(2 * np.pi))).sum(1)


def test_densities_integrate_to_n_and_equal_the_smoothed_spectrum_within_their_errors():
    eigenvalues = np.r_[RNG.normal(size=58), 6.0, -5.0]
    a, misses, scatter, errors = symmetric(list(eigenvalues), 0), [], [], []
    grid = np.linspace(-8, 9, 300)
    true = smooth(eigenvalues, grid, 0.4)
    for seed in range(20):
        found = density([lanczos(lambda v: a @ v, start(60, 10 * seed + i), 40) for i in range(4)], grid, 0.4)
        assert abs(np.trapezoid(found.values, found.grid) - 60) < 1e-6 * 60
        misses.append((np.abs(found.values - true) > 3 * found.stderr + 1e-9).mean())
        scatter.append(found.values)
        errors.append(found.stderr)
    assert np.mean(misses) < 0.05
    where = true > 0.5
    ratio = np.std(scatter, axis=0)[where] / np.sqrt(np.mean(np.square(errors), axis=0))[where]
    assert 0.6 < ratio.mean() < 1.1  # the larger of two errors is on the safe side
    assert abs(np.mean(scatter, axis=0) - true).max() < 0.15 * true.max()


def test_a_density_of_runs_without_a_basis_is_that_of_runs_with_one():
    a = symmetric(list(RNG.normal(size=40)), 0)
    one = density([lanczos(lambda v: a @ v, start(40, i), 12) for i in range(3)], 50)
    two = density([two_pass_lanczos(lambda v: a @ v, start(40, i), 12) for i in range(3)], 50)
    assert np.allclose(one.values, two.values, rtol=1e-6, atol=1e-9)
    assert one.width == pytest.approx(two.width)


def test_densities_of_zero_and_of_one_run_have_a_width_and_an_error():
    zero = density([lanczos(lambda v: 0 * v, start(9), 5)])
    assert np.trapezoid(zero.values, zero.grid) == pytest.approx(9, rel=1e-3)
    assert np.isfinite(zero.stderr).all()
    for spectra, width, message in (
        ([], None, "at least one Lanczos run"),
        ([lanczos(lambda v: v, start(3), 1)], -1.0, "positive"),
    ):
        with pytest.raises(ValueError, match=message):
            density(spectra, 10, width)

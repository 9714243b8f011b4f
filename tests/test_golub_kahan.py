"""Bidiagonalisation against dense singular values in float64."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from adaptive_opt.curvature import golub_kahan

ROUNDING = 1e-12  # relative to the largest singular value


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def run(a, num_steps, seed=0):
    return golub_kahan(lambda v: a @ v, lambda u: a.T @ u, randn(a.shape[1], seed=seed).to(a.dtype), num_steps)


def check(b, a):
    """Everything a Bidiagonal promises, against all singular values (with the zeros of J'J where n > m)."""
    m, n = a.shape
    true = np.zeros(n)
    true[: min(m, n)] = torch.linalg.svdvals(a).numpy()
    slack = ROUNDING * n * true.max() + 1e-300
    assert b.shape == (m, n)
    assert len(b.sigma) <= n
    assert (np.diff(b.sigma) >= 0).all()
    assert true.min() - slack <= b.sigma[0] <= b.sigma[-1] <= true.max() + slack
    assert (np.abs(true[None] - b.sigma[:, None]).min(1) <= b.residuals + slack).all()
    assert abs(b.weights.sum() - 1) < 1e-12


@settings(max_examples=60, deadline=None)
@given(
    m=st.integers(1, 12),
    n=st.integers(1, 12),
    rank=st.integers(0, 12),
    k=st.integers(1, 14),
    scale=st.sampled_from([1e-8, 1.0, 1e8]),
    seed=st.integers(0, 99),
)
def test_every_promise_holds_for_random_matrices_of_any_shape_and_rank(m, n, rank, k, scale, seed):
    a = scale * randn(m, rank, seed=seed) @ randn(rank, n, seed=seed + 1000)
    b = run(a, k, seed + 2000)
    check(b, a)
    if k > min(m, n, rank):
        largest = float(torch.linalg.matrix_norm(a, 2))
        assert b.residuals[-1] <= 1e-9 * largest
        assert abs(b.sigma[-1] - largest) <= 1e-9 * largest


def test_a_full_run_finds_every_singular_value():
    for m, n in ((9, 6), (6, 6)):
        a = randn(m, n)
        b = run(a, n)
        assert b.exhausted
        assert np.allclose(b.sigma[::-1], torch.linalg.svdvals(a).numpy(), rtol=1e-10)


def test_the_start_vectors_weights_are_those_of_its_exact_decomposition():
    a, start = randn(8, 5), randn(5, seed=3)
    b = golub_kahan(lambda v: a @ v, lambda u: a.T @ u, start, 5)
    _, _, Vt = torch.linalg.svd(a, full_matrices=False)
    assert np.allclose(b.weights[::-1], ((Vt @ start / start.norm()) ** 2).numpy(), rtol=1e-8)


def test_the_frobenius_norm_is_right_within_four_standard_errors():
    a = randn(30, 20)
    found = np.array([run(a, 3, seed).frobenius() for seed in range(200)])
    true = float(a.square().sum())
    assert (np.abs(found[:, 0] - true) <= 4 * found[:, 1]).mean() >= 0.95
    assert abs(found[:, 0].mean() - true) < 4 * found[:, 0].std() / np.sqrt(200)


def test_one_column_and_zero_and_orthogonal_operators_end_after_one_step():
    a = randn(7, 1)
    assert run(a, 5).sigma == pytest.approx([float(a.norm())])
    zero = run(torch.zeros(3, 4, dtype=torch.float64), 4)
    assert (zero.sigma.tolist(), zero.residuals.tolist(), zero.exhausted) == ([0.0], [0.0], True)
    q, _ = torch.linalg.qr(randn(6, 6))
    one = run(q, 4)
    assert one.exhausted
    assert one.sigma == pytest.approx([1.0])


def test_a_range_in_few_coordinates_ends_the_run_without_noise():
    a = torch.zeros(40, 30, dtype=torch.float64)
    a[:12] = randn(12, 30)  # as under a ReLU that is mostly off: no rounding leaves the range
    b = run(a, 30)
    check(b, a)
    assert b.exhausted
    assert len(b.sigma) == 13
    assert b.residuals.max() < 1e-12


def test_float32_products_keep_their_promises_at_their_own_rounding():
    a = randn(200, 150).float()
    b = run(a, 60)
    true = torch.linalg.svdvals(a.double()).numpy()
    assert (np.abs(true[None] - b.sigma[:, None]).min(1) <= b.residuals).all()
    assert b.residuals[-1] < 1e-2 * b.sigma[-1]


def test_an_operator_whose_transpose_is_another_ones_says_so():
    a, other = randn(9, 9), randn(9, 9, seed=1)
    wrong = golub_kahan(lambda v: a @ v, lambda u: other.T @ u, randn(9, seed=2), 4)
    assert wrong.residuals.min() > 0.1


def test_what_is_not_finite_raises_and_a_late_nan_shortens_the_run():
    a = randn(6, 6)
    with pytest.raises(FloatingPointError, match="not finite"):
        run(a * float("nan"), 3)
    with pytest.raises(FloatingPointError, match="not finite"):
        golub_kahan(lambda v: a @ v, lambda u: a.T @ u, torch.full((6,), float("inf"), dtype=torch.float64), 3)
    with pytest.raises(ValueError, match="at least one step"):
        run(a, 0)
    calls = []

    def late(v):
        calls.append(v)
        return a @ v * (float("nan") if len(calls) == 4 else 1.0)

    b = golub_kahan(late, lambda u: a.T @ u, randn(6), 6)
    assert len(b.sigma) == 3
    check(b, a)

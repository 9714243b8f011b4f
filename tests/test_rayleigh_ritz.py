"""Rayleigh-Ritz on a few known products: the best lower bound that they hold."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from oracles import DEVICES

from adaptive_opt.curvature import lanczos, top_ritz_pair


def symmetric(n, seed):
    a = torch.randn(n, n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return (a + a.T) / 2


def vectors(n, k, seed):
    return list(torch.randn(k, n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64))


@pytest.mark.parametrize("device", DEVICES)
@settings(max_examples=60, deadline=None)
@given(n=st.integers(2, 20), k=st.integers(1, 6), seed=st.integers(0, 10**6))
def test_the_pair_is_the_largest_of_the_projected_matrix_and_its_residual_reaches_an_eigenvalue(device, n, k, seed):
    a, xs = symmetric(n, seed).to(device), [x.to(device) for x in vectors(n, k, seed + 1)]
    pair = top_ritz_pair(xs, [a @ x for x in xs])
    q, _ = torch.linalg.qr(torch.stack(xs, 1))
    true = torch.linalg.eigvalsh(a)
    assert pair.value == pytest.approx(float(torch.linalg.eigvalsh(q.T @ a @ q)[-1]), abs=1e-7)  # near-dependent vectors
    assert pair.value <= true[-1] + 1e-7
    assert (true - pair.value).abs().min() <= pair.residual + 1e-7
    assert float(pair.vector.norm()) == pytest.approx(1, abs=1e-6)


def test_on_a_krylov_space_it_is_what_lanczos_finds():
    a, start = symmetric(30, 0), vectors(30, 1, 1)[0]
    spectrum = lanczos(lambda v: a @ v, start, 5)
    basis = list(spectrum.vectors.rows[: spectrum.vectors.size])
    pair = top_ritz_pair(basis, [a @ q for q in basis])
    assert pair.value == pytest.approx(spectrum.ritz_values[-1], rel=1e-12)
    assert pair.residual == pytest.approx(spectrum.residuals[-1], rel=1e-6)


def test_repeated_and_zero_vectors_change_nothing_and_zeros_alone_say_nothing():
    a, xs = symmetric(12, 3), vectors(12, 2, 4)
    with_copies = [xs[0], 3 * xs[0], torch.zeros(12).double(), xs[1]]
    pair, same = (top_ritz_pair(v, [a @ x for x in v]) for v in (xs, with_copies))
    assert same.value == pytest.approx(pair.value, rel=1e-9)
    assert top_ritz_pair([torch.zeros(3)], [torch.zeros(3)]) is None
    assert top_ritz_pair(xs, [x * float("nan") for x in xs]) is None

"""Block, restarted and two-pass Lanczos, small and rounded bases, questions and probable ends, against dense spectra."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from oracles import DEVICES, LiveBytes, Scalars, Transfers, start, symmetric

from adaptive_opt.curvature import (
    block_lanczos,
    count_below,
    effective_condition_number,
    ends,
    estimate_below,
    is_below,
    lanczos,
    lanczos_within,
    largest,
    negative_below,
    outer_ends,
    thick_restart_lanczos,
    top,
    top_eigenpairs,
    trace_estimate,
    two_pass_lanczos,
)
from adaptive_opt.curvature.basis import Basis
from adaptive_opt.curvature.questions import next_look
from adaptive_opt.curvature.subspace import extend

VALUES = st.one_of(st.floats(-1e3, 1e3).filter(lambda x: abs(x) > 1e-6), st.sampled_from([0.0, 1.0, 1.0 + 1e-9, -5.0]))
VARIANTS = {
    "full": lambda f, v, k: lanczos(f, v, k),
    "two-pass": lambda f, v, k: two_pass_lanczos(f, v, k),
    "restarted": lambda f, v, k: thick_restart_lanczos(f, v, k, 6),
    "block": lambda f, v, k: block_lanczos(f, v[None], k),
}


def block(b, n, seed=0):
    return torch.stack([start(n, 1000 * seed + i) for i in range(b)])


def check(spectrum, a, slack=1e-12):
    """What every variant promises: Ritz values in the hull, eigenvalues within the residuals, Ritz vectors that show them."""
    true = torch.linalg.eigvalsh(a).numpy()
    slack *= len(true) * np.abs(true).max() + 1e-280
    theta = spectrum.ritz_values
    assert true[0] - slack <= theta[0] <= theta[-1] <= true[-1] + slack
    assert (np.abs(true[None] - theta[:, None]).min(1) <= spectrum.residuals + slack).all()
    for i in (0, -1):
        y = spectrum.ritz_vector(i)
        assert abs(y.norm() - 1) < 1e-8
        assert (a @ y - theta[i] * y).norm() <= spectrum.residuals[i] + slack
    assert spectrum.dim == len(true)


# ---- block Lanczos


@settings(max_examples=60, deadline=None)
@given(st.lists(VALUES, min_size=1, max_size=20), st.integers(1, 5), st.integers(1, 8), st.integers(0, 99))
def test_every_promise_of_blocks_holds_on_random_matrices(eigenvalues, b, num_blocks, seed):
    a = symmetric(eigenvalues, seed)
    b = min(b, len(a))
    s = block_lanczos(lambda v: a @ v, block(b, len(a), seed), num_blocks)
    check(s, a)
    assert s.orthogonality < 1e-12
    assert s.products == len(s.ritz_values) == b * min(num_blocks, len(a) // b)
    assert abs(s.weights.sum() - 1) < 1e-12
    assert s.exhausted or s.products < len(a)


def test_a_block_of_one_equals_lanczos():
    a = symmetric(list(range(1, 31)), 0)
    one, other = lanczos(lambda v: a @ v, start(30), 12), block_lanczos(lambda v: a @ v, start(30)[None], 12)
    assert np.allclose(one.ritz_values, other.ritz_values, rtol=1e-12)
    assert np.allclose(one.residuals, other.residuals, atol=1e-11)
    assert np.allclose(one.weights, other.weights, atol=1e-12)


def test_blocks_count_multiplicities_that_one_vector_cannot_see():
    a = symmetric([-4.0, -4.0, *np.linspace(0, 1, 40), 9.0, 9.0, 9.0], 0)
    assert (np.abs(lanczos(lambda v: a @ v, start(45), 14).ritz_values - 9) < 1e-8).sum() == 1
    s = block_lanczos(lambda v: a @ v, block(3, 45), 12)
    assert (np.abs(s.ritz_values - 9) < 1e-8).sum() == 3
    assert (np.abs(s.ritz_values + 4) < 1e-8).sum() == 2
    assert count_below(s, -3.9) == 2


def test_blocks_part_a_cluster_in_the_steps_in_which_one_vector_does_not():
    a = symmetric([*np.linspace(0, 1, 60), 10.0, 10.001, 10.002], 0)
    s = block_lanczos(lambda v: a @ v, block(3, 63), 6)
    assert np.allclose(s.ritz_values[-3:], [10.0, 10.001, 10.002], atol=1e-6)
    one = lanczos(lambda v: a @ v, start(63), 8)
    assert (np.abs(one.ritz_values[-3:] - [10.0, 10.001, 10.002]) > 1e-4).any()


@pytest.mark.parametrize("rows", [[0, 0], [0, 1, 0], [None, 0], [0, None, None]])
def test_start_blocks_of_a_lower_rank_are_filled_up(rows):
    a, v = symmetric(list(range(1, 13)), 0), block(2, 12)
    s = block_lanczos(lambda x: a @ x, torch.stack([torch.zeros(12).double() if i is None else v[i] for i in rows]), 3)
    check(s, a)
    assert s.orthogonality < 1e-12


def test_a_block_whose_space_ends_at_once_goes_on_in_the_rest():
    d = torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0], dtype=torch.float64)
    s = block_lanczos(lambda v: d * v, torch.eye(2, 5, dtype=torch.float64), 2)  # (e_1, e_2) is invariant, exactly
    check(s, torch.diag(d))
    assert np.allclose(s.ritz_values[:2], [1, 2])
    zero = block_lanczos(lambda v: 0 * v, torch.eye(2, 5, dtype=torch.float64), 2)
    assert np.array_equal(zero.ritz_values, np.zeros(4))
    assert zero.exhausted
    assert zero.orthogonality < 1e-12


def test_blocks_that_do_not_fit_and_blocks_of_zeros_are_refused():
    for shape, num_blocks in (((4, 3), 2), ((2, 5), 0), ((0, 5), 2)):
        with pytest.raises(ValueError, match="one block must fit"):
            block_lanczos(lambda v: v, torch.ones(shape, dtype=torch.float64), num_blocks)
    for v in (torch.zeros(2, 5), torch.full((2, 5), float("nan"))):
        with pytest.raises(FloatingPointError, match="start block"):
            block_lanczos(lambda v: v, v, 2)


def test_an_operator_that_is_not_symmetric_is_told_by_blocks_too():
    a = torch.randn(12, 12, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    assert block_lanczos(lambda v: a @ v, block(2, 12), 3).asymmetry > 0.1
    h = (a + a.T) / 2
    assert block_lanczos(lambda v: h @ v, block(2, 12), 3).asymmetry < 1e-12


# ---- thick restart


@settings(max_examples=60, deadline=None)
@given(st.lists(VALUES, min_size=1, max_size=24), st.integers(1, 60), st.integers(4, 12), st.integers(0, 99))
def test_every_promise_of_restarts_holds_on_random_matrices(eigenvalues, num_steps, basis_size, seed):
    a = symmetric(eigenvalues, seed)
    s = thick_restart_lanczos(lambda v: a @ v, start(len(a), seed), num_steps, basis_size)
    check(s, a)
    assert len(s.ritz_values) <= basis_size
    assert s.products <= min(num_steps, max(num_steps, len(a)))
    assert s.orthogonality < 1e-11


def test_restarts_find_both_ends_in_a_basis_of_eight_where_eight_steps_do_not():
    a, products = symmetric([-30.0, *np.linspace(-10, 20, 300), 35.0], 0), []
    s = thick_restart_lanczos(lambda v: products.append(1) or a @ v, start(302), 200, 8, until=ends(1e-8))
    check(s, a)
    assert np.allclose(s.ritz_values[[0, -1]], [-30, 35], atol=1e-6)
    assert s.method == "restarted"
    assert len(products) == s.products < 200
    assert (s.products - 8) % 4 == 0  # eight, then four after each restart
    short = lanczos(lambda v: a @ v, start(302), 8)
    assert abs(short.ritz_values[-1] - 35) > 1e-3


def test_restarts_synchronise_once_each_and_without_one_equal_lanczos():
    a = symmetric(list(np.linspace(-1, 2, 50)), 0)
    with Transfers() as transfers, Scalars() as scalars:
        s = thick_restart_lanczos(lambda v: a @ v, start(50), 28, 8)
    assert transfers.count == 1 + (28 - 8) // 4
    assert scalars.count == 0
    assert s.products == 28
    full = thick_restart_lanczos(lambda v: a @ v, start(50), 8, 8)
    assert full.method == "full"
    assert np.allclose(full.ritz_values, lanczos(lambda v: a @ v, start(50), 8).ritz_values, rtol=1e-12)
    assert abs(full.weights.sum() - 1) < 1e-12


def test_a_space_of_few_dimensions_is_restarted_in_without_harm():
    a = symmetric([*[0.0] * 40, *range(1, 11)], 0)  # eleven different eigenvalues, a basis of eight
    s = thick_restart_lanczos(lambda v: a @ v, start(50), 200, 8)
    check(s, a)
    assert np.allclose(s.ritz_values[[0, -1]], [0, 10], atol=1e-11)
    assert s.orthogonality < 1e-12
    three = torch.tensor([1.0, 2.0, 5.0] * 10, dtype=torch.float64)
    s = thick_restart_lanczos(lambda v: three * v, start(30), 200, 4)
    assert s.exhausted
    assert s.products == 4
    assert np.allclose(s.ritz_values, [1, 2, 5])


def test_after_a_restart_estimates_are_refused_and_counts_still_hold():
    eigenvalues = np.linspace(-1, 2, 50)
    a = symmetric(list(eigenvalues), 0)
    s = thick_restart_lanczos(lambda v: a @ v, start(50), 28, 8)
    assert 1 <= count_below(s, -0.5) <= (eigenvalues < -0.5).sum()
    for estimate in (lambda: trace_estimate([s]), lambda: estimate_below([s], 0.0), lambda: effective_condition_number(s)):
        with pytest.raises(ValueError, match="restarted Lanczos run has no quadrature"):
            estimate()


def test_small_bases_and_no_steps_are_refused():
    with pytest.raises(ValueError, match="four vectors"):
        thick_restart_lanczos(lambda v: v, start(10), 5, 3)
    for run in (two_pass_lanczos, lanczos):
        with pytest.raises(ValueError, match="at least one step"):
            run(lambda v: v, start(10), 0)
    with pytest.raises(ValueError, match="at least one step"):
        thick_restart_lanczos(lambda v: v, start(10), 0, 5)


# ---- two passes


@settings(max_examples=60, deadline=None)
@given(st.lists(VALUES, min_size=1, max_size=24), st.integers(1, 40), st.integers(0, 99))
def test_every_promise_of_two_passes_holds_on_random_matrices(eigenvalues, num_steps, seed):
    a = symmetric(eigenvalues, seed)
    s = two_pass_lanczos(lambda v: a @ v, start(len(a), seed), num_steps)
    true = torch.linalg.eigvalsh(a).numpy()
    slack = 1e-11 * np.abs(true).max()
    assert true[0] - slack <= s.ritz_values[0] <= s.ritz_values[-1] <= true[-1] + slack
    assert (np.abs(true[None] - s.ritz_values[:, None]).min(1) <= s.residuals + slack).all()
    assert abs(s.weights.sum() - 1) < 1e-12


def test_two_passes_equal_one_while_the_basis_is_orthogonal():
    a = symmetric(list(np.linspace(-3, 5, 80)), 0)
    one, two = lanczos(lambda v: a @ v, start(80), 12), two_pass_lanczos(lambda v: a @ v, start(80), 12)
    check(two, a)
    assert two.method == "two-pass"
    assert two.orthogonality < 1e-8
    assert np.allclose(one.ritz_values, two.ritz_values, rtol=1e-9)
    assert np.allclose(one.residuals, two.residuals, atol=1e-8)
    assert torch.allclose(one.ritz_vector(-1), two.ritz_vector(-1), atol=1e-7)


def test_ghosts_are_removed_and_their_weight_is_given_to_what_they_copied():
    eigenvalues = [*np.linspace(0, 1, 96), 20.0, 50.0, 100.0, -40.0]
    a, v = symmetric(eigenvalues, 0), start(100)
    s = two_pass_lanczos(lambda x: a @ x, v, 80)
    assert s.products == 80
    assert s.orthogonality > 0.01  # it was lost, and is reported
    assert len(s.ritz_values) < 80  # there were copies
    for true in (100.0, 50.0, 20.0, -40.0):
        assert (np.abs(s.ritz_values - true) < 1e-6).sum() == 1
    assert count_below(s, -0.5) == 1
    rayleigh = float(v @ a @ v / (v @ v))  # the quadrature's first moment is exact
    assert abs(s.weights @ s.ritz_values - rayleigh) < 1e-9 * 100
    full = lanczos(lambda x: a @ x, v, 80)
    assert np.allclose(s.weights[[0, -1]], full.weights[[0, -1]], rtol=1e-6)


def test_as_many_steps_as_dimensions_exhaust_a_space_only_if_nothing_is_left():
    a = symmetric([*np.linspace(0, 1, 58), 1e4, -1e4], 0)
    s = two_pass_lanczos(lambda v: a @ v, start(60), 60)  # the ghosts of two outliers took the place of other eigenvalues
    true = torch.linalg.eigvalsh(a).numpy()
    assert (np.abs(true[None] - s.ritz_values[:, None]).min(1) <= s.residuals + 1e-10 * 1e4).all()
    assert not s.exhausted
    assert two_pass_lanczos(lambda v: 2 * v, start(1), 1).exhausted
    assert two_pass_lanczos(lambda v: torch.tensor([1.0, 2.0]).double() * v, start(2), 2).exhausted


def test_questions_end_two_passes_early_and_vectors_cost_a_second_pass():
    a, products = symmetric([-50.0, *np.linspace(0, 1, 60), 100.0], 0), []
    s = two_pass_lanczos(lambda v: products.append(1) or a @ v, start(62), 60, until=top(1e-3))
    assert len(products) == s.products < 20
    assert abs(s.ritz_values[-1] - 100) < 1e-3 * 100
    s.ritz_vector(-1)
    assert len(products) == 2 * s.products - 1


# ---- memory and synchronisations


@pytest.mark.parametrize(("name", "count"), [("full", 1), ("two-pass", 1), ("block", 1)])
def test_runs_without_a_question_wait_for_the_device_once(name, count, as_on_a_device):
    a, v = symmetric(list(range(1, 31)), 0), start(30)
    with Transfers() as transfers, Scalars() as scalars:
        VARIANTS[name](lambda x: a @ x, v, 20)
    assert (transfers.count, scalars.count) == (count, 0)


@pytest.mark.parametrize(("n", "dtype"), [(1 << 14, torch.float64), pytest.param(1 << 22, torch.float32, id="four million")])
def test_variants_hold_as_many_vectors_as_they_say(n, dtype):
    d, v = torch.linspace(-1, 3, n, dtype=dtype), start(n, dtype=dtype)
    m = 12 if dtype == torch.float64 else 4
    unit, slack = n * v.element_size(), 20 * 2**20 if dtype == torch.float32 else 0.1 * n * 8  # pieces are widened

    def peak(run):
        with LiveBytes() as memory:
            out = run()
        return out, (memory.peak - slack) / unit

    assert peak(lambda: lanczos(lambda x: d * x, v, m))[1] <= m + 4
    two, vectors = peak(lambda: two_pass_lanczos(lambda x: d * x, v, m))
    assert vectors <= 4  # five with the start
    assert peak(lambda: two.ritz_vector(-1))[1] <= 4
    if dtype == torch.float64:
        assert peak(lambda: block_lanczos(lambda x: d * x, torch.stack([v, -v + 1]), 4))[1] <= 5 * 2 + 4 + 2
    else:
        assert peak(lambda: lanczos(lambda x: d * x, v, m, dtype=torch.float16))[1] <= m / 2 + 4
        assert peak(lambda: thick_restart_lanczos(lambda x: d * x, v, 8, 4))[1] <= 4 + 4


def test_each_rung_of_the_memory_ladder_is_chosen_as_documented():
    a, n, unit = symmetric(list(np.linspace(-1, 4, 64)), 0), 64, 64 * 8
    cases = (
        (None, "full"), (24 * unit, "full"), (24 * unit - 1, "half"), (9 * unit, "half"), (9 * unit - 1, "two-pass"),
        (5 * unit, "two-pass"),
    )  # fmt: skip
    for memory, method in cases:
        s = lanczos_within(memory, lambda v: a @ v, start(n), 20)
        assert s.method == method, memory
        assert abs(s.ritz_values[-1] - 4) <= s.residuals[-1] + 1e-9
    many = lanczos_within(12 * unit, lambda v: a @ v, start(n), 60)  # half of 60 vectors does not fit, eight do
    assert many.method == "restarted"
    assert many.products == 60
    assert many.coefficients.shape[0] <= 8
    assert lanczos_within(12 * unit - 1, lambda v: a @ v, start(n), 60).method == "two-pass"
    with pytest.raises(ValueError, match=r"at least five vectors of 64 entries, 2560 bytes.*one layer"):
        lanczos_within(5 * unit - 1, lambda v: a @ v, start(n), 20)
    early = lanczos_within(5 * unit, lambda v: a @ v, start(n), 60, until=top(0.05))
    assert early.products < 60


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_little_memory_on_a_device_keeps_the_basis_on_the_host():
    d = torch.linspace(-1, 4, 64, dtype=torch.float64, device="cuda")
    s = lanczos_within(10 * 64 * 8, lambda v: d * v, start(64, device="cuda"), 20)
    assert s.method == "host"
    assert s.ritz_vector(-1).device.type == "cuda"


# ---- rounded bases


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("dtype", "lost"), [(torch.float16, 2e-3), (torch.bfloat16, 2e-2)])
def test_half_precision_bases_report_what_they_lost_and_keep_the_ends_within_bounds(dtype, lost, device):
    d = torch.cat([torch.linspace(0, 1, 4990), torch.linspace(5, 60, 10)]).to(device)
    exact = lanczos(lambda v: d * v, start(5000, dtype=torch.float32, device=device), 40)
    s = lanczos(lambda v: d * v, start(5000, dtype=torch.float32, device=device), 40, dtype=dtype)
    assert s.method == "half"
    assert exact.orthogonality < 1e-5 < s.orthogonality < lost
    assert (np.abs(d.cpu().numpy()[None] - s.ritz_values[:, None]).min(1) <= s.residuals * (1 + lost) + 1e-4).all()
    assert abs(s.ritz_values[-1] - 60) < 1e-4 * 60
    y = s.ritz_vector(-1)
    assert y.dtype == torch.float32
    assert abs(y.norm() - 1) < 2 * lost


def test_half_precision_rows_hold_vectors_of_few_and_of_many_entries():
    n = 1 << 18
    few = torch.zeros(n)
    few[7] = 1.0
    many = torch.full((n,), n**-0.5)  # 0.002: float16 has ten digits of it, unscaled too few of smaller ones
    for dtype in (torch.float16, torch.bfloat16):
        basis = Basis(2, few, dtype)
        for q in (few, many):
            basis.append(q)
        assert torch.allclose(basis.combine(torch.tensor([1.0, 0.0])), few, atol=1e-6)
        assert torch.allclose(basis.dots(many), torch.tensor([n**-0.5, 1.0]).double(), rtol=1e-2)


def test_restarts_of_a_rounded_basis_keep_their_bounds():
    a = symmetric([-30.0, *np.linspace(-10, 20, 100), 35.0], 0)
    true = torch.linalg.eigvalsh(a).numpy()
    for dtype in (torch.float16, torch.bfloat16):
        s = thick_restart_lanczos(lambda v: a @ v, start(102), 60, 8, dtype=dtype)
        assert (np.abs(true[None] - s.ritz_values[:, None]).min(1) <= s.residuals + 1e-9).all()
        assert s.residuals[-1] < 1.0


def test_as_many_steps_as_dimensions_in_half_precision_are_not_called_exact():
    a = symmetric(list(np.linspace(-3, 5, 24)), 0)
    s = lanczos(lambda v: a @ v, start(24), 24, dtype=torch.bfloat16)
    true = torch.linalg.eigvalsh(a).numpy()
    assert (np.abs(true[None] - s.ritz_values[:, None]).min(1) <= s.residuals + 1e-9).all()


def test_another_device_or_dtype_of_the_basis_than_the_runs_gives_the_same_numbers():
    a = symmetric(list(np.linspace(-3, 5, 40)), 0)
    one = lanczos(lambda v: a @ v, start(40), 15)
    same = lanczos(lambda v: a @ v, start(40), 15, device="cpu", dtype=torch.float64)
    assert np.array_equal(one.ritz_values, same.ritz_values)
    assert same.method == "full"


@settings(max_examples=40, deadline=None)
@given(st.integers(2, 12), st.lists(st.sampled_from(["random", "inside", "zero", "nearly"]), min_size=2, max_size=12))
def test_a_basis_grows_orthonormal_by_whatever_it_is_given(n, kinds):
    basis = Basis(min(n, len(kinds)), start(n))
    for i, kind in enumerate(kinds[: len(basis.rows)]):
        inside = basis.combine(torch.ones(i, dtype=torch.float64)) if i else torch.zeros(n, dtype=torch.float64)
        y = {"random": start(n, i), "inside": inside, "zero": 0 * inside, "nearly": inside + 1e-13 * start(n, i)}[kind]
        c, length = extend(basis, y)
        rebuilt = basis.combine(torch.cat([c, length[None]]))
        assert (rebuilt - y).norm() <= 1e-14 * (1 + y.norm())
    assert basis.orthogonality() < 1e-13


# ---- eigenpairs


@pytest.mark.parametrize("memory", [None, 20 * 200 * 8, 5 * 200 * 8])
def test_the_largest_eigenpairs_are_found_in_any_memory_and_all_products_counted(memory):
    a, products = symmetric([*np.linspace(-1, 1, 196), 5.0, 8.0, 13.0, 21.0], 0), []
    found = top_eigenpairs(lambda v: products.append(1) or a @ v, start(200), 3, 1e-6, memory=memory)
    assert found.converged
    assert np.allclose(found.values, [21, 13, 8], rtol=1e-6)
    assert found.products == len(products)
    residuals = (found.vectors @ a - torch.as_tensor(found.values)[:, None] * found.vectors).norm(dim=1).numpy()
    assert (residuals <= found.residuals + 1e-9).all()
    assert ((found.vectors.norm(dim=1) - 1).abs() < 1e-6).all()


def test_eigenpairs_that_cannot_be_had_are_refused_or_not_called_converged():
    a = symmetric(list(np.linspace(-1, 1, 100)), 0)
    assert not top_eigenpairs(lambda v: a @ v, start(100), 5, 1e-8, max_steps=8).converged
    double = symmetric([*[0.5] * 20, 3.0, 3.0], 0)
    found = top_eigenpairs(lambda v: double @ v, start(22), 2, 1e-6)  # one copy of each
    assert np.allclose(found.values, [3.0, 0.5])
    alone = top_eigenpairs(lambda v: 2 * v, start(5), 3)
    assert (len(alone.values), alone.converged) == (1, False)
    for count in (0, 6):
        with pytest.raises(ValueError, match="from 1 to 5"):
            top_eigenpairs(lambda v: v, start(5), count)


# ---- questions


@pytest.mark.parametrize(("lowest", "answer"), [(-5.0, True), (-0.02, False), (0.0, False), (-120.0, True)])
def test_whether_the_least_eigenvalue_is_negative_enough_is_answered_both_ways_before_it_is_known(lowest, answer):
    a = symmetric([lowest, *np.linspace(0.5, 1, 60), 100.0], 0)
    for seed in range(10):
        s = lanczos(lambda v: a @ v, start(62, seed), 60, until=negative_below(0.01))
        assert is_below(s, 0.01) is answer
        assert s.products < 15


def test_a_question_that_was_not_answered_has_no_answer():
    a = symmetric(list(np.linspace(-1, 1, 60)), 0)
    s = lanczos(lambda v: a @ v, start(60), 2)
    assert is_below(s, 0.99999 * abs(s.ritz_values[0]) / s.epsilon) is None


def test_questions_about_the_ends_are_kept_to_what_they_ask():
    a = symmetric([-3.0, *np.linspace(-1, 40, 80), 100.0], 0)
    for question, ok in (
        (top(1e-4), lambda s: s.residuals[-1] <= 1e-4 * 100),
        (ends(1e-2, 0.1), lambda s: s.residuals[-1] <= 1.0 and s.residuals[0] <= 0.3 + 1e-3),
        (ends(1e-2, 0.1, 0.05), lambda s: s.residuals[0] <= 5.0),
        (largest(2, 1e-3), lambda s: (s.residuals[-2:] <= 1e-3 * s.ritz_values[-2:]).all()),
    ):
        s = lanczos(lambda v: a @ v, start(82), 82, until=question)
        assert s.products < 82
        assert question(s) <= 1
        assert ok(s)


def test_questions_about_zeros_are_answered_without_a_warning():
    zero = lanczos(lambda v: 0 * v, start(6), 6, until=ends(1e-3))
    assert zero.products <= 3
    assert is_below(zero, 0.1) is False
    swap = torch.tensor([[0.0, 5.0], [5.0, 0.0]], dtype=torch.float64)
    first = lanczos(lambda v: swap @ v, torch.tensor([1.0, 0.0], dtype=torch.float64), 1)
    for question in (top(1e-3), ends(1e-3), negative_below(0.1), largest(2, 0.1)):
        assert question(first) > 1  # a Ritz value of 0 with a residual of 5


@given(st.integers(0, 200), st.floats(1, allow_infinity=True), st.floats() | st.just(np.inf))
def test_the_next_look_is_two_to_four_steps_on(step, excess, before):
    ahead = next_look(step, excess, before) - step
    assert ahead == 3 if step == 0 else 2 <= ahead <= 4


# ---- probable ends


@pytest.mark.parametrize("variant", ["full", "block of two", "restarted"])
def test_no_eigenvalue_lies_outside_of_the_outer_ends_but_as_often_as_allowed(variant):
    eigenvalues = np.r_[np.linspace(0, 1, 298), 1.05, -0.05]  # ends that a few steps miss
    d, outside, finite, failure = torch.tensor(eigenvalues), 0, 0, 0.1
    for seed in range(100):
        if variant == "full":
            s = lanczos(lambda v: d * v, start(300, seed), 9)
        elif variant == "restarted":
            s = thick_restart_lanczos(lambda v: d * v, start(300, seed), 12, 9)
        else:
            s = block_lanczos(lambda v: d * v, block(2, 300, seed), 9)
        low, high = outer_ends(s, failure)
        finite += np.isfinite(high)
        outside += (low > eigenvalues.min()) + (high < eigenvalues.max())
    assert finite == 100
    assert outside <= 2 * 100 * failure
    assert s.ritz_values[-1] < 1.05 - 1e-3  # there was something to miss


def test_the_outer_ends_of_short_runs_are_infinite_and_of_exhausted_ones_the_ritz_values():
    d = torch.linspace(0, 1, 300, dtype=torch.float64)
    assert outer_ends(lanczos(lambda v: d * v, start(300), 3)) == (-np.inf, np.inf)
    block_of_many = block_lanczos(lambda v: d * v, block(10, 300), 3)  # thirty products, but the polynomials are of degree two
    assert outer_ends(block_of_many) == (-np.inf, np.inf)
    low, high = outer_ends(lanczos(lambda v: 3 * v, start(300), 5))
    assert (low, high) == pytest.approx((3, 3))


# ---- traps


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_negative_dominant_eigenvalue_is_found_with_its_sign(variant):
    a = symmetric([-100.0, *np.linspace(-1, 1, 40), 30.0], 0)
    s = VARIANTS[variant](lambda v: a @ v, start(42), 30)
    assert np.allclose(s.ritz_values[[0, -1]], [-100, 30], atol=1e-6)
    assert s.epsilon == pytest.approx(100)


@pytest.mark.parametrize("variant", VARIANTS)
def test_ends_of_nearly_the_same_magnitude_do_not_mix(variant):
    a = symmetric([-100.0, *np.linspace(-1, 1, 40), 100.0001], 0)
    s = VARIANTS[variant](lambda v: a @ v, start(42), 20)
    assert np.allclose(s.ritz_values[[0, -1]], [-100, 100.0001], atol=1e-8)
    assert abs(abs(a @ s.ritz_vector(-1)).norm() - 100.0001) < 1e-6


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_zero_operator_and_one_dimension_are_exhausted_after_a_step(variant):
    zero = VARIANTS[variant](lambda v: 0 * v, start(20), 10)
    assert zero.exhausted
    assert np.array_equal(zero.ritz_values[[0, -1]], [0, 0])
    assert zero.residuals.max() == 0
    one = VARIANTS[variant](lambda v: -7 * v, start(1), 10)
    assert one.exhausted
    assert one.ritz_values == pytest.approx([-7])
    assert one.ritz_vector(0).abs().item() == pytest.approx(1)
    assert one.products == 1


@pytest.mark.parametrize("variant", VARIANTS)
def test_more_steps_than_dimensions_are_as_many(variant):
    a = symmetric([1.0, -2.0, 5.0], 0)
    s = VARIANTS[variant](lambda v: a @ v, start(3), 50)
    assert s.products <= 3
    assert np.allclose(s.ritz_values, [-2, 1, 5])
    assert s.residuals.max() < 1e-12


@pytest.mark.parametrize("after", [0, 3, 6, 7, 11])
@pytest.mark.parametrize("variant", VARIANTS)
def test_a_product_that_is_not_finite_ends_the_run_with_what_was_known(variant, after):
    a, calls = symmetric(list(np.linspace(-3, 5, 40)), 0), []

    def late(v):
        calls.append(1)
        return a @ v * (float("nan") if len(calls) == after + 1 else 1.0)

    if after == 0:
        with pytest.raises(FloatingPointError, match="not finite"):
            VARIANTS[variant](late, start(40), 20)
        return
    s = VARIANTS[variant](late, start(40), 20)
    true = torch.linalg.eigvalsh(a).numpy()
    assert np.isfinite(s.ritz_values).all()
    assert np.isfinite(s.residuals).all()
    assert (np.abs(true[None] - s.ritz_values[:, None]).min(1) <= s.residuals + 1e-10).all()
    assert len(s.ritz_values) == {"restarted": {3: 3, 6: 3, 7: 4, 11: 5}[after]}.get(variant, after)
    assert not s.exhausted


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_run_that_waits_for_an_answer_does_not_wait_behind_a_nan(variant):
    if variant == "block":
        return
    calls = []

    def late(v):
        calls.append(1)
        return torch.linspace(-1, 1, 40).double() * v * (float("nan") if len(calls) == 5 else 1.0)

    run = {"full": lanczos, "two-pass": two_pass_lanczos}.get(variant, lambda f, v, k, until: VARIANTS[variant](f, v, k))
    run(late, start(40), 40, until=top(1e-12))
    assert len(calls) < 12


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_bulk_that_is_small_beside_an_outlier_is_no_rounding_at_many_parameters(variant):
    n = 1 << 18
    d = torch.linspace(-0.05, 0.05, n)
    d[0] = 1000.0  # the steps after it are of size 0.025: below sqrt(n) eps of it, far above eps
    s = VARIANTS[variant](lambda v: d * v, start(n, dtype=torch.float32), 12)
    assert not s.exhausted
    assert s.products == 12
    assert s.ritz_values[0] < -0.03


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_start_of_zeros_is_refused(variant):
    with pytest.raises(FloatingPointError):
        VARIANTS[variant](lambda v: 2 * v, torch.zeros(9, dtype=torch.float64), 4)


@pytest.mark.parametrize("variant", VARIANTS)
def test_operators_may_return_what_they_were_given(variant):
    s = VARIANTS[variant](lambda v: v, start(9), 4)
    assert s.exhausted
    assert np.allclose(s.ritz_values, 1)

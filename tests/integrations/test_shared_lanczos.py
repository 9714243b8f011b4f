"""Lanczos vectors dealt out over processes: the numbers of one process, in a share of the memory."""

import pytest
import test_fsdp
import torch
from oracles import LiveBytes
from test_ddp import Run, close
from torch.distributed import group

from adaptive_opt import ConstantPolicy, LanczosProbe
from adaptive_opt.curvature import lanczos, lanczos_within, shared_lanczos, top
from adaptive_opt.parallel import Team


def problem(n):
    torch.manual_seed(0)
    d = torch.cat([torch.linspace(-1, 3, n - 1, dtype=torch.float64), torch.tensor([4.0], dtype=torch.float64)])
    return d, torch.randn(n, dtype=torch.float64)


def numbers(n, steps, until=None):
    d, start = problem(n)
    team = Team(group.WORLD)
    s = shared_lanczos(lambda v: d * v, start, steps, team.shares(start), until=until)
    assert s.method == "shared"
    assert s.vectors.orthogonality() < 1e-12
    return s.ritz_values, s.residuals, s.ritz_vector(-1), s.products, s.dim, s.exhausted


@pytest.mark.parametrize(("n", "steps"), [(101, 20), (7, 7), (2, 5)])
def test_the_numbers_are_those_of_one_process(two, n, steps):
    d, start = problem(n)
    one = lanczos(lambda v: d * v, start, steps)
    first, second = two.run(numbers, n, steps)
    for mine, other in zip(first, second, strict=True):
        assert torch.equal(torch.as_tensor(mine), torch.as_tensor(other))
    assert first[0] == pytest.approx(one.ritz_values, abs=1e-12)
    assert first[1] == pytest.approx(one.residuals, abs=1e-10)
    assert abs(torch.dot(first[2], one.ritz_vector(-1))) == pytest.approx(1, abs=1e-9)
    assert first[3:] == (one.products, one.dim, one.exhausted)


def asked(n, steps):
    return numbers(n, steps, top(1e-3))


def test_a_question_ends_it_as_early_on_all(two):
    d, start = problem(300)
    one = lanczos(lambda v: d * v, start, 100, until=top(1e-3))
    assert [run[3] for run in two.run(asked, 300, 100)] == [one.products] * 2


def held(n, steps, memory):
    """The method, and the most vectors of n entries that were alive at once, beside the start and the operator's."""
    start, d, team = torch.randn(n), torch.linspace(-1, 3, n), Team(group.WORLD)
    with LiveBytes() as live:
        s = lanczos_within(memory, lambda v: d * v, start, steps, shares=team.shares(start))
    return s.method, live.peak / (4 * n)


def test_each_process_holds_its_share_where_the_whole_basis_does_not_fit(two):
    n, steps = 1 << 16, 40
    assert {method for method, _ in two.run(held, n, steps, None)} == {"full"}
    whole, shared = (steps + 4) * n * 4, (steps + 1) * n * 2 + 5 * n * 4
    assert {method for method, _ in two.run(held, n, steps, whole - 1)} == {"shared"}
    assert {method for method, _ in two.run(held, n, steps, shared - 1)} == {"half"}
    for _, vectors in two.run(held, n, steps, shared):
        assert vectors <= (steps + 1) / 2 + 5.1  # small ones, too


def measured(memory):
    probe = LanczosProbe(every=4, num_steps=8, memory=memory, backend="exact_rebuilt")
    return Run("mlp", "adamw", 9, probe=probe, policy=ConstantPolicy("base")).train().outcome()


def test_a_reading_with_shared_vectors_is_the_reading_of_whole_ones(two):
    n = sum(p.numel() for p in Run("mlp", "adamw", 1, bare=True).problem.model.parameters())
    whole, shared = two.run(measured, None), two.run(measured, (8 + 4) * n * 4 - 1)
    assert shared[0]["readings"] == shared[1]["readings"]
    assert len(shared[0]["readings"]) == 3
    for a, b in zip(_but_time(whole[0]), _but_time(shared[0]), strict=True):
        assert (a.pop("method"), b.pop("method")) == ("full", "shared")
        assert close(a, b, 1e-3)
    for a, b in zip(whole[0]["params"], shared[0]["params"], strict=True):
        assert torch.equal(a, b)


def of_shards(memory):
    probe = LanczosProbe(every=4, num_steps=8, memory=memory, backend="exact_rebuilt")
    return test_fsdp.Run("mlp", "adamw", 5, probe=probe).train().outcome()


def test_the_vectors_of_sharded_parameters_are_dealt_out_too(two):
    n = sum(p.numel() for p in Run("mlp", "adamw", 1, bare=True).problem.model.parameters())
    whole, shared = two.run(of_shards, None), two.run(of_shards, (8 + 4) * n * 4 - 1)
    assert shared[0]["readings"] == shared[1]["readings"]
    for a, b in zip(_but_time(whole[0]), _but_time(shared[0]), strict=True):
        assert (a.pop("method"), b.pop("method")) == ("full", "shared")
        assert close(a, b, 1e-3)


def _but_time(outcome):
    return [{k: v for k, v in reading.items() if k != "seconds"} for reading in outcome["readings"]]

"""scripts/bench_modes.py: every workload and every arm runs; the long runs are the script's own."""

import math

import pytest
import torch

from scripts import bench_modes as bench

WORKLOADS = {"poisson": bench.poisson, "autoencoder": bench.autoencoder, "gpt": bench.gpt, "noise": bench.noise}


@pytest.mark.parametrize("name", WORKLOADS)
def test_a_workload_trains_and_has_a_score(name):
    if name == "noise":
        pytest.importorskip("mnist1d")
    w = WORKLOADS[name](0)
    optimizer = bench.ARMS["AdamW"](w, 1e-3)
    losses = [bench.one_step(w, optimizer) for _ in range(2)]
    assert all(map(math.isfinite, [*losses, w.score()]))


@pytest.mark.parametrize("arm", bench.ARMS)
def test_an_arm_takes_steps(arm):
    if "peer" in arm:
        pytest.importorskip("pytorch_optimizer")
    w = bench.autoencoder(0)
    optimizer = bench.ARMS[arm](w, 1e-4)
    before = [p.detach().clone() for p in w.model.parameters()]
    for _ in range(12):  # the peer's Shampoo moves nothing before its first preconditioner
        bench.one_step(w, optimizer)
    assert all(torch.isfinite(p).all() and not torch.equal(p, b) for p, b in zip(w.model.parameters(), before, strict=True))

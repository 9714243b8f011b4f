"""FSDP2 on gloo: training, readings of the whole model, checkpoints that another number of processes reads."""

from __future__ import annotations

from dataclasses import asdict
from itertools import pairwise

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from problems import BASES, make
from ranks import Ranks
from test_ddp import close, mine
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, MixedPrecisionPolicy, fully_shard

from adaptive_opt import AdaptiveOptimizer, ConstantPolicy, LanczosProbe, RulePolicy
from adaptive_opt.integrations.checkpoint import OptimizerState


@pytest.fixture(scope="module")
def alone():
    ranks = Ranks(1)
    yield ranks
    ranks.close()


class Run:
    """A training run, whole on a process on its own or sharded over the ranks."""

    def __init__(self, name, base, batches, *, lr=1.0, bare=False, policy=None, sharding=None, sharded=True, **kwargs):
        self.problem = problem = make(name, batches)
        if dist.is_initialized() and sharded:
            for child in problem.model.children():
                if any(True for _ in child.parameters()):
                    fully_shard(child, **(sharding or {}))
            fully_shard(problem.model, **(sharding or {}))
        self.base = BASES[base](problem.model.parameters())
        for group in self.base.param_groups:
            group["lr"] *= lr
        self.reports = []
        kwargs = {"probe": LanczosProbe(every=4, num_steps=5), "sinks": [self.reports.append], **kwargs}
        self.optimizer = self.base
        if not bare:
            self.optimizer = AdaptiveOptimizer(
                self.base, problem.model, loss_fn=problem.criterion, policy=policy or ConstantPolicy("base"), **kwargs
            )

    def train(self, batches=None, change=lambda step, batch: batch):
        for step, batch in enumerate(self.problem.batches if batches is None else batches):
            x, y = change(step, batch)
            self.optimizer.zero_grad()
            self.problem.criterion(self.problem.model(mine(x)), mine(y)).backward()
            self.optimizer.step()
        return self

    def params(self):
        return [p.full_tensor().detach() if hasattr(p, "full_tensor") else p.detach().clone() for p in self.base_params()]

    def base_params(self):
        return [p for group in self.base.param_groups for p in group["params"]]

    def outcome(self):
        return {
            "params": self.params(),
            "readings": [asdict(r.reading) for r in self.reports if r.reading is not None],
            "losses": [r.loss for r in self.reports],
            "events": [e.sentence() for r in self.reports for e in r.events],
            "taken": [(r.mode, r.stepped, r.lr_scale) for r in self.reports],
            "why": self.optimizer.control.gate.distrust,
        }


def run(name, base, batches, kwargs):
    return Run(name, base, batches, **kwargs).train().outcome()


def same_run(one, ranks, tolerance=2e-4, atol=1e-5):
    for rank in ranks:
        assert rank["why"] == ""
        for key in ("losses", "events", "taken", "readings"):
            assert rank[key] == ranks[0][key], key
        for a, b in zip(one["params"], rank["params"], strict=True):
            torch.testing.assert_close(a, b, rtol=tolerance, atol=atol)
        assert close(one["taken"], rank["taken"], tolerance)
        assert close(one["losses"], rank["losses"], tolerance)
        assert len(one["readings"]) == len(rank["readings"]) > 0
        for a, b in zip(one["readings"], rank["readings"], strict=True):
            for key in a.keys() - {"seconds", "notes"}:
                assert close(a[key], b[key], 5 * tolerance), (key, a[key], b[key])


@pytest.mark.parametrize("base", ["adamw", "sgd"])
def test_two_shards_read_and_step_as_one_process(two, base):
    one = run("mlp", base, 9, {})
    ranks = two.run(run, "mlp", base, 9, {})
    same_run(one, ranks)
    assert {r["backend"] for r in ranks[0]["readings"]} == {"exact"}


@pytest.mark.parametrize("mode", ["sam", "sgd"])
def test_modes_step_as_one(two, mode):
    kwargs = {"policy": ConstantPolicy(mode)}
    same_run(run("mlp", "adamw", 24, kwargs), two.run(run, "mlp", "adamw", 24, kwargs), tolerance=1e-3)


def test_finite_differences_move_the_lent_parameters(two):
    kwargs = {"probe": LanczosProbe(every=4, num_steps=3, backend="finite_difference", lipschitz=False)}
    one, ranks = run("mlp", "sgd", 5, kwargs), two.run(run, "mlp", "sgd", 5, kwargs)
    for a, b in zip(one["readings"], ranks[0]["readings"], strict=True):
        assert b["backend"] == "finite_difference"
        assert a["lambda_max"] == pytest.approx(b["lambda_max"], rel=0.1)


def test_a_sick_run_is_treated_as_one(two):
    kwargs = {"lr": 1000.0, "probe": LanczosProbe(overhead=0.3, price=1.0, num_steps=5), "policy": RulePolicy()}
    one, ranks = run("mlp", "adamw", 60, kwargs), two.run(run, "mlp", "adamw", 60, kwargs)
    assert "holding the learning rate" in one["events"][0]
    same_run(one, ranks, tolerance=1e-3, atol=1e-4)  # the held length follows looks ahead, differences of float32 losses


def bare_and_probed(name):
    torch.manual_seed(dist.get_rank())
    bare = Run(name, "adamw", 8, bare=True).train()
    torch.manual_seed(dist.get_rank())
    probed = Run(name, "adamw", 8).train()
    assert len(probed.outcome()["readings"]) == 2
    assert probed.optimizer.control.gate.trusted is True
    for a, b in zip(bare.params(), probed.params(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("name", ["cnn", "transformer"])
def test_a_probed_constant_run_equals_the_bare_one_bit_for_bit(two, name):
    two.run(bare_and_probed, name)


def rolls_back():
    """Batches broken in a row: back to a snapshot of shards."""
    state = Run("mlp", "adamw", 40, policy=RulePolicy())
    state.train(change=lambda step, batch: (batch[0] * float("nan"), batch[1]) if step in (30, 31, 32) else batch)
    return state.outcome()


def test_a_snapshot_of_shards_is_restored(two):
    first, second = two.run(rolls_back)
    assert any("went back to the parameters of step" in words for words in first["events"]), first["events"]
    assert first["events"] == second["events"]
    assert all(torch.isfinite(p).all() for p in first["params"])


def kfac_refused():
    with pytest.raises(ValueError, match=r"kfac needs whole matrices .* shards of them \(FSDP2\)"):
        Run("mlp", "adamw", 1, policy=ConstantPolicy("kfac"))
    assert "kfac" not in Run("mlp", "adamw", 1, policy=RulePolicy()).optimizer.control.available  # the rules do without


def fsdp1_refused():
    older = FullyShardedDataParallel(make("mlp", 1).model, device_id=torch.device("cpu"))
    base = torch.optim.SGD(older.parameters(), lr=0.1)
    with pytest.raises(ValueError, match=r"shard the model by torch.distributed.fsdp.fully_shard"):
        AdaptiveOptimizer(base, older, loss_fn=torch.nn.CrossEntropyLoss())


def mixed_precision_refused():
    with pytest.warns(UserWarning, match=r"MixedPrecisionPolicy\(param_dtype=torch.bfloat16\)"):
        run = Run("mlp", "adamw", 2, sharding={"mp_policy": MixedPrecisionPolicy(param_dtype=torch.bfloat16)}).train()
    assert run.outcome()["readings"] == []


@pytest.mark.parametrize("refused", [kfac_refused, fsdp1_refused, mixed_precision_refused])
def test_what_cannot_run_is_refused_by_name(two, refused):
    two.run(refused)


def hybrid():
    """Replicated over two, sharded over two."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard"))
    return Run("mlp", "adamw", 5, sharding={"mesh": mesh}).train().outcome()


def test_hybrid_sharding():
    four = Ranks(4)
    try:
        same_run(run("mlp", "adamw", 5, {}), four.run(hybrid))
    finally:
        four.close()


def saved(path, half):
    """Trains, saves in the middle, goes on; what it ends in."""
    state = Run("mlp", "adamw", 12, policy=RulePolicy())
    state.train(state.problem.batches[:half])
    dcp.save(parts(state), checkpoint_id=path)
    return state.train(state.problem.batches[half:]).outcome()


def resumed(path, half, sharding=True):
    state = Run("mlp", "adamw", 12, policy=RulePolicy(), sharded=sharding)
    dcp.load(parts(state), checkpoint_id=path)
    assert state.optimizer.steps == half
    return state.train(state.problem.batches[half:]).outcome()


def parts(state):
    return {"model": state.problem.model, "optimizer": OptimizerState(state.problem.model, state.optimizer)}


def test_a_checkpoint_of_two_shards_goes_on_in_two_and_in_one(two, alone, tmp_path):
    path = str(tmp_path / "checkpoint")
    whole = two.run(saved, path, 7)[0]
    again = two.run(resumed, path, 7)[0]
    for a, b in zip(whole["params"], again["params"], strict=True):
        assert torch.equal(a, b)
    for sharding in (True, False):  # one process with FSDP2, and one without
        (one,) = alone.run(resumed, path, 7, sharding)
        for a, b in zip(whole["params"], one["params"], strict=True):
            torch.testing.assert_close(a, b, rtol=2e-4, atol=1e-5)
        assert close(whole["readings"][-1]["lambda_max"], one["readings"][-1]["lambda_max"], 1e-3)


def treated(treatment):
    """A deep linear net of tiny weights (a saddle), or a layer that has shrunk; only this treatment is allowed."""
    torch.manual_seed(0)
    sizes = (6, 6, 6, 6)
    whole = nn.Sequential(*(nn.Linear(a, b, bias=False) for a, b in pairwise(sizes)))
    with torch.no_grad():
        for p in whole.parameters():
            p.mul_(0.03)
    x = torch.randn(32, 6)
    y = x @ torch.randn(6, 6)
    if dist.is_initialized():
        for layer in whole:
            fully_shard(layer)
        fully_shard(whole)
    criterion, reports = nn.MSELoss(), []
    optimizer = AdaptiveOptimizer(
        torch.optim.SGD(whole.parameters(), lr=1e-3, momentum=0.5),
        whole,
        loss_fn=criterion,
        probe=LanczosProbe(overhead=1.0, price=1.0),
        policy=ConstantPolicy("base", (treatment,)),
        sinks=[reports.append],
    )
    for _ in range(60):
        optimizer.zero_grad()
        criterion(whole(mine(x)), mine(y)).backward()
        optimizer.step()
    events = [e for r in reports for e in r.events]
    params = [p.full_tensor().detach() if hasattr(p, "full_tensor") else p.detach() for p in whole.parameters()]
    assert optimizer.control.gate.distrust == ""
    return [e.sentence() for e in events], [(e.step, e.name, e.outcome) for e in events], reports[-1].loss, params


@pytest.mark.parametrize("treatment", ["escape", "spectral"])
def test_treatments_move_the_shards_as_they_move_the_whole(two, treatment):
    _, events, loss, params = treated(treatment)
    (words, seen, loss_a, a), (others, _, loss_b, b) = two.run(treated, treatment)
    assert {name for _, name, _ in events} == {treatment}
    assert "pending" in {outcome for _, _, outcome in events}  # it found something to do
    assert words == others
    assert seen == events
    assert loss_a == loss_b == pytest.approx(loss, rel=1e-3)
    for whole, mine_, other in zip(params, a, b, strict=True):
        assert torch.equal(mine_, other)
        torch.testing.assert_close(mine_, whole, rtol=2e-2, atol=2e-3)

"""Scaled and clipped gradients, several groups, frozen, sparse and complex parameters, fused and foreach bases."""

import pytest
import torch
from problems import CLASSES, make
from torch import nn
from torch.optim import SGD, AdamW, SparseAdam

from adaptive_opt import AdaptiveOptimizer, ConstantPolicy, LanczosProbe

PROBE = LanczosProbe(every=3, num_steps=3)


def wrap(base, problem, **kwargs):
    return AdaptiveOptimizer(base, problem.model, loss_fn=problem.criterion, **{"probe": PROBE, **kwargs})


def train(problem, optimizer, steps=None, before_step=lambda n: None):
    for n, (x, y) in enumerate(problem.batches[:steps]):
        optimizer.zero_grad()
        problem.criterion(problem.model(x), y).backward()
        before_step(n)
        optimizer.step()
    return [p.detach().clone() for p in problem.model.parameters()]


def losses(kind, problem, n):
    """One step's loss in pieces, so that their sum is what goes backward."""
    model, criterion = problem.model, problem.criterion
    if kind == "whole":
        return [criterion(model(problem.batches[n][0]), problem.batches[n][1])]
    if kind in ("each", "sum"):
        return [criterion(model(problem.batches[n][0]), problem.batches[n][1]).sum() / 32]
    return [criterion(model(x), y) / 3 for x, y in problem.batches[3 * n : 3 * n + 3]]


SCALED = [(kind, clip) for kind in ("whole", "thirds", "each", "sum") for clip in (None, 0.05)]
SCALED.remove(("sum", 0.05))  # known limit: scale, divisor and clipping are one product, nothing tells them apart


@pytest.mark.parametrize(("kind", "clip"), SCALED)
def test_under_a_gradient_scaler_everything_is_in_the_users_units(kind, clip):
    def run(scale):
        problem = make("mlp", 12)
        if kind in ("each", "sum"):
            problem.criterion = nn.CrossEntropyLoss(reduction={"each": "none", "sum": "sum"}[kind])
        optimizer = wrap(SGD(problem.model.parameters(), lr=0.1), problem, probe=LanczosProbe(every=1, num_steps=3))
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=2, enabled=scale)
        reports = []
        for n in range(4):
            optimizer.zero_grad()
            for loss in losses(kind, problem, n):
                scaler.scale(loss).backward()
            if clip is not None:
                scaler.unscale_(optimizer)
                nn.utils.clip_grad_norm_(problem.model.parameters(), clip)
            scaler.step(optimizer)
            scaler.update()
            reports.append(optimizer.report)
        return reports, optimizer

    (plain, _), (scaled, optimizer) = run(False), run(True)
    assert optimizer.control.gate.trusted is True
    assert optimizer.control.gate.clip_norm == (None if clip is None else pytest.approx(clip, rel=1e-3))
    for a, b in zip(plain, scaled, strict=True):
        assert b.loss == pytest.approx(a.loss, rel=1e-4)
        assert b.grad_norm == pytest.approx(a.grad_norm, rel=1e-4)
        for name in ("loss", "grad_norm", "stability", "epsilon"):
            assert getattr(b.reading, name) == pytest.approx(getattr(a.reading, name), rel=1e-3), name


def test_a_step_that_the_scaler_skips_is_no_step():
    problem = make("mlp", 3)
    optimizer = wrap(SGD(problem.model.parameters(), lr=0.1), problem, probe=LanczosProbe(every=1, num_steps=3))
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    for n, (x, y) in enumerate(problem.batches):
        optimizer.zero_grad()
        scaler.scale(problem.criterion(problem.model(x), y) * (float("inf") if n == 0 else 1)).backward()
        scaler.step(optimizer)
        scaler.update()
    assert optimizer.steps == 2
    assert optimizer.control.gate.trusted is True


@pytest.mark.parametrize("norm", [0.01, 1e6])
def test_clipping_by_norm_does_not_upset_the_gate_and_is_known(norm):
    problem = make("mlp", 6)
    optimizer = wrap(SGD(problem.model.parameters(), lr=0.1), problem)
    train(problem, optimizer, before_step=lambda n: nn.utils.clip_grad_norm_(problem.model.parameters(), norm))
    assert optimizer.control.gate.trusted is True
    assert optimizer.control.gate.clip_norm == (pytest.approx(norm, rel=1e-3) if norm < 1 else None)


KINDS = {
    "fused AdamW": lambda p: AdamW(p, lr=3e-3, fused=True),
    "fused SGD": lambda p: SGD(p, lr=0.05, momentum=0.9, fused=True),
    "foreach AdamW": lambda p: AdamW(p, lr=3e-3, foreach=True),
    "lr as tensor": lambda p: AdamW(p, lr=torch.tensor(3e-3)),
    "amsgrad": lambda p: AdamW(p, lr=3e-3, amsgrad=True),
    "Adafactor": lambda p: torch.optim.Adafactor(p),
    "Adadelta": lambda p: torch.optim.Adadelta(p),
    "maximize": lambda p: SGD(p, lr=-1e-2 + 2e-2, maximize=True),
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_probed_run_on_any_base_equals_the_bare_one(kind):
    def run(wrapped):
        problem = make("cnn", 10)
        optimizer = KINDS[kind](problem.model.parameters())
        if wrapped:
            optimizer = wrap(optimizer, problem, policy=ConstantPolicy("base"))
        return train(problem, optimizer), optimizer

    (bare, _), (probed, optimizer) = run(False), run(True)
    assert all(torch.equal(a, b) for a, b in zip(bare, probed, strict=True))
    assert optimizer.control.gate.trusted is True
    if kind in ("Adafactor", "maximize"):
        assert optimizer.reading.stability is None
        assert any("the coming step of" in note for note in optimizer.reading.notes)
    else:
        assert optimizer.reading.stability > 0


@pytest.mark.parametrize("mode", ["base", "kfac", "sam", "sgd"])
def test_frozen_layers_stay_and_join_when_they_are_unfrozen(mode):
    problem = make("mlp", 24)
    first, last = problem.model[0], problem.model[2]
    first.requires_grad_(False)
    base = AdamW([{"params": first.parameters(), "lr": 1e-3}, {"params": last.parameters(), "lr": 1e-2}])
    optimizer = wrap(base, problem, policy=ConstantPolicy(mode))
    kept = first.weight.clone()
    problem.batches, later = problem.batches[:12], problem.batches[12:]
    train(problem, optimizer)
    assert torch.equal(first.weight, kept)
    first.requires_grad_(True)
    problem.batches = later
    train(problem, optimizer)
    assert not torch.equal(first.weight, kept)
    assert optimizer.control.gate.trusted is True
    assert optimizer.report.mode == mode


def test_kfac_turns_every_moment_back_also_of_a_parameter_without_gradient():
    problem = make("mlp", 20)
    optimizer = wrap(AdamW(problem.model.parameters(), lr=1e-3), problem, policy=ConstantPolicy("kfac"))
    train(problem, optimizer)
    weight, kfac = problem.model[0].weight, optimizer.control.modes["kfac"]
    factors, moment = kfac._factors[0], optimizer.state[weight]["exp_avg"]
    expected = factors.rotate_back(moment.clone())
    second = optimizer.state[problem.model[0].bias]["exp_avg_sq"].clone()
    problem.model[0].requires_grad_(False).zero_grad()
    kfac.exit(optimizer.control.gate.context(None, None))
    torch.testing.assert_close(moment, expected)
    assert torch.equal(second, optimizer.state[problem.model[0].bias]["exp_avg_sq"])  # the base's own all along


class Bag(nn.Module):
    """An embedding with sparse gradients, with or without a dense head."""

    def __init__(self, head):
        super().__init__()
        self.embed = nn.Embedding(20, CLASSES, sparse=True)
        self.head = nn.Linear(CLASSES, CLASSES) if head else nn.Identity()

    def forward(self, tokens):
        return self.head(self.embed(tokens).mean(1))


class Wave(nn.Module):
    """A complex weight, with or without a dense head."""

    def __init__(self, head):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(6, CLASSES, dtype=torch.complex64))
        self.head = nn.Linear(CLASSES, CLASSES) if head else nn.Identity()

    def forward(self, tokens):
        return self.head((tokens.to(torch.complex64) @ self.weight).abs() / 30)


ODD = {"sparse": (Bag, lambda p: torch.optim.Adagrad(p, lr=0.1)), "complex": (Wave, lambda p: AdamW(p, lr=0.01))}


@pytest.mark.filterwarnings("ignore:Sparse invariant checks")  # torch's own, from Adagrad
@pytest.mark.parametrize("mode", ["base", "kfac", "sam", "sgd"])
@pytest.mark.parametrize("head", [True, False])
@pytest.mark.parametrize("kind", ODD)
def test_odd_parameters_train_and_what_is_not_measured_is_said(kind, head, mode):
    make_model, make_base = ODD[kind]

    def run(wrapped):
        problem = make("transformer", 14)
        torch.manual_seed(3)
        problem.model = make_model(head)
        optimizer = make_base(problem.model.parameters())
        if wrapped:
            optimizer = wrap(optimizer, problem, policy=ConstantPolicy(mode))
        train(problem, optimizer, 12)
        odd = next(problem.model.parameters())
        before = odd.detach().clone()
        params = train(problem, optimizer)
        assert not torch.equal(before, odd)
        return params, optimizer

    if head:
        params, optimizer = run(True)
        assert any(f"{kind} " in note for note in optimizer.reading.notes)
    else:
        with pytest.warns(UserWarning, match=f"{kind} ") as said:
            params, optimizer = run(True)
        assert len(said) == 1
        assert optimizer.reading is None
    if mode == "base" or (not head and mode != "kfac"):  # K-FAC has its own beta2, also where it rotates nothing
        assert all(torch.equal(a, b) for a, b in zip(params, run(False)[0], strict=True))


def test_sparse_adam_trains_as_it_would_alone():
    def run(wrapped):
        problem = make("transformer", 6)
        torch.manual_seed(3)
        problem.model = Bag(head=False)
        base = SparseAdam(problem.model.parameters(), lr=0.1)
        if not wrapped:
            return train(problem, base)
        with pytest.warns(UserWarning, match="sparse "):
            return train(problem, wrap(base, problem))

    assert all(torch.equal(a, b) for a, b in zip(run(True), run(False), strict=True))

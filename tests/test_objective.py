"""A replay leaves no trace, and gives the loss and the gradient that backward left."""

import copy

import pytest
import torch
from problems import MODELS, Transformer, make
from torch import nn

from adaptive_opt import AdaptiveOptimizer, LanczosProbe
from adaptive_opt.objective import ReplayError, agreement, moved

DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]


class Fragile(nn.Module):
    """A loss that raises when it is told to, half-way through a replay."""

    def __init__(self):
        super().__init__()
        self.register_buffer("seen", torch.zeros(()))
        self.broken = False

    def forward(self, output, target):
        self.seen += 1
        torch.rand(3)
        if self.broken:
            raise ArithmeticError("no loss today")
        return nn.functional.cross_entropy(output, target)


def ready(name, device="cpu", autocast=False, criterion=None, clear=True):
    """An optimizer after backward, before step."""
    problem = make(name, 1)
    model, criterion = problem.model.to(device), criterion or problem.criterion
    base = torch.optim.AdamW(model.parameters(), lr=1e-3)
    optimizer = AdaptiveOptimizer(base, model, loss_fn=criterion, probe=LanczosProbe(every=1, num_steps=3))
    x, y = (t.to(device) for t in problem.batches[0])
    with torch.autocast(device, dtype=torch.bfloat16, enabled=autocast):
        loss = criterion(model(x), y)
    loss.backward()
    return optimizer, model, criterion, loss


def replayed(optimizer):
    return optimizer.control.gate.context(None, None).objective


def trace(optimizer, model, criterion, device):
    """Everything that a replay could change: what must be the same object, and what must have the same value."""
    params, modules = list(model.parameters()), [*model.modules(), *criterion.modules()]
    buffers = [b for m in (model, criterion) for b in m.buffers()]
    same = [*params, *(p.grad for p in params), *buffers]
    equal = [
        [t.detach().clone() for t in same],
        [t._version for t in same],
        [m.training for m in modules],
        [p.requires_grad for p in params],
        [torch.is_autocast_enabled(d) for d in DEVICES] + [torch.get_autocast_dtype(d) for d in DEVICES],
        [torch.is_grad_enabled(), optimizer._capture.armed, len(optimizer._capture.calls)],
        list(nn.modules.module._global_forward_pre_hooks) + list(nn.modules.module._global_forward_hooks),
        [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in modules],
        [torch.get_rng_state(), *([torch.cuda.get_rng_state(device)] if device == "cuda" else [])],
        [torch.backends.cuda.flash_sdp_enabled(), torch.backends.cuda.math_sdp_enabled()],
    ]
    return same, equal


def assert_no_trace(before, after):
    assert all(a is b for a, b in zip(before[0], after[0], strict=True))
    for old, new in zip(before[1], after[1], strict=True):
        for a, b in zip(old, new, strict=True):
            assert torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


ACTS = {
    "loss": lambda objective: objective.loss(),
    "gradient": lambda objective: objective.gradient(),
    "part": lambda objective: objective.part(0.5)[0].gradient(),
}


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("act", ACTS)
@pytest.mark.parametrize("name", MODELS)
def test_a_replay_leaves_no_trace(name, act, device):
    optimizer, model, criterion, _ = ready(name, device)
    objective = replayed(optimizer)
    before = trace(optimizer, model, criterion, device)
    ACTS[act](objective)
    assert_no_trace(before, trace(optimizer, model, criterion, device))


@pytest.mark.parametrize("name", MODELS)
def test_a_reading_leaves_no_trace(name):
    optimizer, model, criterion, _ = ready(name)
    before = trace(optimizer, model, criterion, "cpu")
    reading = optimizer.probe_now()
    assert_no_trace(before, trace(optimizer, model, criterion, "cpu"))
    assert reading.backend == "exact"
    assert reading.layers


@pytest.mark.parametrize("act", ["loss", "gradient", "probe_now"])
@pytest.mark.parametrize("name", MODELS)
def test_a_loss_that_raises_in_the_middle_leaves_no_trace(name, act):
    optimizer, model, criterion, _ = ready(name, criterion=Fragile())
    objective = replayed(optimizer)
    criterion.broken = True
    before = trace(optimizer, model, criterion, "cpu")
    with pytest.raises(ArithmeticError, match="no loss today"):
        optimizer.probe_now() if act == "probe_now" else ACTS[act](objective)
    assert_no_trace(before, trace(optimizer, model, criterion, "cpu"))


def test_a_replay_restores_the_modes_that_it_changed():
    optimizer, model, criterion, _ = ready("cnn")
    model.eval()
    model[1].train()
    criterion.eval()
    before = trace(optimizer, model, criterion, "cpu")
    replayed(optimizer).gradient()
    assert_no_trace(before, trace(optimizer, model, criterion, "cpu"))


def test_a_step_under_autocast_replays_a_forward_that_ran_without_it():
    optimizer, _, _, loss = ready("mlp")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert replayed(optimizer).loss() == loss.item()


def test_under_autocast_a_replay_sees_moved_parameters_not_their_cached_casts():
    problem = make("mlp", 1)
    x, y = problem.batches[0]
    base = torch.optim.AdamW(problem.model.parameters(), lr=1e-3)
    optimizer = AdaptiveOptimizer(base, problem.model, loss_fn=problem.criterion)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        problem.criterion(problem.model(x), y).backward()
        objective = replayed(optimizer)
        here = objective.loss()
        with moved(objective.params, objective.gradient(), -0.5):
            assert objective.loss() < here - 1e-3


def test_the_graph_of_the_user_survives_a_replay():
    problem = make("cnn", 1)
    model, criterion = problem.model, problem.criterion
    x, y = problem.batches[0]
    optimizer = AdaptiveOptimizer(torch.optim.AdamW(model.parameters()), model, loss_fn=criterion)
    model.eval()  # running statistics are part of the graph now
    loss = criterion(model(x), y)
    loss.backward(retain_graph=True)
    replayed(optimizer).gradient()
    first = [p.grad.clone() for p in model.parameters()]
    optimizer.zero_grad()
    loss.backward()
    assert all(torch.equal(a, p.grad) for a, p in zip(first, model.parameters(), strict=True))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", MODELS)
def test_the_replayed_gradient_is_the_one_that_backward_left(name, device):
    optimizer, model, _, loss = ready(name, device)
    objective = replayed(optimizer)
    assert objective.loss() == pytest.approx(loss.item(), rel=1e-6)
    for g, p in zip(objective.gradient(), model.parameters(), strict=True):
        torch.testing.assert_close(g, p.grad, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", MODELS)
def test_a_replay_can_be_repeated(name):
    optimizer, _, _, _ = ready(name)
    objective = replayed(optimizer)
    for first, second in zip(objective.gradient(), objective.gradient(), strict=True):
        assert torch.equal(first, second)


@pytest.mark.parametrize("name", MODELS)
def test_under_bf16_autocast_the_gradient_agrees_to_what_the_gate_allows(name):
    optimizer, model, criterion, _ = ready(name, autocast=True)
    before = trace(optimizer, model, criterion, "cpu")
    cosine, ratio = agreement(replayed(optimizer).gradient(), [p.grad for p in model.parameters()])
    assert cosine > 0.99
    assert ratio == pytest.approx(1, abs=0.01)
    assert_no_trace(before, trace(optimizer, model, criterion, "cpu"))
    optimizer.step()
    assert optimizer.control.gate.trusted is True


def test_attention_dropout_is_drawn_again():
    """The mask inside scaled_dot_product_attention matters: without the RNG state the gradient is another one."""
    optimizer, model, _, loss = ready("transformer")
    assert isinstance(model, Transformer)
    objective = replayed(optimizer)
    assert objective.loss() == pytest.approx(loss.item(), rel=1e-6)
    call = objective.source.calls[0]
    other = copy.copy(call.ambient.rng)
    call.ambient.rng["cpu"] = torch.Generator().manual_seed(99).get_state()
    assert objective.loss() != pytest.approx(loss.item(), rel=1e-6)
    call.ambient.rng.update(other)
    assert objective.loss() == pytest.approx(loss.item(), rel=1e-6)


@pytest.mark.parametrize("raises", [False, True])
def test_moved_parameters_return_to_the_very_same_bits(raises):
    params = [torch.randn(5), torch.randn(2, 3, dtype=torch.float64)]
    kept = [p.clone() for p in params]
    try:
        with moved(params, [torch.randn_like(p) for p in params], 1e3):
            assert not torch.equal(params[0], kept[0])
            if raises:
                raise KeyError
    except KeyError:
        pass
    assert all(torch.equal(p, k) for p, k in zip(params, kept, strict=True))


def test_agreement_of_vanishing_and_broken_gradients():
    g, zero = [torch.ones(3)], [torch.zeros(3)]
    assert agreement(g, [2 * g[0]]) == pytest.approx((1.0, 0.5))
    assert agreement(zero, [None]) == (1.0, 1.0)
    assert agreement(g, [None]) == (0.0, float("inf"))
    assert agreement(g, [torch.full((3,), float("nan"))])[0] != agreement(g, g)[0]


BAD = {
    "not a scalar": (lambda loss: loss.expand(3), r"shape \(3,\), not a scalar"),
    "a float": (lambda loss: loss.item(), "the loss is float, not a tensor"),
    "no graph": (lambda loss: loss.detach(), "the loss has no graph"),
}


@pytest.mark.parametrize("case", BAD)
def test_an_objective_that_cannot_be_differentiated_is_refused_by_name(case):
    spoil, match = BAD[case]
    problem = make("mlp", 3)
    base = torch.optim.SGD(problem.model.parameters(), lr=0.1)
    x, y = problem.batches[0]
    optimizer = AdaptiveOptimizer(base, objective=lambda: spoil(problem.criterion(problem.model(x), y)))
    before = problem.model[0].weight.detach().clone()
    problem.criterion(problem.model(x), y).backward()
    with pytest.raises(ReplayError, match=match):
        optimizer.probe_now()
    with pytest.warns(UserWarning, match=match):
        optimizer.step()
    optimizer.step()  # and says it once
    assert not torch.equal(before, problem.model[0].weight)


def test_a_loss_that_is_nan_trains_on_without_a_reading():
    problem = make("mlp", 2)
    base = torch.optim.SGD(problem.model.parameters(), lr=0.1)
    optimizer = AdaptiveOptimizer(base, problem.model, loss_fn=problem.criterion, probe=LanczosProbe(every=1, num_steps=3))
    before = problem.model[0].weight.detach().clone()
    for spoil in (float("nan"), 1.0):
        x, y = problem.batches[0]
        optimizer.zero_grad()
        problem.criterion(problem.model(x * spoil), y).backward()
        optimizer.step()
        assert optimizer.report.stepped is (spoil == 1.0)
        assert (optimizer.report.reading is None) is (spoil != 1.0)
        assert torch.isfinite(problem.model[0].weight).all()
    assert not torch.equal(before, problem.model[0].weight)

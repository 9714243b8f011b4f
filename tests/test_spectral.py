"""Layer repair: which layers are one chain, what a repair does to the function, and who is left alone."""

import copy
import math

import pytest
import torch
from test_healing import wrap
from torch import nn

from adaptive_opt.interventions import Spectral
from adaptive_opt.interventions.base import Patient
from adaptive_opt.layers import measure_layers
from adaptive_opt.modes import StepContext
from adaptive_opt.records import Reading, Trend, chains
from experiments.tasks.gpt import CharGPT

GENERATOR = torch.Generator().manual_seed(0)


def measured(model, x):
    readings, skipped = measure_layers(model, lambda: model(x).square().mean(), GENERATOR)
    assert not skipped
    return readings


class Skip(nn.Module):
    def __init__(self, *parts):
        super().__init__()
        self.inner = nn.Sequential(*parts)

    def forward(self, x):
        return x + self.inner(x)


def linear(n=8, k=8):
    return nn.Linear(n, k)


@pytest.mark.parametrize(
    ("model", "shape", "expected"),
    [
        (lambda: nn.Sequential(linear(), nn.ReLU(), linear(), nn.Tanh(), linear()), (4, 8), [3]),
        (lambda: nn.Sequential(linear(), nn.ReLU(), linear(), nn.LayerNorm(8), linear()), (4, 8), [2, 1]),
        (lambda: nn.Sequential(linear(), nn.BatchNorm1d(8), nn.ReLU(), linear()), (4, 8), [1, 1]),
        (lambda: nn.Sequential(linear(), Skip(linear(), nn.ReLU(), linear()), linear()), (4, 8), [1, 2, 1]),
        (
            lambda: nn.Sequential(nn.Conv2d(1, 3, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), linear(27, 8), linear()),
            (4, 1, 8, 8),
            [3],
        ),
    ],
)
def test_a_chain_ends_where_a_scale_is_set_anew_or_gone_around(model, shape, expected):
    torch.manual_seed(0)
    assert [len(chain) for chain in chains(measured(model(), torch.randn(shape)))] == expected


def test_a_vanilla_rnns_matrix_is_met_once_an_element():
    torch.manual_seed(0)
    model = nn.ModuleDict({"rnn": nn.RNN(3, 16, num_layers=2, batch_first=True), "lstm": nn.LSTM(16, 4), "head": linear(4, 2)})

    def loss():
        return model["head"](model["lstm"](model["rnn"](torch.ones(5, 12, 3))[0])[0]).square().mean()

    readings, _ = measure_layers(model, loss, GENERATOR)
    found = {r.name: r for r in readings if r.kind == "recurrent"}
    assert list(found) == ["rnn.weight_hh_l0", "rnn.weight_hh_l1"]
    for name, r in found.items():
        W = model.get_parameter(name).detach()
        assert r.times == 12
        assert r.sigma_max == pytest.approx(float(torch.linalg.matrix_norm(W, 2)), rel=1e-5)
        assert r.sigma_rms == pytest.approx(float(W.norm()) / 4, rel=1e-5)  # |W|_F / sqrt(16)


def repaired(model, x, seen_something, kind=torch.optim.Adam):
    """The model after a repair, and its optimizer, which has taken a step before."""
    base = kind(model.parameters(), lr=0.0)
    model(x).square().mean().backward()
    base.step()
    params = list(model.parameters())
    trend = Trend(100, 1.0, 1.0, usual_loss=1.0 if seen_something else None)
    reading = Reading(step=100, loss=1.0, grad_norm=1.0, layers=measured(model, x))
    ctx = StepContext(base, params, list(range(len(params))), None)
    applied = Spectral().apply(Patient(ctx, trend, reading, model=model))
    return base, applied


def deep(one=1.0, all_=1.0):
    torch.manual_seed(0)
    layers = [m for _ in range(6) for m in (nn.Linear(32, 32), nn.ReLU())]
    model = nn.Sequential(*layers, nn.Linear(32, 10))
    with torch.no_grad():
        for i in range(0, 13, 2):
            nn.init.kaiming_normal_(model[i].weight).mul_(all_ * (one if i == 4 else 1.0))
            model[i].bias.normal_()
    return model


def test_one_layer_out_of_balance_is_repaired_without_a_change_of_the_function():
    model, x = deep(one=30.0), torch.randn(64, 32)
    before, moments = model(x).detach(), []
    base, applied = repaired(model, x, seen_something=True)
    assert "leaves the function as it was" in applied.done
    torch.testing.assert_close(model(x), before, rtol=1e-4, atol=1e-4 * float(before.abs().max()))
    sigma = [r.sigma_rms for r in measured(model, x)]
    assert max(sigma) / min(sigma) < 1.3
    # a gradient at the repaired weights is what the rescaled first moment is a tenth of
    model.zero_grad()
    model(x).square().mean().backward()
    for p in model.parameters():
        moments.append(base.state[p]["exp_avg"])
        torch.testing.assert_close(moments[-1], 0.1 * p.grad, rtol=2e-3, atol=1e-3 * float(p.grad.abs().max()))


def test_a_chain_that_explodes_is_brought_to_one_and_keeps_its_argmax():
    model, x = deep(all_=3.0), torch.randn(64, 32)
    before = model(x).detach()
    _, applied = repaired(model, x, seen_something=True)
    assert "to 1, each by its shape" in applied.done
    after = model(x).detach()
    assert torch.equal(after.argmax(1), before.argmax(1))
    ratio = after / before
    assert float((ratio - ratio.mean()).abs().max()) < 0.01 * float(ratio.mean())
    assert all(abs(math.log(r.sigma_rms)) < 0.3 for r in measured(model, x))


def test_before_the_first_step_there_is_no_function_to_be_kept():
    _, applied = repaired(deep(one=30.0), torch.randn(64, 32), seen_something=False)
    assert "to 1" in applied.done


@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.Adam])
def test_two_tiny_layers_become_equally_large_unless_the_base_divides_by_its_gradients_size(kind):
    torch.manual_seed(0)
    model = nn.Sequential(linear(64, 4), linear(4, 64))
    with torch.no_grad():
        for layer in model:
            layer.weight.normal_(std=1e-3)
    _, applied = repaired(model, torch.randn(16, 64), False, kind)
    assert applied.moved == (kind is torch.optim.SGD)
    assert applied.last == (kind is torch.optim.Adam)  # else damp would take its first step for far too long
    if applied.moved:
        first, second = measured(model, torch.randn(16, 64))
        assert first.sigma_rms * second.sigma_rms == pytest.approx(1, rel=0.2)  # the signal keeps its size
        first, second = (float(layer.weight.detach().norm()) for layer in model)
        assert first == pytest.approx(second, rel=0.1)


class LastState(nn.Module):
    def __init__(self, rnn):
        super().__init__()
        self.rnn, self.head = rnn, linear(16, 2)

    def forward(self, x):
        return self.head(self.rnn(x)[0][:, -1])


@pytest.mark.parametrize("seen_something", [False, True])
def test_a_recurrent_matrix_becomes_the_next_orthogonal_one_and_later_is_only_multiplied(seen_something):
    torch.manual_seed(0)
    model = LastState(nn.RNN(3, 16, batch_first=True))
    W = model.rnn.weight_hh_l0
    before = W.detach().clone()
    _, applied = repaired(model, torch.randn(5, 12, 3), seen_something, torch.optim.SGD)
    assert applied.cliffs  # and SGD's steps are as long as the gradients
    u, s, vh = torch.linalg.svd(before)
    wanted = before / s.square().mean().sqrt() if seen_something else u @ vh
    torch.testing.assert_close(W.detach(), wanted, rtol=1e-4, atol=1e-5)


def test_a_singular_value_that_stands_out_is_clipped_to_the_largest_of_the_others():
    model, x = deep(), torch.randn(64, 32)
    healthy = model[4].weight.detach().clone()
    u, s, vh = torch.linalg.svd(healthy)
    with torch.no_grad():
        model[4].weight.add_(100 * s[0] * torch.outer(u[:, 0], vh[0]))
    _, applied = repaired(model, x, seen_something=False)
    assert "outlying singular values clipped in 1" in applied.done
    now = torch.linalg.svdvals(model[4].weight.detach())
    assert float(now[0] / now[1]) == pytest.approx(1)
    torch.testing.assert_close(now[1:] / now[1], s[1:] / s[1], rtol=1e-3, atol=1e-3)
    assert all(abs(math.log(r.sigma_rms)) < 0.5 for r in measured(model, x))


def test_a_matrix_of_low_rank_has_nothing_that_stands_out():
    model = deep()
    with torch.no_grad():
        model[4].weight.copy_(100 * torch.outer(torch.randn(32), torch.randn(32)))
    before = model[4].weight.detach().clone()
    _, applied = repaired(model, torch.randn(64, 32), seen_something=False)
    assert "clipped" not in applied.done
    after = model[4].weight.detach()
    torch.testing.assert_close(after / after.norm(), before / before.norm())


def test_a_tanh_net_has_no_scale_to_pass_on_and_its_biases_stay():
    model, x = deep(one=30.0), torch.randn(64, 32)
    for i in range(1, 12, 2):
        model[i] = nn.Tanh()
    biases = [m.bias.detach().clone() for m in model if isinstance(m, nn.Linear)]
    repaired(model, x, seen_something=True)
    assert all(torch.equal(m.bias, b) for m, b in zip([m for m in model if isinstance(m, nn.Linear)], biases, strict=True))


@pytest.mark.parametrize("depth", [2, 6])
def test_a_transformer_is_left_alone(depth):
    task = CharGPT(0, batch_size=4, depth=depth, width=32)
    optimizer = wrap(task, torch.optim.AdamW(task.model.parameters(), lr=1e-3))
    start = copy.deepcopy(task.model)
    for step in range(2):
        x, y = task.batch(step)
        optimizer.zero_grad()
        task.loss_fn(task.model(x), y).backward()
        optimizer.step()
        assert not optimizer.report.events
    product = math.prod(r.sigma_rms for r in optimizer.reading.layers or optimizer.control.first_layers)
    assert depth == 2 or product < 1e-5  # their product, which means nothing here, was once taken for a dying signal
    assert not torch.equal(next(start.parameters()), next(task.model.parameters()))

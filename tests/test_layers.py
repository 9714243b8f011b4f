"""Layers' Jacobians against dense float64 ones, row by row."""

import json
from dataclasses import asdict

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from adaptive_opt.layers import KINDS, measure_layers, with_drift
from adaptive_opt.records import LayerReading, Reading
from tests.oracles import dense_jacobian


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=generator(seed), dtype=torch.float64)


def norm(a):
    return float(torch.linalg.matrix_norm(a.detach(), 2))


class Twisted(nn.Module):
    """A module of no known kind, called with keywords, that gives a dictionary."""

    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(randn(4, 4))

    def forward(self, *, mask, x):
        return {"mask": mask, "y": torch.sin(x @ self.w) * x}


def first(output):
    return output if isinstance(output, torch.Tensor) else first(output[0])


def self_attention(m, x):
    return m(x, x, x)


def cell_state(m, h):
    x = randn(3, 4, seed=7)
    return m(x, (h, randn(3, 5, seed=8)) if isinstance(m, nn.LSTMCell) else h)


LAYERS = {  # name -> module, input that the Jacobian is with respect to, kind, how it is called
    "wide": (lambda: nn.Linear(7, 3), (4, 7), "weight", None),
    "tall": (lambda: nn.Linear(3, 7), (4, 3), "weight", None),
    "conv1d": (lambda: nn.Conv1d(2, 4, 3), (2, 2, 7), "weight", None),
    "conv2d": (lambda: nn.Conv2d(2, 4, 3, stride=2, padding=1, groups=2), (2, 2, 5, 5), "weight", None),
    "layernorm": (lambda: nn.LayerNorm(6), (3, 6), "norm", None),
    "batchnorm": (lambda: nn.BatchNorm2d(3), (4, 3, 2, 2), "norm", None),
    "groupnorm": (lambda: nn.GroupNorm(2, 4), (2, 4, 3), "norm", None),
    "rmsnorm": (lambda: nn.RMSNorm(6), (3, 6), "norm", None),
    "attention": (lambda: nn.MultiheadAttention(4, 2, batch_first=True), (2, 3, 4), "attention", self_attention),
    "rnncell": (lambda: nn.RNNCell(4, 5), (3, 5), "rnn", cell_state),
    "lstmcell": (lambda: nn.LSTMCell(4, 5), (3, 5), "rnn", cell_state),
    "grucell": (lambda: nn.GRUCell(4, 5), (3, 5), "rnn", cell_state),
    "rnn": (lambda: nn.RNN(3, 4), (3, 2, 3), "rnn", None),
    "lstm": (lambda: nn.LSTM(3, 4, num_layers=2), (3, 2, 3), "rnn", None),
    "gru": (lambda: nn.GRU(3, 4, bidirectional=True, batch_first=True), (2, 3, 3), "rnn", None),
    "twisted": (lambda: Twisted(), (3, 4), "module", lambda m, x: m(mask=torch.ones(3).long(), x=x)["y"]),
}


class Holder(nn.Module):
    def __init__(self, layer, call):
        super().__init__()
        self.layer, self.call = layer, call or (lambda m, x: m(x))

    def forward(self, x):
        return first(self.call(self.layer, x))


def measured(name, num_steps=100, seed=0):
    make, shape, kind, call = LAYERS[name]
    torch.manual_seed(0)
    holder, x = Holder(make().double(), call), randn(*shape)
    asked = {"names": ["layer"]} if kind == "module" else {"kinds": [kind]}
    with sdpa_kernel(SDPBackend.MATH):
        (reading,), skipped = measure_layers(holder, lambda: holder(x).square().sum(), generator(seed), num_steps, **asked)
        leaf = x.clone().requires_grad_()
        J = dense_jacobian(holder(leaf), [leaf])
    assert (reading.kind, reading.name, skipped) == (kind, "layer", ())
    return reading, J, holder(x).detach().reshape(-1)


@pytest.mark.parametrize("name", LAYERS)
def test_a_long_run_gives_the_dense_jacobians_singular_values_and_gain(name):
    reading, J, y = measured(name)
    sigma = torch.linalg.svdvals(J).numpy()
    rms = np.sqrt((sigma**2).sum() / len(J))
    assert abs(reading.sigma_max - sigma[0]) <= 1e-9 * sigma[0]
    assert abs(reading.sigma_min - sigma[-1]) <= reading.sigma_min_error + 1e-9 * sigma[0]
    assert abs(reading.sigma_rms - rms) <= 5 * reading.sigma_rms_error + 1e-9
    gain = float((J.T @ (2 * y)).norm() / (2 * y).norm())  # of the loss |y|^2
    assert reading.gain == pytest.approx(gain, rel=1e-9)
    assert reading.distance == pytest.approx(abs(np.log(reading.sigma_rms)))


@pytest.mark.parametrize("name", ["wide", "tall", "batchnorm", "attention", "lstm"])
def test_short_runs_are_bounds_and_lie_within_their_errors(name):
    runs = [measured(name, 4, seed) for seed in range(15)]
    sigma = torch.linalg.svdvals(runs[0][1]).numpy()
    rms = np.sqrt((sigma**2).sum() / len(runs[0][1]))
    found = [reading for reading, _, _ in runs]
    slack = 1e-10 * sigma[0]
    assert all(sigma[-1] - slack <= r.sigma_min <= r.sigma_max <= sigma[0] + slack for r in found)
    assert all(np.abs(sigma - r.sigma_max).min() <= r.sigma_max_error + slack for r in found)
    assert all(np.abs(sigma - r.sigma_min).min() <= r.sigma_min_error + slack for r in found)
    assert np.mean([abs(r.sigma_rms - rms) <= 4 * r.sigma_rms_error for r in found]) > 0.9


def test_the_default_measures_weights_alone_and_names_add_to_the_kinds():
    model = nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4), nn.GELU(), nn.Linear(4, 2)).double()
    x = randn(3, 4)

    def names(**asked):
        return [(r.name, r.kind) for r in measure_layers(model, lambda: model(x).sum(), generator(), 2, **asked)[0]]

    assert names() == [("0", "weight"), ("3", "weight")]
    assert names(kinds=["weight", "norm"]) == [("0", "weight"), ("1", "norm"), ("3", "weight")]
    assert names(kinds=[], names=["2", "1"]) == [("1", "norm"), ("2", "module")]
    assert names(kinds=list(KINDS)) == names(kinds=["norm", "weight"])
    with pytest.raises(ValueError, match="names of modules"):
        names(names=["nowhere"])
    with pytest.raises(ValueError, match="kinds out of"):
        names(kinds=["linear"])


def test_a_layer_is_measured_without_the_ways_around_it():
    class Residual(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x):
            h = self.a(x)
            h = h + self.b(h)
            h += x  # in place
            return h

    model, x = Residual().double(), randn(3, 4)
    readings, _ = measure_layers(model, lambda: model(x).square().sum(), generator(), 12)
    for r, layer in zip(readings, (model.a, model.b), strict=True):
        assert r.sigma_max == pytest.approx(norm(layer.weight), rel=1e-9)
    g = 2 * model(x).detach()
    assert readings[1].gain == pytest.approx(float((g @ model.b.weight.detach()).norm() / g.norm()), rel=1e-9)


@pytest.mark.parametrize("inplace", [False, True])
def test_weights_are_measured_with_the_activation_that_follows_and_norms_without(inplace):
    model = nn.Sequential(nn.Linear(4, 6), nn.ReLU(inplace), nn.LayerNorm(6), nn.ReLU(inplace), nn.Linear(6, 2)).double()
    x = randn(3, 4)
    readings, _ = measure_layers(model, lambda: model(x).sum(), generator(), 40, kinds=["weight", "norm"])
    leaf = x.clone().requires_grad_()
    h = torch.relu(model[0](leaf))
    own = h.detach().clone().requires_grad_()
    for r, (y, z) in zip(readings[:2], ((h, leaf), (model[2](own), own)), strict=True):
        assert r.sigma_max == pytest.approx(norm(dense_jacobian(y, [z])), rel=1e-9)


def test_a_cell_without_a_state_starts_from_the_zeros_it_would_make():
    for make in (nn.RNNCell, nn.LSTMCell, nn.GRUCell):
        cell, x, h = make(4, 5).double(), randn(3, 4), torch.zeros(3, 5, dtype=torch.float64, requires_grad=True)
        given, _ = measure_layers(cell, lambda: first(cell(x)).sum(), generator(), 20, ["rnn"])
        out = first(cell(x, (h, h.detach()) if make is nn.LSTMCell else h))
        assert given[0].sigma_max == pytest.approx(norm(dense_jacobian(out, [h])), rel=1e-9)


def test_float32_recurrent_layers_have_second_derivatives():
    model, x = nn.LSTM(3, 4), randn(5, 2, 3).float()
    readings, skipped = measure_layers(model, lambda: model(x)[0].sum(), generator(), 4, ["rnn"])
    assert (len(readings), skipped) == (1, ())
    assert torch.backends.mkldnn.enabled


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_lower_precisions_are_right_to_their_own_rounding(dtype):
    layer, x = nn.Linear(24, 16).to(dtype), randn(2, 24).to(dtype)
    (r,), skipped = measure_layers(layer, lambda: layer(x).float().square().sum(), generator(), 16)
    sigma = torch.linalg.svdvals(layer.weight.double()).detach().numpy()
    assert skipped == ()
    assert np.abs(sigma - r.sigma_max).min() <= r.sigma_max_error
    assert abs(r.sigma_max - sigma[0]) <= 4 * torch.finfo(dtype).eps * sigma[0]


def test_what_cannot_be_measured_is_named_with_the_reason():
    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.c, self.d = nn.Linear(3, 3), nn.Linear(3, 3), nn.Linear(3, 3), nn.Linear(3, 3)
            self.ids, self.sick = nn.Embedding(4, 3), nn.Linear(3, 3)

        def forward(self, x):
            cut = self.c(x).detach()
            return self.b(self.a(input=x)) + cut + self.ids(torch.tensor([1, 2])) + self.sick(x)

    model, x = Odd().double(), randn(2, 3)
    model.c.requires_grad_(False)
    with torch.no_grad():
        model.sick.weight.fill_(float("nan"))
    readings, skipped = measure_layers(model, lambda: model(x).sum(), generator(), names=["d", "ids"])
    assert [r.name for r in readings] == ["c", "b"]
    assert readings[0].gain is None  # the loss does not see it
    assert {s.partition(" ")[0]: s for s in skipped}.keys() == {"a", "ids", "d", "sick"}
    assert any(s == "d not measured (the replay did not call it)" for s in skipped)
    assert any(s.startswith("sick") and "finite" in s for s in skipped)


def test_hooks_are_gone_afterwards_also_after_an_error():
    model = nn.Sequential(nn.Linear(3, 3), nn.ReLU(), nn.LayerNorm(3))
    with pytest.raises(ZeroDivisionError):
        measure_layers(model, lambda: model(torch.ones(2, 3)) / (1 // 0), generator(), kinds=list(KINDS))
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_a_layer_reading_makes_the_round_trip_through_json_and_knows_its_drift():
    first = LayerReading("a", 2.0, 0.1, 0.5, 0.0, None, 0.2, 0.0, "norm")
    now = LayerReading("a", 2.0, 0.1, 1.0, 0.0, 1.0), LayerReading("b", 1.0, 0.0, 0.0, 0.0, None)
    a, b = with_drift(now, [first])
    assert (a.drift, b.drift) == (pytest.approx(np.log(2)), None)
    assert (first.distance, b.distance) == (pytest.approx(np.log(2)), float("inf"))
    reading = Reading(step=1, loss=1.0, grad_norm=1.0, layers=(first, a, b))
    assert Reading.from_dict(json.loads(json.dumps(asdict(reading)))) == reading


def nodes_run(depth, monkeypatch):
    """Calls of autograd.grad, and nodes of the forward graph that they run, for a net of `depth` blocks."""
    model = nn.Sequential(*(m for _ in range(depth) for m in (nn.Linear(4, 4), nn.LayerNorm(4), nn.Tanh()))).double()
    counts = {"calls": 0, "nodes": 0}
    real = torch.autograd.grad

    def grad(*args, **kwargs):
        counts["calls"] += 1
        return real(*args, **kwargs)

    def evaluate():
        loss = model(randn(2, 4)).sum()
        stack, seen = [loss.grad_fn], set()
        while stack:
            node = stack.pop()
            if node is not None and node not in seen and type(node).__name__ != "AccumulateGrad":
                seen.add(node)
                node.register_prehook(lambda g: counts.update(nodes=counts["nodes"] + 1))
                stack += [n for n, _ in node.next_functions]
        return loss

    with monkeypatch.context() as patch:
        patch.setattr(torch.autograd, "grad", grad)
        readings, _ = measure_layers(model, evaluate, generator(), kinds=["weight", "norm"])
    assert len(readings) == 2 * depth
    return np.array([counts["calls"], counts["nodes"]])


def test_the_work_grows_linearly_with_the_number_of_layers(monkeypatch):
    four, eight, sixteen = (nodes_run(depth, monkeypatch) for depth in (4, 8, 16))
    assert (sixteen - eight == 2 * (eight - four)).all()
    assert eight[0] == 1 + 16 * (1 + 2 * 4)  # one for the gains; for each layer the pullback and four steps

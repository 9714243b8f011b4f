"""Escape on functions whose saddles are known: which directions, which sign, how far, and what is not worth a step."""

import math

import pytest
import torch
from test_healing import wrap
from torch import nn

from adaptive_opt.curvature import operator_on
from adaptive_opt.curvature.backend import Part
from adaptive_opt.interventions import Escape
from adaptive_opt.interventions.base import Patient
from adaptive_opt.layers import measure_layers
from adaptive_opt.memory import ProbeMemory
from adaptive_opt.modes import StepContext
from adaptive_opt.objective import GivenLoss, Objective
from adaptive_opt.records import Reading, Trend
from adaptive_opt.spectra import Spectra
from experiments.loop import train
from experiments.tasks.digits import Digits

H = torch.diag(torch.tensor([4.0, 2.0, -1.0, -3.0, 1.0]))


def well(w, offset=2.0):
    """A saddle at the origin, bounded from below."""
    return offset + 0.5 * w @ H @ w + (w**4).sum()


def at(w, loss=well, momentum=None):
    """The patient, its base and its parameter; what a full reading would have found is in the patient."""
    w = torch.tensor(w, requires_grad=True)
    base = torch.optim.SGD([w], lr=0.1, momentum=0.9)
    if momentum is not None:
        base.state[w]["momentum_buffer"] = torch.tensor(momentum)
    objective = Objective(GivenLoss(lambda: loss(w), [], None), [w], [w])
    memory = ProbeMemory(torch.Generator().manual_seed(0))
    with objective.replay() as evaluate:
        operator, _ = operator_on([lambda: Part(evaluate(), ())], [w], "hessian", None, None)
        Spectra(5, None, 0.01, None).full(operator, None, memory, Reading(0, math.nan, math.nan), [])
    ctx = StepContext(base, [w], [0], objective)
    return Patient(ctx, Trend(0, 2.0, 0.0, stalled=True), None, bottom=memory.bottom, below=memory.below), base, w


def test_all_negative_directions_together_are_weighted_by_their_curvature_and_point_downhill():
    patient, _, w = at([0.0, 0.0, 1e-3, 1e-3, 0.0])
    assert patient.below is not None
    expected = torch.tensor([0.0, 0.0, 1.0, 3.0, 0.0]) / math.sqrt(10)
    torch.testing.assert_close(patient.below, expected, rtol=1e-2, atol=1e-2)
    g = torch.autograd.grad(well(w), w)[0]
    assert float(g @ patient.below) < 0
    assert at([0.0] * 5, lambda w: 1.0 + w[0] ** 2 - w[1] ** 2)[0].below is None  # one direction alone is the bottom


@pytest.mark.parametrize("side", [1.0, -1.0])
def test_it_goes_to_the_side_that_is_lower_and_lowers_the_loss(side):
    def tilted(w):
        return well(w) + 0.2 * side * w[3] ** 3

    patient, _, w = at([0.0] * 5, tilted)
    before = float(tilted(w.detach()))
    applied = Escape().apply(patient)
    after = float(tilted(w.detach()))
    assert applied is not None
    assert applied.moved
    assert after < before - 0.3
    assert side * float(w.detach()[3]) < 0


def test_a_gain_of_less_than_a_hundredth_is_not_worth_the_step():
    patient, _, w = at([0.0] * 5, lambda w: well(w, offset=200.0))
    assert Escape().apply(patient) is None
    assert not w.detach().any()


def test_what_the_momentum_had_along_the_direction_is_gone():
    patient, base, w = at([0.0] * 5, momentum=[1.0, 2.0, 3.0, 4.0, 5.0])
    applied = Escape().apply(patient)
    direction = patient.bottom if "most negative" in applied.done else patient.below
    m = base.state[w]["momentum_buffer"]
    assert abs(float(m @ direction)) < 1e-5
    torch.testing.assert_close(m[[0, 1, 4]], torch.tensor([1.0, 2.0, 5.0]), atol=1e-3, rtol=1e-3)


def test_the_search_ends_at_the_cap_where_the_loss_falls_for_ever():
    patient, _, w = at([0.0] * 5, lambda w: 1.0 + w[0] ** 2 - w[1] ** 2)
    Escape(cap=2.0).apply(patient)
    assert 0.5 < float(w.detach().norm()) <= 2.0


def test_nothing_is_done_without_a_batch_or_a_direction():
    patient, _, _ = at([0.0] * 5)
    patient.bottom = patient.below = None
    assert Escape().apply(patient) is None


def copies(model, x):
    with torch.enable_grad():
        readings, _ = measure_layers(model, lambda: model(x).square().mean(), torch.Generator().manual_seed(0))
    return readings[0].copies


@pytest.mark.parametrize("image", [False, True])
def test_units_that_are_copies_in_and_out_are_counted_and_those_without_weights_are_not(image):
    torch.manual_seed(0)
    if image:
        model, x = nn.Sequential(nn.Conv2d(1, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 4, 5)), torch.randn(4, 1, 4, 4)
    else:
        model, x = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 5)), torch.randn(4, 6)
    first, last = model[0], model[-1]
    assert copies(model, x) == 0.0
    with torch.no_grad():
        first.weight[2:] = first.weight[2]
        first.bias[2:] = first.bias[2]
        assert copies(model, x) == 0.0  # alike on the way in alone
        out = last.weight.view(5, 8, -1)
        out[:, 2:] = out[:, 2:3]
        assert copies(model, x) == pytest.approx(5 / 8)
        first.weight[5:] = 0  # pruned
        assert copies(model, x) == pytest.approx(2 / 8)


def symmetric(seed=0):
    task = Digits(seed, depth=1, width=64, steps=150)
    with torch.no_grad():
        task.model[0].weight.copy_(task.model[0].weight[:1].expand(64, -1))
        task.model[2].weight.copy_(task.model[2].weight[:, :1].expand(-1, 64) / 8)
    return task


def test_a_layer_of_one_unit_many_times_over_is_told_apart_at_the_first_step():
    bare, task = symmetric(), symmetric()
    stuck = train(bare, torch.optim.SGD(bare.model.parameters(), lr=0.1, momentum=0.9))
    healed = train(task, wrap(task, torch.optim.SGD(task.model.parameters(), lr=0.1, momentum=0.9)))
    assert stuck.metrics["test_accuracy"] < 50
    assert healed.metrics["test_accuracy"] > 80
    assert any(line.startswith("step 0: 98%") and "kept: loss" in line for line in healed.treatments)

"""Escape on functions whose saddles are known: which directions, which sign, how far, and what is not worth a step."""

import math

import pytest
import torch

from adaptive_opt.curvature import operator_on
from adaptive_opt.curvature.backend import Part
from adaptive_opt.interventions import Escape
from adaptive_opt.interventions.base import Patient
from adaptive_opt.memory import ProbeMemory
from adaptive_opt.modes import StepContext
from adaptive_opt.objective import GivenLoss, Objective
from adaptive_opt.records import Reading, Trend
from adaptive_opt.spectra import Spectra

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

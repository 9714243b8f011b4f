"""The test that guards the whole project: probed, with a constant policy, equals the bare base optimizer bit for bit."""

import pytest
import torch
from problems import BASES, MODELS, make

from adaptive_opt import AdaptiveOptimizer, ConstantPolicy, LanczosProbe

STEPS = 50
SOURCES = ("capture", "closure", "objective")


def wrap(base, problem, source, batch, **kwargs):
    given = {
        "capture": {"model": problem.model, "loss_fn": problem.criterion},
        "closure": {"model": problem.model},
        "objective": {"model": problem.model, "objective": lambda: loss_of(problem, batch)},
    }[source]
    return AdaptiveOptimizer(base, **given, policy=ConstantPolicy("base"), **kwargs)


def loss_of(problem, batch):
    x, y = batch
    return problem.criterion(problem.model(x), y)


def run(name, base, source=None, dtype=torch.float32, steps=STEPS, probe=None):
    """Parameters, buffers and RNG after training, and how often it was probed."""
    problem = make(name, steps, dtype=dtype)
    batch = [None, None]
    optimizer = BASES[base](problem.model.parameters())
    if source is not None:
        optimizer = wrap(optimizer, problem, source, batch, probe=probe or LanczosProbe(every=7, num_steps=4))
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    torch.manual_seed(1)
    readings = 0
    for batch[:] in problem.batches:

        def closure():
            optimizer.zero_grad()
            loss = loss_of(problem, batch)
            loss.backward()
            return loss

        if source == "closure":
            optimizer.step(closure)
        else:
            closure()
            optimizer.step()
        schedule.step()
        readings += source is not None and optimizer.report.reading is not None
    if source is not None:
        assert optimizer.control.gate.trusted is True  # or the comparison would be an empty one
    state = {k: v.clone() for k, v in problem.model.state_dict().items()}
    return state, torch.get_rng_state(), readings


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("name", MODELS)
def test_probed_constant_run_equals_the_bare_optimizer(name, base, source, dtype):
    bare, bare_rng, _ = run(name, base, dtype=dtype)
    probed, probed_rng, readings = run(name, base, source, dtype)
    assert readings == 8
    assert torch.equal(bare_rng, probed_rng)
    for key in bare:
        assert torch.equal(bare[key], probed[key]), key

"""sam and sgd: references written out, limits, what a loop may do around them, what they hand back."""

import copy

import pytest
import torch
from problems import BASES, make
from test_modes import OFF, assert_same, train, wrapped

from adaptive_opt import AdaptiveOptimizer, ConstantPolicy
from adaptive_opt.modes import KFAC, KFACSAM, SAM, BaseStep, SGDStep, StepContext


def heavy_ball(p):
    return torch.optim.SGD(p, lr=0.05, momentum=0.9)


def by_hand(problem, step, climb):
    """Training with a climb written out: the same masks at the top, batch-norm statistics of the first pass only."""
    params = list(problem.model.parameters())
    for x, y in problem.batches:
        rng = torch.get_rng_state()
        g = torch.autograd.grad(problem.criterion(problem.model(x), y), params)
        after, buffers = torch.get_rng_state(), [b.clone() for b in problem.model.buffers()]
        kept = [p.detach().clone() for p in params]
        with torch.no_grad():
            for p, e in zip(params, climb(kept, g), strict=True):
                p += e
        torch.set_rng_state(rng)
        g = torch.autograd.grad(problem.criterion(problem.model(x), y), params)
        torch.set_rng_state(after)
        with torch.no_grad():
            for p, old, grad in zip(params, kept, g, strict=True):
                p.copy_(old)
                p.grad = grad
            for b, old in zip(problem.model.buffers(), buffers, strict=True):
                b.copy_(old)
        step()


def norm(tensors):
    return torch.sqrt(sum((t**2).sum() for t in tensors))


CLIMBS = {  # Foret et al. and Kwon et al. (2021), written out
    "sam": (lambda: SAM(rho=0.05), lambda w, g: [0.05 * norm(w) * t / norm(g) for t in g]),
    "asam": (
        lambda: SAM(rho=0.5, adaptive=True),
        lambda w, g: [
            0.5 * (p.abs() + 0.01) ** 2 * t / norm([(q.abs() + 0.01) * s for q, s in zip(w, g, strict=True)])
            for p, t in zip(w, g, strict=True)
        ],
    ),
}


@pytest.mark.parametrize("name", CLIMBS)
@pytest.mark.parametrize("model", ["mlp", "cnn"])
def test_sam_equals_the_published_algorithm(model, name):
    """With batch normalisation and dropout too: weights, running statistics and random state, over ten steps."""
    mode, climb = CLIMBS[name]
    ours, reference = make(model, 10, dtype=torch.float64), make(model, 10, dtype=torch.float64)
    torch.manual_seed(1)
    train(ours, wrapped(ours, heavy_ball(ours.model.parameters()), "sam", mode()))
    rng = torch.get_rng_state()
    torch.manual_seed(1)
    by_hand(reference, heavy_ball(reference.model.parameters()).step, climb)
    assert torch.equal(rng, torch.get_rng_state())
    assert_same(ours.model, reference.model, rtol=1e-6, atol=1e-9)


def test_sams_gradient_in_kfacs_basis_is_kfac_on_that_gradient():
    ours, reference = make("mlp", 20, dtype=torch.float64), make("mlp", 20, dtype=torch.float64)
    mode = KFACSAM(rho=0.05, kfac=KFAC(every=8))
    train(ours, wrapped(ours, BASES["adamw"](ours.model.parameters()), "kfac_sam", mode))
    params = list(reference.model.parameters())
    base, inner = BASES["adamw"](params), KFAC(every=8)
    inner.enter(StepContext(base, params, list(range(len(params))), None))
    by_hand(reference, lambda: inner.step(StepContext(base, params, list(range(len(params))), None)), CLIMBS["sam"][1])
    assert mode.inner.coverage()
    assert_same(ours.model, reference.model, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("mode", [SAM(rho=1e-12), SAM(rho=1e-12, adaptive=True)], ids=["sam", "asam"])
def test_a_radius_next_to_nothing_is_the_base(mode):
    bare, other = make("mlp", 15, dtype=torch.float64), make("mlp", 15, dtype=torch.float64)
    train(bare, heavy_ball(bare.model.parameters()))
    train(other, wrapped(other, heavy_ball(other.model.parameters()), "sam", mode))
    assert_same(bare.model, other.model, rtol=1e-8, atol=1e-10)


def test_without_a_radius_kfac_sam_is_kfac_bit_for_bit():
    a, b = make("mlp", 15), make("mlp", 15)
    train(a, wrapped(a, BASES["adamw"](a.model.parameters()), "kfac", KFAC(every=3)))
    train(b, wrapped(b, BASES["adamw"](b.model.parameters()), "kfac_sam", KFACSAM(rho=0.0, kfac=KFAC(every=3))))
    assert_same(a.model, b.model, rtol=0, atol=0)


@pytest.mark.parametrize("source", ["closure", "objective"])
def test_closure_and_objective_climb_as_captured_batches_do(source):
    whole, other = make("cnn", 8), make("cnn", 8)
    torch.manual_seed(2)
    train(whole, wrapped(whole, heavy_ball(whole.model.parameters()), "sam", SAM(rho=0.05)))
    torch.manual_seed(2)
    batch = [None, None]
    given = {"objective": lambda: other.criterion(other.model(batch[0]), batch[1])} if source == "objective" else {}
    modes = {"base": BaseStep(), "sam": SAM(rho=0.05)}
    optimizer = AdaptiveOptimizer(
        heavy_ball(other.model.parameters()), other.model, **given, probe=OFF, policy=ConstantPolicy("sam"), modes=modes
    )
    for batch[:] in other.batches:

        def closure():
            optimizer.zero_grad()
            loss = other.criterion(other.model(batch[0]), batch[1])
            loss.backward()
            return loss

        if source == "closure":
            optimizer.step(closure)
        else:
            closure()
            optimizer.step()
    assert optimizer.report.treatment_cost == 8
    assert_same(whole.model, other.model, rtol=0, atol=0)


def test_micro_batches_climb_as_the_whole_batch_does():
    whole, cut = make("mlp", 10, dtype=torch.float64), make("mlp", 10, dtype=torch.float64)
    train(whole, wrapped(whole, heavy_ball(whole.model.parameters()), "sam", SAM(rho=0.05)))
    optimizer = wrapped(cut, heavy_ball(cut.model.parameters()), "sam", SAM(rho=0.05))
    for x, y in cut.batches:
        optimizer.zero_grad()
        for part, label in zip(x.chunk(4), y.chunk(4), strict=True):
            (cut.criterion(cut.model(part), label) / 4).backward()
        optimizer.step()
    assert_same(whole.model, cut.model, rtol=1e-8, atol=1e-10)


def test_the_gradient_at_the_top_is_held_to_the_users_clipping():
    problem = make("mlp", 12, dtype=torch.float64)
    optimizer = wrapped(problem, torch.optim.SGD(problem.model.parameters(), lr=0.1), "sam", SAM(rho=0.3))
    longest = 0.0
    for x, y in problem.batches:
        optimizer.zero_grad()
        problem.criterion(problem.model(x), y).backward()
        torch.nn.utils.clip_grad_norm_(problem.model.parameters(), 0.1)
        before = [p.detach().clone() for p in problem.model.parameters()]
        optimizer.step()
        longest = max(longest, float(norm([p.detach() - b for p, b in zip(problem.model.parameters(), before, strict=True)])))
    assert longest == pytest.approx(0.1 * 0.1, rel=1e-5)


@pytest.mark.parametrize("autocast", [False, True], ids=["float32", "bfloat16"])
def test_a_gradient_scaler_changes_nothing(autocast):
    ends = []
    for scaled in (False, True):
        problem = make("mlp", 12)
        optimizer = wrapped(problem, heavy_ball(problem.model.parameters()), "sam", SAM(rho=0.05))
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, enabled=scaled)
        for x, y in problem.batches:
            optimizer.zero_grad()
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
                loss = problem.criterion(problem.model(x), y)
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
        assert optimizer.report.treatment_cost == 12
        ends.append(problem.model)
    assert_same(*ends, rtol=1e-4, atol=1e-6)


def test_where_the_replay_fails_the_step_is_the_bases_own_bit_for_bit():
    bare, other = make("mlp", 3), make("mlp", 3)
    train(bare, heavy_ball(bare.model.parameters()))
    base = heavy_ball(other.model.parameters())
    params, mode = list(other.model.parameters()), SAM(rho=0.05)

    class Fails:
        def __init__(self):
            self.params = params

        def gradient(self):
            raise RuntimeError("no batch")

    for x, y in other.batches:
        base.zero_grad()
        other.criterion(other.model(x), y).backward()
        ctx = StepContext(base, params, list(range(len(params))), Fails())
        mode.step(ctx)
        assert "no batch" in str(ctx.failure)
    assert_same(bare.model, other.model, rtol=0, atol=0)


# ---- sgd ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("base", ["adamw", "rmsprop"])
def test_sgd_hands_back_moments_of_the_gradients_it_has_seen(base):
    """As if the base had been shown them all along, and had been told nothing of where they led."""
    problem = make("mlp", 40, dtype=torch.float64)
    optimizer = BASES[base](problem.model.parameters())
    params = list(problem.model.parameters())
    mode = SGDStep(warm_up=5)
    ctx = StepContext(optimizer, params, list(range(len(params))), None)
    mode.enter(ctx)
    alone = [p.detach().clone().requires_grad_() for p in params]
    shown = BASES[base](alone)
    for x, y in problem.batches:
        optimizer.zero_grad()
        problem.criterion(problem.model(x), y).backward()
        for p, q in zip(params, alone, strict=True):
            q.grad = p.grad.clone()
        shown.step()
        mode.step(ctx)
    mode.exit(ctx)
    assert not torch.equal(params[0], alone[0])
    for p, q in zip(params, alone, strict=True):
        for name, value in shown.state[q].items():
            torch.testing.assert_close(optimizer.state[p][name], value, rtol=1e-12, atol=0)


def test_sgd_begins_with_the_momentum_of_adam():
    p = torch.zeros(10, dtype=torch.float64, requires_grad=True)
    base = torch.optim.Adam([p], lr=0.1)
    mode, ctx = SGDStep(momentum=0.9, warm_up=3), StepContext(base, [p], [0], None)
    mode.enter(ctx)
    g = torch.randn(10, dtype=torch.float64)
    for _ in range(3):
        p.grad = g.clone()
        mode.step(ctx)
    before = p.detach().clone()
    p.grad = g.clone()
    mode.step(ctx)
    step = before - p.detach()  # a constant gradient: the sum of 1 / (1 - momentum) of them, at gamma (1 - momentum)
    torch.testing.assert_close(step / step.norm(), g / g.norm())
    torch.testing.assert_close(step @ g, step.norm() * g.norm())
    adams = 0.1 * g.sign()
    torch.testing.assert_close(step, adams @ adams / (adams @ g) * g, rtol=1e-5, atol=0)


def test_an_estimate_on_one_batch_whose_gradient_opposes_the_step_is_outvoted():
    torch.manual_seed(0)
    p = torch.zeros(50, dtype=torch.float64, requires_grad=True)
    base = torch.optim.Adam([p], lr=0.01)
    mode, ctx = SGDStep(warm_up=20), StepContext(base, [p], [0], None)
    mode.enter(ctx)
    for t in range(20):
        p.grad = torch.ones(50, dtype=torch.float64) * (-0.2 if t == 10 else 1.0) + 0.1 * torch.randn(50)
        mode.step(ctx)
    gamma = mode._size / mode._along
    assert 0.5 < gamma < 2  # Adam's step is lr in every entry, the gradient about 1: their ratio is 1


def test_a_run_in_sgd_mode_goes_on_from_a_checkpoint_bit_for_bit():
    whole, cut = make("mlp", 30), make("mlp", 30)
    train(whole, wrapped(whole, BASES["adamw"](whole.model.parameters()), "sgd", SGDStep()))
    b = wrapped(cut, BASES["adamw"](cut.model.parameters()), "sgd", SGDStep())
    train(cut, b, until=17)
    state = copy.deepcopy(b.state_dict())
    b.detach()
    c = wrapped(cut, BASES["adamw"](cut.model.parameters()), "sgd", SGDStep())
    c.load_state_dict(state)
    cut.batches = cut.batches[17:]
    train(cut, c)
    assert_same(whole.model, cut.model, rtol=0, atol=0)

"""Modes: identities first, then independent references, then every mode on every problem."""

import copy

import pytest
import torch
from problems import BASES, MODELS, make

from adaptive_opt import AdaptiveOptimizer, ConstantPolicy, LanczosProbe
from adaptive_opt.modes import KFAC, MODES, SAM, BaseStep, SGDStep, StepContext
from adaptive_opt.modes import kronecker as kron

OFF = LanczosProbe(overhead=0)


def train(problem, optimizer, until=None):
    losses = []
    for x, y in problem.batches[:until]:
        optimizer.zero_grad()
        loss = problem.criterion(problem.model(x), y)
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    return losses


def wrapped(problem, base, mode, instance):
    modes = {"base": BaseStep(), mode: instance}
    given = {"model": problem.model, "loss_fn": problem.criterion}
    return AdaptiveOptimizer(base, **given, probe=OFF, policy=ConstantPolicy(mode), modes=modes)


def assert_same(a, b, **tol):
    for (name, x), y in zip(a.state_dict().items(), b.state_dict().values(), strict=True):
        torch.testing.assert_close(x.double(), y.double(), msg=lambda m, name=name: f"{name}: {m}", **tol)


@pytest.mark.parametrize(
    ("mode", "limit"),
    [("sam", SAM(rho=0.0)), ("kfac", KFAC(max_dim=1, beta2=0.9999))],
    ids=["sam with rho 0", "kfac with no side to rotate"],
)
@pytest.mark.parametrize("base", BASES)
def test_in_its_limit_a_mode_is_the_base_bit_for_bit(mode, limit, base):
    bare, other = make("cnn", 15), make("cnn", 15)
    torch.manual_seed(1)
    train(bare, BASES[base](bare.model.parameters()))
    torch.manual_seed(1)
    train(other, wrapped(other, BASES[base](other.model.parameters()), mode, limit))
    assert_same(bare.model, other.model, rtol=0, atol=0)


def test_sam_equals_the_published_algorithm():
    ours, reference = make("mlp", 10, dtype=torch.float64), make("mlp", 10, dtype=torch.float64)
    train(ours, wrapped(ours, torch.optim.SGD(ours.model.parameters(), lr=0.1, momentum=0.9), "sam", SAM(rho=0.05)))

    params = list(reference.model.parameters())
    momentum = [torch.zeros_like(p) for p in params]
    for x, y in reference.batches:  # Foret et al. (2021), algorithm 1, written out
        g = torch.autograd.grad(reference.criterion(reference.model(x), y), params)
        norm_g = torch.sqrt(sum((t**2).sum() for t in g))
        norm_w = torch.sqrt(sum((p**2).sum() for p in params))
        w = [p.detach().clone() for p in params]
        with torch.no_grad():
            for p, t in zip(params, g, strict=True):
                p += 0.05 * norm_w * t / norm_g
        g = torch.autograd.grad(reference.criterion(reference.model(x), y), params)
        with torch.no_grad():
            for p, old, m, t in zip(params, w, momentum, g, strict=True):
                m.mul_(0.9).add_(t)
                p.copy_(old - 0.1 * m)
    assert_same(ours.model, reference.model, rtol=1e-6, atol=1e-9)


def test_sam_gives_the_user_back_the_gradient_that_was_there():
    problem = make("mlp", 1)
    optimizer = wrapped(problem, torch.optim.SGD(problem.model.parameters(), lr=0.1), "sam", SAM(rho=0.1))
    x, y = problem.batches[0]
    problem.criterion(problem.model(x), y).backward()
    grads = [(p.grad, p.grad.clone()) for p in problem.model.parameters()]
    optimizer.step()
    for p, (same, value) in zip(problem.model.parameters(), grads, strict=True):
        assert p.grad is same
        assert torch.equal(p.grad, value)


def test_sam_every_second_step_climbs_every_second_step():
    problem = make("mlp", 6)
    optimizer = wrapped(problem, torch.optim.SGD(problem.model.parameters(), lr=0.1), "sam", SAM(rho=0.1, every=2))
    train(problem, optimizer)
    assert optimizer.report.treatment_cost == 3


def test_kfac_step_equals_an_independent_reference_of_soap():
    """Adam's rule on the gradient rotated by eigh of the averaged G G' and G'G, rotated back."""
    torch.manual_seed(0)
    beta, beta1, beta2, eps, lr, every = 0.9, 0.9, 0.95, 1e-8, 0.01, 4
    W = torch.randn(5, 7, dtype=torch.float64, requires_grad=True)
    mode, base = KFAC(beta=beta, beta2=beta2, every=every), torch.optim.Adam([W], lr=lr, betas=(beta1, beta2), eps=eps)
    grads = [torch.randn(5, 7, dtype=torch.float64) for _ in range(2 * every - 1)]

    w, L, R = W.detach().clone(), torch.zeros(5, 5).double(), torch.zeros(7, 7).double()
    m, v = torch.zeros(5, 7).double(), torch.zeros(5, 7).double()
    QL, QR = torch.eye(5).double(), torch.eye(7).double()
    mode.enter(StepContext(base, [W], [0], None))
    for t, G in enumerate(grads, 1):
        W.grad = G.clone()
        mode.step(StepContext(base, [W], [0], None))

        L, R = beta * L + (1 - beta) * G @ G.T, beta * R + (1 - beta) * G.T @ G
        if t == every:  # the one change of basis: moments carried over, second moment from the eigenvalues
            (left, QL), (right, QR) = torch.linalg.eigh(L / (1 - beta**t)), torch.linalg.eigh(R / (1 - beta**t))
            m = QL.T @ m @ QR
            v = torch.outer(left.clamp_min(0), right.clamp_min(0)) / left.clamp_min(0).sum() * (1 - beta2 ** (t - 1))
        g = QL.T @ G @ QR
        m, v = beta1 * m + (1 - beta1) * g, beta2 * v + (1 - beta2) * g * g
        step = lr * (m / (1 - beta1**t)) / ((v / (1 - beta2**t)).sqrt() + eps)
        w = w - QL @ step @ QR.T
        torch.testing.assert_close(W.detach(), w, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("base", ["adamw", "rmsprop"])
def test_into_kfac_and_out_again_leaves_the_bases_state(base):
    problem = make("mlp", 30)
    optimizer = BASES[base](problem.model.parameters())
    train(problem, optimizer)
    before = copy.deepcopy(optimizer.state_dict()["state"])
    params = list(problem.model.parameters())
    ctx = StepContext(optimizer, params, list(range(len(params))), None)
    mode = KFAC()
    mode.enter(ctx)
    mode.exit(ctx)
    for i, state in optimizer.state_dict()["state"].items():
        for key, value in state.items():
            torch.testing.assert_close(value, before[i][key], rtol=1e-6, atol=0)


def test_first_moments_survive_a_change_of_basis_and_back():
    torch.manual_seed(0)
    W = torch.randn(6, 4, dtype=torch.float64, requires_grad=True)
    base = torch.optim.Adam([W], lr=0.0)
    mode = KFAC(every=2)
    ctx = StepContext(base, [W], [0], None)
    mode.enter(ctx)
    plain = torch.zeros(6, 4, dtype=torch.float64)
    for _ in range(7):
        W.grad = torch.randn(6, 4, dtype=torch.float64)
        plain = 0.9 * plain + 0.1 * W.grad
        mode.step(ctx)
    mode.exit(ctx)
    torch.testing.assert_close(base.state[W]["exp_avg"], plain, rtol=1e-10, atol=1e-12)


def test_kfac_gives_sgd_steps_of_the_bases_own_norm():
    problem = make("mlp", 12, dtype=torch.float64)
    base = torch.optim.SGD(problem.model.parameters(), lr=0.1)
    optimizer = wrapped(problem, base, "kfac", KFAC(every=2))
    train(problem, optimizer, until=6)
    x, y = problem.batches[7]
    optimizer.zero_grad()
    problem.criterion(problem.model(x), y).backward()
    before = [p.detach().clone() for p in problem.model.parameters()]
    optimizer.step()
    for p, old in zip(problem.model.parameters(), before, strict=True):
        torch.testing.assert_close((p.detach() - old).norm(), 0.1 * p.grad.norm(), rtol=1e-9, atol=0)


def test_kfac_says_what_it_covers_and_leaves_long_sides_alone():
    problem = make("transformer", 12)
    mode = KFAC(every=5, max_dim=40)
    optimizer = wrapped(problem, BASES["adamw"](problem.model.parameters()), "kfac", mode)
    train(problem, optimizer)
    names = [n for n, _ in problem.model.named_parameters()]
    covered = {names[i]: sides for i, sides in mode.coverage().items()}
    assert covered["qkv.weight"] == "right"  # 48 rows are more than 40
    assert covered["out.weight"] == "both sides"
    assert not any("bias" in name or "norm" in name for name in covered)


def test_an_exception_in_the_bases_step_leaves_kfac_parameters_as_they_were():
    class Fails(torch.optim.AdamW):
        fail = False

        def step(self, closure=None):
            if self.fail:
                raise RuntimeError("no")
            return super().step(closure)

    problem = make("mlp", 12)
    base = Fails(problem.model.parameters(), lr=1e-3)
    optimizer = wrapped(problem, base, "kfac", KFAC(every=2))
    train(problem, optimizer, until=6)
    x, y = problem.batches[7]
    problem.criterion(problem.model(x), y).backward()
    before = [(p.detach().clone(), p.grad) for p in problem.model.parameters()]
    Fails.fail = True
    with pytest.raises(RuntimeError, match="no"):
        optimizer.step()
    for p, (value, grad) in zip(problem.model.parameters(), before, strict=True):
        assert torch.equal(p, value)
        assert p.grad is grad


def test_sgd_takes_its_learning_rate_from_the_bases_steps():
    """For a base whose step is c * g the estimate is c, by SWATS' formula."""
    p = torch.randn(10, dtype=torch.float64, requires_grad=True)
    base = torch.optim.RMSprop([p], lr=0.1, alpha=0.0, eps=1e6)  # 1 / (|g| + 1e6) is constant: a plain c
    mode = SGDStep(momentum=0.0, warm_up=3)
    ctx = StepContext(base, [p], [0], None)
    mode.enter(ctx)
    for _ in range(3):
        p.grad = torch.randn(10, dtype=torch.float64)
        mode.step(ctx)
    before = p.detach().clone()
    p.grad = torch.randn(10, dtype=torch.float64)
    mode.step(ctx)
    torch.testing.assert_close(p.detach() - before, -0.1 / 1e6 * p.grad, rtol=1e-5, atol=0)


def test_an_sgd_base_in_sgd_mode_is_itself_bit_for_bit():
    bare, other = make("mlp", 15), make("mlp", 15)
    train(bare, BASES["sgd"](bare.model.parameters()))
    train(other, wrapped(other, BASES["sgd"](other.model.parameters()), "sgd", SGDStep()))
    assert_same(bare.model, other.model, rtol=0, atol=0)


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("mode", MODES)
def test_every_mode_trains_every_problem(mode, name, base):
    problem = make(name, 40)
    optimizer = wrapped(problem, BASES[base](problem.model.parameters()), mode, MODES[mode]())
    losses = train(problem, optimizer)
    assert optimizer.report.mode == mode
    assert sum(losses[-10:]) < sum(losses[:10])


@pytest.mark.parametrize(
    "bad", [lambda: SAM(rho=-1), lambda: KFAC(beta=1.0), lambda: KFAC(every=0), lambda: SGDStep(momentum=1)]
)
def test_hyperparameters_that_make_no_sense_are_refused(bad):
    with pytest.raises(ValueError, match=r"\(.*="):
        bad()


def test_eigenbasis_is_orthonormal_and_diagonalises():
    G = torch.randn(6, 9, dtype=torch.float64)
    L = G @ G.T
    values, Q = kron.eigenbasis(L)
    torch.testing.assert_close(Q.T @ Q, torch.eye(6).double(), rtol=0, atol=1e-12)
    torch.testing.assert_close(kron.rotate(L, Q, Q), torch.diag(values), rtol=0, atol=1e-11)

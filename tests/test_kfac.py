"""kfac: identities, float64 references of the steps and of the factors, what is covered, what it holds, what it survives."""

import copy

import pytest
import torch
from oracles import LiveBytes
from problems import BASES, make
from test_modes import OFF, assert_same, train, wrapped
from torch import nn
from torch.nn import functional as F

from adaptive_opt import AdaptiveOptimizer, ConstantPolicy
from adaptive_opt.modes import KFAC, BaseStep, StepContext
from adaptive_opt.modes import kronecker as kron
from adaptive_opt.modes.factors import Block, Factors, interval, share_out
from adaptive_opt.modes.taps import samples

o = torch.optim
ELEMENTWISE = {
    "Adam": lambda p: o.Adam(p, lr=3e-3, weight_decay=1e-2),
    "AdamW": lambda p: o.AdamW(p, lr=3e-3, amsgrad=True),
    "NAdam": lambda p: o.NAdam(p, lr=3e-3, weight_decay=1e-2, decoupled_weight_decay=True),
    "RAdam": lambda p: o.RAdam(p, lr=3e-3),
    "Adamax": lambda p: o.Adamax(p, lr=3e-3, weight_decay=1e-3),
    "RMSprop": lambda p: o.RMSprop(p, lr=1e-3, momentum=0.5, centered=True),
    "Adagrad": lambda p: o.Adagrad(p, lr=1e-2),
    "Adadelta": lambda p: o.Adadelta(p, lr=1.0),
    "Rprop": lambda p: o.Rprop(p, lr=1e-3),
}
LINEAR = {
    "SGD": lambda p: o.SGD(p, lr=0.05, momentum=0.9),
    "Nesterov": lambda p: o.SGD(p, lr=0.02, momentum=0.9, nesterov=True, weight_decay=1e-3),
    "ASGD": lambda p: o.ASGD(p, lr=0.05, t0=5),
}


def context(base, *params, indices=None):
    return StepContext(base, list(params), list(range(len(params))) if indices is None else indices, None)


def identity(mode, params):
    """The mode's factors at the identity, and every basis due at the next step."""
    for i, p in enumerate(params):
        if p.dim() >= 2:
            mode._factors[i] = mode._made(p)
            for b in mode._factors[i].blocks:
                b.factor.copy_(torch.eye(b.size))
                b.weight, b.due = 1.0, 1


# ---- identities ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ELEMENTWISE)
def test_with_identity_factors_on_and_off_again_is_the_base_bit_for_bit(name):
    """In at step 10, one step in the basis of identity factors, out at step 11, on until 20."""
    bare, other = make("mlp", 20), make("mlp", 20)
    optimizers = [ELEMENTWISE[name](p.model.parameters()) for p in (bare, other)]
    mode = KFAC(beta2=None, beta=1 - 1e-12)
    turned = False
    for step in range(20):
        for problem, optimizer in zip((bare, other), optimizers, strict=True):
            torch.manual_seed(step)
            x, y = problem.batches[step]
            optimizer.zero_grad()
            problem.criterion(problem.model(x), y).backward()
            if problem is other and step == 10:
                params = list(problem.model.parameters())
                ctx = context(optimizer, *params)
                mode.enter(ctx)
                identity(mode, params)
                for f in mode._factors.values():
                    f.note = "as they are"
                mode.update_every = 2  # no gradient joins them
                mode._count = 1
                mode.step(ctx)
                turned = all(f.turned for f in mode._factors.values() if f.blocks)
                mode.exit(ctx)
            else:
                optimizer.step()
    assert turned
    twice_rounded = {"rtol": 1e-5, "atol": 1e-6} if name in ("NAdam", "RMSprop") else {"rtol": 0, "atol": 0}  # adds from zero
    assert_same(bare.model, other.model, **twice_rounded)


@pytest.mark.parametrize("source", ["gradient", "kfac"])
@pytest.mark.parametrize("name", LINEAR)
def test_without_bound_on_the_damping_a_linear_base_is_itself(name, source):
    bare, other = make("mlp", 15, dtype=torch.float64), make("mlp", 15, dtype=torch.float64)
    train(bare, LINEAR[name](bare.model.parameters()))
    mode = KFAC(source, damping=1e18, every=2, update_every=1)
    train(other, wrapped(other, LINEAR[name](other.model.parameters()), "kfac", mode))
    assert all("both sides" in how for how in mode.coverage().values())
    assert_same(bare.model, other.model, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("name", ["AdamW", "RMSprop", "Rprop"])
def test_what_is_not_preconditioned_takes_the_bases_own_step_bit_for_bit(name):
    """Biases have the base's beta2 and decay also while the weights beside them are in another basis."""
    torch.manual_seed(0)
    W, bias, alone = (torch.randn(s, requires_grad=True) for s in ((6, 5), (6,), (6,)))
    with torch.no_grad():
        alone.copy_(bias)
    base, bare = ELEMENTWISE[name]([W, bias]), ELEMENTWISE[name]([alone])
    mode, ctx = KFAC(every=2), context(base, W, bias)
    mode.enter(ctx)
    for _ in range(12):
        W.grad, bias.grad = torch.randn(6, 5), torch.randn(6)
        alone.grad = bias.grad.clone()
        mode.step(ctx)
        bare.step()
    assert mode.coverage()[0].startswith("both sides")
    assert torch.equal(bias, alone)
    assert base.param_groups[0]["params"] == [W, bias]


def test_rmsprop_keeps_its_own_alpha():
    """Without momentum a shorter memory is noise: docs/evidence.md, "modes"."""
    a, b = make("mlp", 15), make("mlp", 15)
    for problem, beta2 in ((a, 0.5), (b, None)):
        train(problem, wrapped(problem, o.RMSprop(problem.model.parameters(), lr=1e-3), "kfac", KFAC(every=3, beta2=beta2)))
    assert_same(a.model, b.model, rtol=0, atol=0)


# ---- references ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["eigh", "qr"])
def test_the_step_equals_an_independent_reference_of_soap(method):
    """Adam's rule on the gradient rotated by the eigenbasis of the averaged G G' and G'G, rotated back; three bases."""
    torch.manual_seed(0)
    beta, beta1, beta2, eps, lr, every, decay = 0.9, 0.9, 0.95, 1e-8, 0.01, 4, 0.1
    W = torch.randn(5, 7, dtype=torch.float64, requires_grad=True)
    mode = KFAC(beta=beta, beta2=beta2, every=every, method=method)
    base = o.AdamW([W], lr=lr, betas=(beta1, 0.999), eps=eps, weight_decay=decay)
    ctx = context(base, W)
    mode.enter(ctx)

    w, m, v = W.detach().clone(), torch.zeros(5, 7).double(), torch.zeros(5, 7).double()
    factor = {"L": torch.zeros(5, 5).double(), "R": torch.zeros(7, 7).double()}
    Q = {"L": torch.eye(5).double(), "R": torch.eye(7).double()}
    due = {"R": every, "L": every + 1}  # one side a step, the larger first
    seen = set()
    for t in range(1, 4 * every):
        G = torch.randn(5, 2, dtype=torch.float64) @ torch.randn(2, 7, dtype=torch.float64)
        W.grad = G.clone()
        mode.step(ctx)
        factor["L"] = beta * factor["L"] + (1 - beta) * G @ G.T
        factor["R"] = beta * factor["R"] + (1 - beta) * G.T @ G
        for side, F_ in factor.items():
            if t != due[side]:
                continue
            due[side] += every
            old = Q[side]
            if method == "eigh" or side not in seen:
                Q[side] = torch.linalg.eigh(F_)[1]
            else:
                rayleigh = torch.einsum("ij,ik,kj->j", old, F_, old)
                Q[side] = torch.linalg.qr(F_ @ old[:, torch.argsort(-rayleigh)])[0]
            T = torch.einsum("ki,kj->ij", old, Q[side])
            implied = torch.einsum("ij,i->j", T**2, torch.einsum("ij,ik,kj->j", old, F_, old))
            known = torch.einsum("ij,ik,kj->j", Q[side], F_, Q[side])
            if side == "L":
                m, plain, c = T.T @ m, (T**2).T @ v, (known / implied)[:, None]
            else:
                m, plain, c = m @ T, v @ T**2, known / implied
            b2 = beta2 if seen else 0.999  # the base's own before its first basis
            seen.add(side)
            mean = m / (1 - beta1 ** (t - 1))
            v = torch.maximum(c * plain, torch.minimum(plain, (1 - b2 ** (t - 1)) * mean**2))
            if len(seen) == 1:
                v = v * (1 - beta2 ** (t - 1)) / (1 - 0.999 ** (t - 1))
        b2 = beta2 if seen else 0.999
        g = Q["L"].T @ G @ Q["R"]
        m, v = beta1 * m + (1 - beta1) * g, b2 * v + (1 - b2) * g * g
        step = lr * (m / (1 - beta1**t)) / ((v / (1 - b2**t)).sqrt() + eps)
        w = (1 - lr * decay) * w - Q["L"] @ step @ Q["R"].T
        torch.testing.assert_close(W.detach(), w, rtol=1e-6, atol=1e-7)
    assert seen == {"L", "R"}


def test_layer_factors_equal_the_exact_expectations_on_a_linear_net():
    """y = W2 W1 x, half the squared distance: A = E[a a'] and G = E[g g'] in closed form, for both layers."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 6, bias=False), nn.Linear(6, 3, bias=False)).double()
    x, y = torch.randn(50, 4).double(), torch.randn(50, 3).double()
    base = o.AdamW(net.parameters(), lr=1e-3)
    mode = KFAC("kfac", update_every=1, beta=0.5)
    mode.listen(net, base)
    mode.enter(context(base, *net.parameters()))
    for _ in range(3):  # the bias of the running mean is corrected, whatever beta
        (0.5 * (net(x) - y).square().sum(1)).mean().backward()
    W1, W2 = (p.detach() for p in net.parameters())
    error = x @ W1.T @ W2.T - y
    expected = {0: (error @ W2, x), 1: (error, x @ W1.T)}
    for i, (g, a) in expected.items():
        f = mode._factors[i]
        torch.testing.assert_close(f.left[0].estimate, g.T @ g / 50, rtol=1e-12, atol=1e-13)
        torch.testing.assert_close(f.right[0].estimate, a.T @ a / 50, rtol=1e-12, atol=1e-13)


LAYERS = {
    "linear": (lambda: nn.Linear(5, 4), (3, 5)),
    "linear on tokens": (lambda: nn.Linear(5, 4), (3, 7, 5)),
    "linear on one": (lambda: nn.Linear(5, 4), (5,)),
    "conv2d": (lambda: nn.Conv2d(4, 6, (3, 2), stride=2, padding=1, dilation=(2, 1)), (3, 4, 9, 8)),
    "conv2d, groups": (lambda: nn.Conv2d(4, 6, 3, groups=2, padding="same", padding_mode="reflect"), (3, 4, 7, 7)),
    "conv2d, one image": (lambda: nn.Conv2d(2, 3, 3), (2, 6, 6)),
    "conv1d": (lambda: nn.Conv1d(4, 6, 3, stride=2, dilation=2, groups=2, padding=2), (3, 4, 15)),
}


@pytest.mark.parametrize("name", LAYERS)
def test_the_samples_of_a_layer_make_up_its_gradient(name):
    """sum over samples of g a' is the weight's gradient, group by group: no position, stride or padding is left out."""
    layer, shape = LAYERS[name][0]().double(), LAYERS[name][1]
    x = torch.randn(*shape, dtype=torch.float64)
    out = layer(x)
    out.retain_grad()
    out.sin().sum().backward()
    a, g = samples(layer, x, out.grad, "expand")
    groups = getattr(layer, "groups", 1)
    a = a.reshape(shape[0] if len(a) > len(g) else 1, groups, -1, a.shape[-1]).transpose(0, 1).flatten(1, 2)
    parts = g.reshape(-1, groups, g.shape[-1] // groups).transpose(0, 1)
    made = torch.cat([part.T @ rows for part, rows in zip(parts, a, strict=True)])
    torch.testing.assert_close(made, layer.weight.grad.flatten(1), rtol=1e-10, atol=1e-12)


def test_reduce_averages_inputs_and_sums_gradients_over_positions():
    x, g = torch.randn(3, 7, 5), torch.randn(3, 7, 4)
    a, s = samples(nn.Linear(5, 4), x, g, "reduce")
    torch.testing.assert_close(a, x.mean(1))
    torch.testing.assert_close(s, g.sum(1))


def test_an_embedding_has_output_gradients_only_and_none_of_the_padding():
    layer = nn.Embedding(6, 4, padding_idx=0)
    g = torch.randn(2, 3, 4)
    a, s = samples(layer, torch.tensor([[1, 0, 2], [0, 0, 5]]), g, "expand")
    assert a is None
    torch.testing.assert_close(s[[0, 2, 5]], g.reshape(-1, 4)[[0, 2, 5]])
    assert not s[[1, 3, 4]].any()


def test_ekfac_equals_the_second_moment_of_the_samples_gradients_in_the_basis():
    torch.manual_seed(0)
    net = nn.Linear(5, 4, bias=False).double()
    base = o.SGD(net.parameters(), lr=0.0)
    mode = KFAC("kfac", update_every=1, every=1, beta=0.9)
    mode.listen(net, base)
    ctx = context(base, net.weight)
    mode.enter(ctx)
    for _ in range(2):  # both sides have a basis after the first step; the second is measured in it
        x = torch.randn(40, 5).double()
        base.zero_grad()
        net(x).square().sum(1).mean().backward()
        f = mode._factors.get(0)
        bases = (f.left[0].Q, f.right[0].Q) if f is not None and f.complete else None
        S = None if f is None or f.S is None else f.S.clone()
        mode.step(ctx)
    assert bases is not None
    QL, QR = bases
    per_sample = torch.stack([QL.T @ torch.outer(2 * net.weight.detach() @ row, row) @ QR for row in x])
    torch.testing.assert_close(S, per_sample.square().mean(0), rtol=1e-10, atol=1e-12)


def test_a_linear_base_with_layer_factors_steps_along_the_damped_inverse():
    """(G + gamma_G)^-1 s (A + gamma_A)^-1 with the pi-split, at the length of the base's own step s."""
    torch.manual_seed(0)
    net = nn.Linear(5, 4, bias=False).double()
    base = o.SGD(net.parameters(), lr=0.1)
    mode = KFAC("kfac", update_every=1, every=1, damping=0.1, ekfac=False, beta=0.9)
    mode.listen(net, base)
    ctx = context(base, net.weight)
    mode.enter(ctx)
    for _ in range(3):
        base.zero_grad()
        net(torch.randn(40, 5).double()).square().sum(1).mean().backward()
        before, g = net.weight.detach().clone(), net.weight.grad.clone()
        mode.step(ctx)
    G, A = mode._factors[0].left[0].estimate, mode._factors[0].right[0].estimate
    lam = 0.1 * G.trace() / 4 * A.trace() / 5
    pi = ((A.trace() / 5) / (G.trace() / 4)).sqrt()
    s = -0.1 * g
    D = torch.linalg.inv(G + lam.sqrt() / pi * torch.eye(4)) @ s @ torch.linalg.inv(A + lam.sqrt() * pi * torch.eye(5))
    torch.testing.assert_close(net.weight.detach() - before, D * s.norm() / D.norm(), rtol=1e-7, atol=1e-9)


def test_kfac_gives_sgd_steps_of_the_bases_own_norm():
    problem = make("mlp", 12, dtype=torch.float64)
    base = o.SGD(problem.model.parameters(), lr=0.1)
    optimizer = wrapped(problem, base, "kfac", KFAC(every=2))
    train(problem, optimizer, until=6)
    x, y = problem.batches[7]
    optimizer.zero_grad()
    problem.criterion(problem.model(x), y).backward()
    before = [p.detach().clone() for p in problem.model.parameters()]
    optimizer.step()
    for p, old in zip(problem.model.parameters(), before, strict=True):
        torch.testing.assert_close((p.detach() - old).norm(), 0.1 * p.grad.norm(), rtol=1e-9, atol=0)


# ---- state ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ELEMENTWISE)
def test_into_kfac_and_out_again_before_any_basis_leaves_the_bases_state(name):
    problem = make("mlp", 30)
    optimizer = ELEMENTWISE[name](problem.model.parameters())
    train(problem, optimizer)
    before = copy.deepcopy(optimizer.state_dict()["state"])
    ctx = context(optimizer, *problem.model.parameters())
    mode = KFAC()
    mode.enter(ctx)
    mode.exit(ctx)
    for i, state in optimizer.state_dict()["state"].items():
        for key, value in state.items():
            torch.testing.assert_close(value, before[i][key], rtol=0, atol=0)


def test_first_moments_survive_changes_of_basis_and_back():
    torch.manual_seed(0)
    W = torch.randn(6, 4, dtype=torch.float64, requires_grad=True)
    base = o.Adam([W], lr=0.0)
    mode = KFAC(every=2, max_dim=3)
    ctx = context(base, W)
    mode.enter(ctx)
    plain = torch.zeros(6, 4, dtype=torch.float64)
    for _ in range(9):
        W.grad = torch.randn(6, 4, dtype=torch.float64)
        plain = 0.9 * plain + 0.1 * W.grad
        mode.step(ctx)
    assert "2 blocks" in mode.coverage()[0]
    mode.exit(ctx)
    torch.testing.assert_close(base.state[W]["exp_avg"], plain, rtol=1e-10, atol=1e-12)


def test_a_carried_second_moment_is_the_true_one_where_the_gradient_has_the_factors_covariance():
    """G = A^1/2 Z B^1/2: E[(Q'GQ)^2] = l r', in the eigenbasis and back; the squared rotation alone would flatten it."""
    torch.manual_seed(0)
    A, B = (X @ X.T for X in (torch.randn(6, 6).double(), torch.randn(5, 5).double()))
    W = torch.zeros(6, 5, dtype=torch.float64, requires_grad=True)
    base = o.Adam([W], lr=0.0)
    base.state[W] = {"step": torch.tensor(1000.0), "exp_avg": torch.zeros(6, 5).double()}
    base.state[W]["exp_avg_sq"] = torch.outer(A.diagonal(), B.diagonal()).clone()
    mode, ctx = KFAC(beta2=None), context(base, W)
    mode.enter(ctx)
    f = mode._factors[0] = mode._made(W)
    for block, factor in zip(f.blocks, (A, B), strict=True):
        block.factor.copy_(factor)
        block.weight, block.due = 1.0, 1
    mode._count = 1
    mode._turn(ctx)
    eigenvalues = torch.outer(torch.linalg.eigvalsh(A), torch.linalg.eigvalsh(B))
    torch.testing.assert_close(base.state[W]["exp_avg_sq"], eigenvalues, rtol=1e-8, atol=1e-10)
    mode.exit(ctx)
    torch.testing.assert_close(base.state[W]["exp_avg_sq"], torch.outer(A.diagonal(), B.diagonal()), rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("source", ["gradient", "kfac"])
@pytest.mark.parametrize("name", [*ELEMENTWISE, *LINEAR])
def test_every_rule_of_torch_trains_in_the_mode_and_out_of_it(name, source):
    problem = make("transformer", 80)
    base = {**ELEMENTWISE, **LINEAR}[name](problem.model.parameters())
    mode = KFAC(source, every=3, max_dim=20, update_every=2)
    optimizer = wrapped(problem, base, "kfac", mode)
    optimizer.sinks.append(lambda report: None)  # or a wrapper that has nothing to do would not even look at the policy
    losses = train(problem, optimizer, until=40)
    optimizer.control.policy = ConstantPolicy("base")
    problem.batches = problem.batches[40:]
    losses += train(problem, optimizer)
    assert optimizer.report.mode == "base"
    assert sum(losses[-10:]) < sum(losses[:10])
    assert max(losses[40:45]) < max(losses[30:40]) + 0.5  # no spike at the way out


@pytest.mark.parametrize("source", ["gradient", "kfac"])
def test_a_run_goes_on_from_a_checkpoint_bit_for_bit(source):
    whole, cut = make("cnn", 30), make("cnn", 30)
    modes = [KFAC(source, every=4, update_every=3) for _ in range(3)]
    torch.manual_seed(3)
    a = wrapped(whole, BASES["adamw"](whole.model.parameters()), "kfac", modes[0])
    train(whole, a)
    torch.manual_seed(3)
    b = wrapped(cut, BASES["adamw"](cut.model.parameters()), "kfac", modes[1])
    train(cut, b, until=13)
    state = copy.deepcopy(b.state_dict())
    b.detach()
    c = wrapped(cut, BASES["adamw"](cut.model.parameters()), "kfac", modes[2])
    c.load_state_dict(state)
    cut.batches = cut.batches[13:]
    train(cut, c)
    assert_same(whole.model, cut.model, rtol=0, atol=0)


def test_a_copied_optimizer_leaves_the_hooks_behind():
    problem = make("mlp", 10)
    mode = KFAC("kfac", every=2, update_every=1)
    optimizer = wrapped(problem, BASES["adamw"](problem.model.parameters()), "kfac", mode)
    train(problem, optimizer, until=5)
    twin = copy.deepcopy((problem.model, optimizer))
    heard = mode._factors[0].left[0].weight
    x, y = problem.batches[6]
    problem.criterion(twin[0](x), y).backward()
    assert mode._factors[0].left[0].weight == heard
    optimizer.detach()
    assert not any(m._forward_hooks for m in problem.model.modules())


# ---- coverage --------------------------------------------------------------------------------------------------------


def test_it_says_what_it_covers_and_cuts_long_sides_into_blocks():
    problem = make("transformer", 12)
    mode = KFAC(every=5, max_dim=20, max_blocks=2)
    optimizer = wrapped(problem, BASES["adamw"](problem.model.parameters()), "kfac", mode)
    train(problem, optimizer)
    said = dict(line.split(": ", 1) for line in mode.report().splitlines())
    assert said["qkv.weight"] == "right, from its gradient"  # 48 rows would be three blocks of 20
    assert said["mlp.0.weight"] == "left in 2 blocks and right, from its gradient"
    assert said["out.weight"] == "both sides, from its gradient"
    assert not any("bias" in name or "norm" in name for name in said)


class Odd(nn.Module):
    """A tied weight, a layer that is called by its weight only, and one without a rule."""

    def __init__(self):
        super().__init__()
        self.embed, self.a, self.b = nn.Embedding(9, 6), nn.Linear(6, 6), nn.Linear(6, 6)
        self.silent, self.head = nn.Linear(6, 6), nn.Linear(6, 9, bias=False)
        self.other, self.up = nn.Bilinear(6, 6, 6), nn.Linear(6, 4)
        self.b.weight = self.a.weight

    def forward(self, x):
        h = self.b(self.a(self.embed(x)))
        h = F.linear(h, self.silent.weight)
        return self.up(self.other(h, h).sum(1)).sum(1, keepdim=True) + self.head(h).sum(1)


def test_tied_silent_and_unknown_layers_fall_back_to_their_gradient_by_name():
    torch.manual_seed(0)
    net, loss_fn = Odd(), nn.CrossEntropyLoss()
    mode = KFAC("kfac", every=2, update_every=2)
    base = o.AdamW(net.parameters(), lr=1e-3)
    optimizer = AdaptiveOptimizer(
        base, net, loss_fn=loss_fn, probe=OFF, policy=ConstantPolicy("kfac"), modes={"base": BaseStep(), "kfac": mode}
    )
    for _ in range(12):
        optimizer.zero_grad()
        loss_fn(net(torch.randint(0, 9, (8, 3))), torch.randint(0, 9, (8,))).backward()
        optimizer.step()
    said = dict(line.split(": ", 1) for line in mode.report().splitlines())
    assert said["embed.weight"] == "right, from its layer"
    assert said["up.weight"] == "both sides, from its layer"
    assert said["a.weight"] == "both sides, from its gradient (its weight is tied)"
    assert said["silent.weight"] == "both sides, from its gradient (its layer's hooks did not fire)"
    assert said["other.weight"] == "both sides, from its gradient (Bilinear has no rule)"


def test_without_a_model_layer_factors_come_from_the_gradient_and_say_so():
    W = torch.randn(4, 3, requires_grad=True)
    base = o.Adam([W])
    mode, ctx = KFAC("kfac", update_every=1), context(base, W)
    mode.enter(ctx)
    W.grad = torch.randn(4, 3)
    mode.step(ctx)
    assert "no model was given" in mode.coverage()[0]


# ---- what it holds and when it works ---------------------------------------------------------------------------------


@pytest.mark.parametrize("source", ["gradient", "kfac"])
def test_it_holds_no_more_than_four_square_matrices_a_weight_and_one_copy_of_the_largest(source):
    """And during a step two copies of the weights and what one change of basis takes."""
    problem = make("transformer", 20)
    base = BASES["adamw"](problem.model.parameters())
    mode = KFAC(source, every=3, update_every=1)
    optimizer = wrapped(problem, base, "kfac", mode)
    train(problem, optimizer, until=10)
    shapes = [(p.shape[0], p[0].numel()) for p in problem.model.parameters() if p.dim() > 1]
    allowed = sum(2 * (m * m + n * n) for m, n in shapes) + max(m * n for m, n in shapes)
    held = sum(t.numel() for f in mode._factors.values() for b in f.blocks for t in vars(b).values() if torch.is_tensor(t))
    assert all(f.S is None for f in mode._factors.values())
    assert held <= allowed
    x, y = problem.batches[11]
    optimizer.zero_grad()
    problem.criterion(problem.model(x), y).backward()
    side = max(max(s) for s in shapes)
    with LiveBytes() as memory:
        optimizer.step()
    assert memory.peak <= 4 * (2 * sum(m * n for m, n in shapes) + allowed / 4 + 8 * side * side)


def test_momentum_along_a_direction_that_the_factors_call_empty_makes_no_step_without_bound():
    """The factors see every second gradient, and these have directions of their own: once weights of 1e13 in 30 steps."""
    torch.manual_seed(0)
    W = torch.zeros(8, 6, requires_grad=True)
    base = o.Adam([W], lr=1e-2)
    mode, ctx = KFAC(update_every=2, every=4), context(base, W)
    mode.enter(ctx)
    for t in range(24):
        G = torch.zeros(8, 6)
        G[4 * (t % 2) : 4 * (t % 2) + 4, 3 * (t % 2) : 3 * (t % 2) + 3] = torch.randn(4, 3) + 1
        W.grad = G
        before = W.detach().clone()
        mode.step(ctx)
        assert (W - before).norm() < 5 * 1e-2 * W.numel() ** 0.5


def test_the_second_moment_of_dead_units_does_not_grow_from_basis_to_basis():
    """All that the factor says of them is rounding; once a quotient of two roundings made infinity of it."""
    torch.manual_seed(0)
    W = torch.zeros(64, 64, requires_grad=True)
    base = o.Adam([W], lr=1e-3)
    mode, ctx = KFAC(every=2), context(base, W)
    mode.enter(ctx)
    alive = torch.randn(64, 8)
    for t in range(300):
        G = alive @ torch.randn(8, 8) @ alive.T
        G[torch.randperm(64)[:60] if t < 40 else torch.arange(4, 64)] = 0
        W.grad = 0.98**t * G
        mode.step(ctx)
    assert float(base.state[W]["exp_avg_sq"].sum()) <= float(64 * 64 * alive.norm() ** 4)
    assert torch.isfinite(W).all()


def test_a_large_block_sees_every_kth_gradient_that_weighs_as_k_do():
    """And the one of the step at which its basis changes: 150 rows are two of 64, 40 are one."""
    torch.manual_seed(0)
    f = Factors.of(torch.zeros(150, 40), 256, 4)
    left, right = f.left[0], f.right[0]
    left.due, every = 7, torch.zeros(150, 150)
    for now in range(1, 10):
        G = torch.randn(150, 40)
        f.observe(G, 0.9, now)
        if now % 2 == 1:
            every = 0.9**2 * every + (1 - 0.9**2) * G @ G.T
    torch.testing.assert_close(left.factor, every)
    assert left.weight == pytest.approx(1 - 0.9**10)
    assert right.weight == pytest.approx(1 - 0.9**9)


def test_changes_of_basis_are_spread_and_the_costly_ones_are_rare():
    blocks = [Block(0, n, torch.zeros(n, n)) for n in (512, 384, 128, 128, 128, 64, 64, 10)]
    share_out(blocks, now=1, every=4)
    assert {b.due for b in blocks} == {4, 5, 6, 7}
    heaviest = max(sum(b.size**3 for b in blocks if b.due == due) for due in range(4, 8))
    assert heaviest == 512**3  # nothing is put on top of the largest
    assert [interval(b, 4) for b in blocks] == [32, 24, 8, 8, 8, 4, 4, 4]


# ---- what it survives ------------------------------------------------------------------------------------------------


def test_a_factor_that_is_not_finite_keeps_its_basis_and_starts_again():
    torch.manual_seed(0)
    W = torch.randn(5, 4, requires_grad=True)
    base = o.Adam([W], lr=1e-3)
    mode, ctx = KFAC(every=2), context(base, W)
    mode.enter(ctx)
    for _ in range(6):
        W.grad = torch.randn(5, 4)
        mode.step(ctx)
    kept = [b.Q.clone() for b in mode._factors[0].blocks]
    for b in mode._factors[0].blocks:
        b.factor[0, 0] = float("nan")
        b.due = 7
    W.grad = torch.randn(5, 4)
    mode.step(ctx)
    for b, Q in zip(mode._factors[0].blocks, kept, strict=True):
        assert torch.equal(b.Q, Q)
        assert not b.factor.any()
        b.due = 10
    for _ in range(3):
        W.grad = torch.randn(5, 4)
        mode.step(ctx)
    assert torch.isfinite(W).all()
    assert not any(torch.equal(b.Q, Q) for b, Q in zip(mode._factors[0].blocks, kept, strict=True))


def test_an_exception_in_the_bases_step_leaves_parameters_and_groups_as_they_were():
    class Fails(o.AdamW):
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
    group = base.param_groups[0]
    Fails.fail = True
    with pytest.raises(RuntimeError, match="no"):
        optimizer.step()
    assert base.param_groups[0] is group
    for p, (value, grad) in zip(problem.model.parameters(), before, strict=True):
        assert torch.equal(p, value)
        assert p.grad is grad


@pytest.mark.parametrize("source", ["gradient", "kfac"])
@pytest.mark.parametrize("base", [*BASES])
def test_the_users_autocast_around_the_step_rounds_nothing_in_it(base, source):
    plain, cast = make("mlp", 12), make("mlp", 12)
    for problem in (plain, cast):
        model = problem.model
        optimizer = wrapped(problem, BASES[base](model.parameters()), "kfac", KFAC(source, every=2))
        for i, (x, y) in enumerate(problem.batches):
            optimizer.zero_grad()
            problem.criterion(model(x), y).backward()
            with torch.autocast("cpu", torch.bfloat16, enabled=problem is cast):
                optimizer.step()
                if i == 9:
                    optimizer.control.policy = ConstantPolicy("base")
                assert torch.is_autocast_enabled("cpu") == (problem is cast)
    assert_same(plain.model, cast.model, rtol=0, atol=0)


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_weights_stay_in_their_own_storage(dtype, memory_format):
    """While the base steps they are set aside; a view of them that the user holds sees every step."""
    torch.manual_seed(0)
    W = torch.randn(6, 4, 3, 3, dtype=dtype).to(memory_format=memory_format).requires_grad_()
    base = o.AdamW([W], lr=0.1)
    mode, ctx = KFAC(every=2), context(base, W)
    mode.enter(ctx)
    view, place, strides = W.detach(), W.data_ptr(), W.stride()
    for _ in range(6):
        before = view.clone()
        W.grad = torch.randn(6, 4, 3, 3).to(dtype)
        mode.step(ctx)
        assert not torch.equal(view, before)
        assert torch.equal(view, W)
    assert mode.coverage()[0].startswith("both sides")
    assert (W.data_ptr(), W.stride(), W.dtype) == (place, strides, dtype)


def test_a_subclass_with_a_step_of_its_own_sees_rotated_parameters_and_ends_at_the_same_weights():
    class Same(o.AdamW):
        def step(self, closure=None):
            return super().step(closure)

    start, grads = torch.randn(5, 4).double(), [torch.randn(5, 4).double() for _ in range(12)]
    ends = []
    for made in (o.AdamW, Same):
        W = start.clone().requires_grad_()
        base = made([W], lr=1e-2, weight_decay=0.1)
        mode, ctx = KFAC(every=3), context(base, W)
        mode.enter(ctx)
        for G in grads:
            W.grad = G.clone()
            mode.step(ctx)
        ends.append(W.detach())
    torch.testing.assert_close(*ends, rtol=1e-12, atol=1e-13)


def test_other_libraries_rules_are_refused_by_name():
    W = torch.randn(4, 3, requires_grad=True)
    assert "Adafactor" in KFAC().refuses(o.Adafactor([W]))
    assert "Muon" in KFAC().refuses(o.Muon([W]))


@pytest.mark.parametrize("bad", [{"source": "fisher"}, {"method": "svd"}, {"every": 0}, {"beta2": 1.0}, {"damping": -1.0}])
def test_arguments_out_of_range_are_quoted(bad):
    with pytest.raises(ValueError, match=rf"KFAC\(.*{next(iter(bad))}="):
        KFAC(**bad)


# ---- maths ----------------------------------------------------------------------------------------------------------


def test_eigenbasis_is_orthonormal_and_diagonalises():
    G = torch.randn(6, 9, dtype=torch.float64)
    L = G @ G.T
    values, Q = kron.eigenbasis(L)
    torch.testing.assert_close(Q.T @ Q, torch.eye(6).double(), rtol=0, atol=1e-12)
    torch.testing.assert_close(kron.rotate(L, Q, Q), torch.diag(values), rtol=0, atol=1e-11)


def test_power_iteration_converges_to_the_eigenbasis():
    torch.manual_seed(0)
    L = torch.diag(torch.tensor([16.0, 8, 4, 2, 1]).double())
    turn = torch.linalg.qr(torch.randn(5, 5).double())[0]
    L, Q = turn @ L @ turn.T, torch.eye(5).double()
    for _ in range(40):
        values, Q = kron.orthogonal_iteration(L, Q)
    torch.testing.assert_close(values, torch.tensor([16.0, 8, 4, 2, 1]).double(), rtol=1e-9, atol=0)
    torch.testing.assert_close(Q @ torch.diag(values) @ Q.T, L, rtol=1e-6, atol=1e-6)


def test_blocks_rotate_as_their_block_diagonal_matrix():
    f = Factors.of(torch.zeros(7, 4).double(), max_dim=3, max_blocks=3)
    for b in f.blocks:
        b.Q = torch.linalg.qr(torch.randn(b.size, b.size).double())[0]
    QL, QR = (torch.block_diag(*(b.Q for b in side)) for side in (f.left, f.right))
    X = torch.randn(7, 4).double()
    torch.testing.assert_close(f.rotate(X), QL.T @ X @ QR)
    torch.testing.assert_close(f.rotate_back(f.rotate(X)), X)

"""Where it broke once: each of these went wrong in a review, and stays right."""

import math

import pytest
import torch
from problems import BASES, make
from torch import nn

from adaptive_opt import AdaptiveOptimizer, ConstantPolicy, LanczosProbe, RulePolicy
from adaptive_opt.interventions import Snapshot
from adaptive_opt.modes import KFAC, BaseStep
from adaptive_opt.objective import ReplayError

OFF = LanczosProbe(overhead=0)


def backward(problem, step, scale=1.0):
    x, y = problem.batches[step]
    problem.model.zero_grad()
    (scale * problem.criterion(problem.model(x), y)).backward()


def assert_equal(a, b):
    for p, q in zip(a.parameters(), b.parameters(), strict=True):
        assert torch.equal(p, q)


@pytest.mark.parametrize("policy", [ConstantPolicy("base"), RulePolicy(tries=())], ids=["constant", "rules"])
def test_a_loss_that_differentiates_inside_itself_trains_as_bare(policy):
    """A PINN: u'' = -sin x by autograd inside the objective."""

    def run(wrapped):
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(1, 16), nn.Tanh(), nn.Linear(16, 1))
        x = torch.linspace(0, 3, 20).unsqueeze(1).requires_grad_()

        def loss():
            u = net(x)
            (du,) = torch.autograd.grad(u.sum(), x, create_graph=True)
            (ddu,) = torch.autograd.grad(du.sum(), x, create_graph=True)
            return (ddu + torch.sin(x)).square().mean() + u[0].square().mean()

        optimizer = torch.optim.Adam(net.parameters(), lr=1e-3)
        if wrapped:
            optimizer = AdaptiveOptimizer(optimizer, net, objective=loss, policy=policy, probe=LanczosProbe(every=9))
        for _ in range(45):
            optimizer.zero_grad()
            loss().backward()
            optimizer.step()
        return net, optimizer

    (bare, _), (net, optimizer) = run(False), run(True)
    assert optimizer.control.gate.trusted is True
    assert optimizer.report.step == 44
    assert_equal(bare, net)


def test_a_closures_replay_touches_no_gradient_that_the_optimizer_does_not_measure():
    def run(wrapped):
        torch.manual_seed(0)
        model = nn.ModuleDict({"table": nn.Embedding(10, 4, sparse=True), "head": nn.Linear(4, 3)})
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        if wrapped:
            optimizer = AdaptiveOptimizer(optimizer, policy=ConstantPolicy("base"), probe=LanczosProbe(every=1, num_steps=3))
        tokens, y = torch.arange(10), torch.arange(10) % 3

        def closure():
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(model["head"](model["table"](tokens)), y)
            loss.backward()
            return loss

        for _ in range(5):
            optimizer.step(closure)
        return model

    assert_equal(run(False), run(True))


def trained_in_kfac(steps=40, base="adamw"):
    problem = make("mlp", 80)
    modes = {"base": BaseStep(), "kfac": KFAC(every=5)}
    given = {"model": problem.model, "loss_fn": problem.criterion, "modes": modes, "probe": OFF}
    optimizer = AdaptiveOptimizer(BASES[base](problem.model.parameters()), **given, policy=ConstantPolicy("kfac"))
    for step in range(steps):
        backward(problem, step)
        optimizer.step()
    return problem, optimizer


def moments_in_parameter_basis(optimizer):
    """exp_avg of every parameter after leaving the mode."""
    control = optimizer.control
    control._enter("base", control.gate.context(control.modes[control.mode]))
    return [optimizer.state[p]["exp_avg"].clone() for p in optimizer.param_groups[0]["params"]]


def test_going_back_to_a_snapshot_inside_kfac_brings_its_basis_back():
    _, reference = trained_in_kfac(steps=22)
    problem, optimizer = trained_in_kfac(steps=22)
    control = optimizer.control
    snapshot = Snapshot.take(22, control.gate.context(control.modes["kfac"]))
    for step in range(22, 50):  # the basis turns five times
        backward(problem, step)
        optimizer.step()
    control._restore(snapshot)
    for mine, theirs in zip(moments_in_parameter_basis(optimizer), moments_in_parameter_basis(reference), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-9)


def test_going_back_to_a_snapshot_from_before_kfac_leaves_kfac():
    problem, optimizer = trained_in_kfac(steps=1)
    control = optimizer.control
    control._enter("base", control.gate.context(control.modes["kfac"]))
    snapshot = Snapshot.take(1, control.gate.context(control.modes["base"]))
    before = [optimizer.state[p]["exp_avg"].clone() for p in optimizer.param_groups[0]["params"]]
    for step in range(1, 30):
        backward(problem, step)
        optimizer.step()
    assert control.mode == "kfac"
    control._restore(snapshot)
    assert control.mode == "base"
    for p, m in zip(optimizer.param_groups[0]["params"], before, strict=True):
        assert torch.equal(optimizer.state[p]["exp_avg"], m)


def test_a_step_at_zero_learning_rate_inside_kfac_keeps_the_moments_in_their_basis():
    problem, still = trained_in_kfac(steps=30)
    other, tiny = trained_in_kfac(steps=30)
    for step in range(30, 35):
        for p, optimizer, lr in ((problem, still, 0.0), (other, tiny, 1e-30)):
            optimizer.param_groups[0]["lr"] = lr
            backward(p, step)
            optimizer.step()
    assert still.steps == 30  # it does not count
    for a, b in zip(moments_in_parameter_basis(still), moments_in_parameter_basis(tiny), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-8)


def test_sam_notices_a_penalty_that_was_added_later_and_steps_down_to_the_base():
    problem = make("mlp", 120)
    optimizer = AdaptiveOptimizer(
        torch.optim.SGD(problem.model.parameters(), lr=0.05),
        problem.model,
        loss_fn=problem.criterion,
        probe=OFF,
        policy=ConstantPolicy("sam"),
    )

    def step(i, penalty):
        x, y = problem.batches[i]
        optimizer.zero_grad()
        loss = problem.criterion(problem.model(x), y)
        (loss + penalty * sum(p.square().sum() for p in problem.model.parameters())).backward()
        optimizer.step()

    for i in range(20):
        step(i, 0.0)
    with pytest.warns(UserWarning, match="an added penalty") as said:
        for i in range(20, 120):
            step(i, 1.0)
    assert len(said) == 1


def test_probe_now_refuses_a_loss_that_is_not_the_one_that_went_backward():
    problem = make("mlp", 2)
    optimizer = AdaptiveOptimizer(
        torch.optim.SGD(problem.model.parameters(), lr=0.05), problem.model, loss_fn=problem.criterion, probe=OFF
    )
    x, y = problem.batches[0]
    (problem.criterion(problem.model(x), y) + 10 * problem.model[0].weight.square().sum()).backward()
    with pytest.raises(ReplayError, match="an added penalty"):
        optimizer.probe_now()


def test_probe_now_measures_in_the_users_units_under_a_gradient_scaler():
    problem = make("mlp", 1)
    optimizer = AdaptiveOptimizer(
        torch.optim.SGD(problem.model.parameters(), lr=0.05), problem.model, loss_fn=problem.criterion, probe=OFF
    )
    backward(problem, 0)
    plain = optimizer.probe_now()
    optimizer.zero_grad()
    optimizer.control.memory.generator.manual_seed(0)
    backward(problem, 0, scale=1024.0)
    for p in problem.model.parameters():
        p.grad /= 1024
    scaled = optimizer.probe_now()
    assert scaled.epsilon == pytest.approx(plain.epsilon, rel=1e-3)
    assert scaled.loss == pytest.approx(plain.loss, rel=1e-6)


def test_what_the_probe_knows_of_the_bases_step_is_not_said_of_kfacs():
    problem, optimizer = trained_in_kfac()
    backward(problem, 41)
    reading = optimizer.probe_now()
    assert (reading.stability, reading.overshoot, reading.kappa_effective) == (None, None, None)
    assert reading.epsilon is not None


@pytest.mark.parametrize("policy", [ConstantPolicy("base"), ConstantPolicy("sam"), RulePolicy()], ids=["base", "sam", "rules"])
def test_an_objective_that_fails_late_costs_the_measurements_and_not_the_training(policy):
    problem, calls = make("mlp", 60), [0]
    batch = [None, None]

    def loss():
        calls[0] += 1
        if calls[0] > 12:
            raise OSError("the disk is gone")
        return problem.criterion(problem.model(batch[0]), batch[1])

    optimizer = AdaptiveOptimizer(
        torch.optim.SGD(problem.model.parameters(), lr=0.05),
        problem.model,
        objective=loss,
        policy=policy,
        probe=LanczosProbe(every=4, num_steps=3),
    )
    with pytest.warns(UserWarning, match="the disk is gone") as said:
        for batch[:] in problem.batches:
            optimizer.zero_grad()
            problem.criterion(problem.model(batch[0]), batch[1]).backward()
            optimizer.step()
    assert len(said) == 1
    assert optimizer.steps == 60


def test_a_param_group_added_later_survives_a_rollback():
    problem = make("mlp", 40)
    optimizer = AdaptiveOptimizer(torch.optim.AdamW(problem.model.parameters()), problem.model, loss_fn=problem.criterion)
    for step in range(40):
        if step == 30:
            extra = nn.Parameter(torch.ones(3))
            optimizer.add_param_group({"params": [extra]})
        if step == 35:
            with torch.no_grad():
                problem.model[0].weight.fill_(math.nan)
        backward(problem, step)
        optimizer.step()
    assert all(torch.isfinite(p).all() for p in problem.model.parameters())
    assert torch.equal(extra, torch.ones(3))


def test_a_change_of_the_data_is_not_mistaken_for_a_blow_up():
    """Random labels from step 150 on: going back to old parameters would not help, and is not done."""
    problem = make("mlp", 300)
    optimizer = AdaptiveOptimizer(
        torch.optim.SGD(problem.model.parameters(), lr=0.1, momentum=0.9), problem.model, loss_fn=problem.criterion
    )
    events = []
    for step, (x, y) in enumerate(problem.batches):
        optimizer.zero_grad()
        problem.criterion(problem.model(x), y if step < 150 else torch.randint(0, 4, y.shape)).backward()
        optimizer.step()
        events += optimizer.report.events
    assert not any("went back" in event.done for event in events)
    assert any("took it for a change of the data" in event.done for event in events)


def test_snapshots_go_on_in_a_harder_phase():
    problem = make("mlp", 300)
    optimizer = AdaptiveOptimizer(
        torch.optim.SGD(problem.model.parameters(), lr=0.05), problem.model, loss_fn=problem.criterion
    )
    for step, (x, y) in enumerate(problem.batches):
        optimizer.zero_grad()
        problem.criterion(problem.model(x if step < 150 else 0.05 * x), y).backward()
        optimizer.step()
    assert optimizer.control.interventions["rollback"].latest.step >= 250


@pytest.mark.parametrize("shift", [0.0, -3.0])
def test_a_healthy_run_is_left_alone_wherever_the_loss_has_its_zero(shift):
    class Shifted(nn.CrossEntropyLoss):
        def forward(self, input, target):
            return super().forward(input, target) + shift

    bare, problem = make("mlp", 200), make("mlp", 200)
    for p, wrapped in ((bare, False), (problem, True)):
        criterion = Shifted()
        optimizer = torch.optim.AdamW(p.model.parameters(), lr=3e-3)
        if wrapped:
            optimizer = AdaptiveOptimizer(optimizer, p.model, loss_fn=criterion, policy=RulePolicy(tries=()))
        for x, y in p.batches:
            optimizer.zero_grad()
            criterion(p.model(x), y).backward()
            optimizer.step()
    assert_equal(bare.model, problem.model)


def test_a_hand_written_sum_is_measured_whole():
    class Sum(nn.Module):
        def forward(self, output, y):
            return nn.functional.cross_entropy(output, y, reduction="sum")

    problem, criterion, stabilities = make("mlp", 1, batch=128), Sum(), []
    for fraction in (0.25, 1.0):
        optimizer = AdaptiveOptimizer(
            torch.optim.SGD(problem.model.parameters(), lr=1e-6),
            problem.model,
            loss_fn=criterion,
            probe=LanczosProbe(overhead=1.0, fraction=fraction),
            policy=ConstantPolicy("base"),
        )
        x, y = problem.batches[0]
        optimizer.zero_grad()
        criterion(problem.model(x), y).backward()
        optimizer.step()
        stabilities.append(optimizer.reading.stability)
        optimizer.detach()
    assert stabilities[0] == pytest.approx(stabilities[1], rel=0.05)


def test_nan_that_nobody_may_treat_is_said_once():
    problem = make("mlp", 3)
    optimizer = AdaptiveOptimizer(
        torch.optim.SGD(problem.model.parameters(), lr=0.05), problem.model, loss_fn=problem.criterion, interventions={}
    )
    events = []
    for x, y in problem.batches:
        optimizer.zero_grad()
        problem.criterion(problem.model(x * math.nan), y).backward()
        optimizer.step()
        events += optimizer.report.events
    assert sum("no treatment is allowed for it" in event.done for event in events) == 1


def test_a_treatment_that_is_not_there_is_refused_or_passed_over():
    problem = make("mlp", 1)
    base = torch.optim.SGD(problem.model.parameters(), lr=0.05)
    with pytest.raises(ValueError, match=r"\['rolback'\] is not one of"):
        AdaptiveOptimizer(base, policy=ConstantPolicy("base", ("rolback",)))
    with pytest.raises(ValueError, match=r"kfac knows the rules of .* Adafactor is none of them"):
        AdaptiveOptimizer(torch.optim.Adafactor(problem.model.parameters()), policy=ConstantPolicy("kfac"))
    control = AdaptiveOptimizer(base, modes={"base": BaseStep()}).control
    assert "kfac" not in control.available


def test_a_kfac_checkpoint_without_its_mode_is_refused_with_the_reason():
    problem, optimizer = trained_in_kfac()
    state = optimizer.state_dict()
    other = AdaptiveOptimizer(BASES["adamw"](problem.model.parameters()), modes={"base": BaseStep()})
    with pytest.raises(ValueError, match="written in mode 'kfac', which is not among"):
        other.load_state_dict(state)


def test_forward_passes_that_never_go_backward_are_let_go_of():
    problem = make("mlp", 30)
    optimizer = AdaptiveOptimizer(
        torch.optim.SGD(problem.model.parameters(), lr=0.05), problem.model, loss_fn=problem.criterion
    )
    for x, _ in problem.batches[:6]:
        problem.model(x)  # with a graph, and no backward
    for step in range(6, 12):
        backward(problem, step)
        optimizer.step()
    assert optimizer._capture.calls == []

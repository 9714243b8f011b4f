"""PyTorch's contract on an optimizer, kept by the wrapper: schedulers, checkpoints, copies, hooks, scalers, odd parameters."""

import copy
import io
import pickle

import pytest
import torch
from problems import BASES, make
from torch import nn
from torch.optim import lr_scheduler as lrs

from adaptive_opt import AdaptiveOptimizer, ConstantPolicy, LanczosProbe

PROBE = LanczosProbe(every=5, num_steps=3)


class Run:
    """A wrapped optimizer at work on a problem; `to(n)` trains up to step n."""

    def __init__(self, base="adamw", policy=None, probe=PROBE, steps=60, name="cnn", lr=None):
        self.problem = make(name, steps)
        self.model, self.criterion = self.problem.model, self.problem.criterion
        self.optimizer = AdaptiveOptimizer(
            BASES[base](self.model.parameters()), self.model, loss_fn=self.criterion, probe=probe, policy=policy
        )
        if lr is not None:
            for group in self.optimizer.param_groups:
                group["lr"] = lr
        self.done, self.reports = 0, []

    def to(self, step):
        for x, y in self.problem.batches[self.done : step]:
            self.optimizer.zero_grad()
            self.criterion(self.model(x), y).backward()
            self.optimizer.step()
            self.reports.append(self.optimizer.report)
        self.done = step
        return self

    def state(self):
        return [t.detach().clone() for t in self.model.state_dict().values()]


def assert_equal(a, b):
    assert all(torch.equal(s, t) for s, t in zip(a, b, strict=True))


SITUATIONS = {
    "base": lambda: Run(),
    "rules": lambda: Run("sgd", probe=LanczosProbe(overhead=1.0, num_steps=3)),
    "damped": lambda: Run("sgd", ConstantPolicy("base", ("damp", "rollback")), LanczosProbe(every=1, num_steps=3), lr=4.0),
    "kfac": lambda: Run("adamw", ConstantPolicy("kfac")),
    "kfac on sgd": lambda: Run("sgd", ConstantPolicy("kfac")),
    "sam": lambda: Run("sgd", ConstantPolicy("sam")),
    "sgd": lambda: Run("adamw", ConstantPolicy("sgd")),
}


def through_checkpoint(run, make_run):
    file = io.BytesIO()
    torch.save({"model": run.model.state_dict(), "optimizer": run.optimizer.state_dict(), "rng": torch.get_rng_state()}, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=True)
    other = make_run()
    other.model.load_state_dict(loaded["model"])
    other.optimizer.load_state_dict(state_dict=loaded["optimizer"])
    return other


def through_copy(copier):
    def go(run, make_run):
        other = make_run()
        other.model, other.optimizer = copier((run.model, run.optimizer))
        assert other.optimizer.param_groups[0]["params"][0] is next(other.model.parameters())
        other.optimizer.attach(other.model, loss_fn=other.criterion)
        return other

    return go


WAYS = {
    "checkpoint": through_checkpoint,
    "deepcopy": through_copy(copy.deepcopy),
    "pickle": through_copy(lambda pair: pickle.loads(pickle.dumps(pair))),
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("situation", SITUATIONS)
def test_training_goes_on_bit_for_bit(situation, way):
    run = SITUATIONS[situation]().to(27)
    if situation == "damped":
        assert run.optimizer.control.lr_scale < 1
    if situation.split()[0] in ("kfac", "sam", "sgd"):
        assert run.optimizer.report.mode == situation.split()[0]
    other = WAYS[way](run, SITUATIONS[situation])
    other.done = run.done
    rng = torch.get_rng_state()
    run.to(47)
    torch.set_rng_state(rng)
    other.to(47)
    assert_equal(run.state(), other.state())
    for a, b in zip(run.reports[-20:], other.reports[-20:], strict=True):
        assert (a.step, a.loss, a.lr_scale, a.mode, a.probe_cost) == (b.step, b.loss, b.lr_scale, b.mode, b.probe_cost)
        assert (a.reading is None) is (b.reading is None)
        assert a.reading is None or a.reading.stability == b.reading.stability


def test_a_model_is_copied_without_ears_also_in_the_middle_of_a_step():
    run = Run().to(3)
    x, y = run.problem.batches[3]
    loss = run.criterion(run.model(x), y)  # its graph is remembered now
    for twin in (copy.deepcopy(run.model), pickle.loads(pickle.dumps(run.model))):
        twin(x)
    loss.backward()
    assert len(run.optimizer._capture.step_calls()) == 1
    run.optimizer.step()
    assert run.optimizer.control.gate.trusted is True


def test_scheduler_and_hooks_do_not_stand_in_the_way_of_a_copy():
    run = Run()
    schedule = lrs.StepLR(run.optimizer, 5)
    run.optimizer.register_step_post_hook(lambda *_: None)
    run.to(3)
    schedule.step()
    pickle.dumps(run.optimizer)
    copy.deepcopy((run.model, run.optimizer))


def test_a_bare_state_dict_loads_and_the_wrapper_starts_from_its_own_beginning():
    run = Run().to(12)
    bare = run.optimizer.base.state_dict()
    for other in (Run(), Run().to(4)):
        other.optimizer.load_state_dict(copy.deepcopy(bare))
        assert other.optimizer.steps == 0
        p = next(other.model.parameters())
        assert torch.equal(other.optimizer.state[p]["exp_avg"], run.optimizer.state[next(run.model.parameters())]["exp_avg"])
        other.to(other.done + 2)


def test_param_groups_and_state_are_the_very_same_objects():
    run = Run().to(2)
    outer, base = run.optimizer, run.optimizer.base

    def linked():
        return outer.param_groups is base.param_groups and outer.state is base.state and outer.defaults is base.defaults

    assert isinstance(outer, torch.optim.Optimizer)
    assert linked()
    outer.load_state_dict(outer.state_dict())
    assert linked()
    outer.add_param_group(param_group={"params": [nn.Parameter(torch.zeros(2))], "lr": 0.5})
    assert linked()
    assert [g["lr"] for g in base.param_groups] == [3e-3, 0.5]
    twin = pickle.loads(pickle.dumps(outer))
    assert twin.param_groups is twin.base.param_groups
    assert twin.state is twin.base.state


SCHEDULERS = {
    "LambdaLR": lambda o: lrs.LambdaLR(o, lambda t: 0.9**t),
    "MultiplicativeLR": lambda o: lrs.MultiplicativeLR(o, lambda t: 0.9),
    "StepLR": lambda o: lrs.StepLR(o, 2),
    "MultiStepLR": lambda o: lrs.MultiStepLR(o, [2, 4]),
    "ConstantLR": lambda o: lrs.ConstantLR(o, total_iters=3),
    "LinearLR": lambda o: lrs.LinearLR(o, total_iters=4),
    "ExponentialLR": lambda o: lrs.ExponentialLR(o, 0.8),
    "PolynomialLR": lambda o: lrs.PolynomialLR(o, 6),
    "CosineAnnealingLR": lambda o: lrs.CosineAnnealingLR(o, 6),
    "CosineAnnealingWarmRestarts": lambda o: lrs.CosineAnnealingWarmRestarts(o, 3),
    "CyclicLR": lambda o: lrs.CyclicLR(o, 1e-3, 1e-1, 3),
    "OneCycleLR": lambda o: lrs.OneCycleLR(o, 0.1, 8),
    "ReduceLROnPlateau": lambda o: lrs.ReduceLROnPlateau(o, patience=0),
    "ChainedScheduler": lambda o: lrs.ChainedScheduler([lrs.ConstantLR(o), lrs.ExponentialLR(o, 0.9)], optimizer=o),
    "SequentialLR": lambda o: lrs.SequentialLR(o, [lrs.ConstantLR(o), lrs.ExponentialLR(o, 0.9)], [2]),
}


@pytest.mark.parametrize("base", ["sgd", "adamw"])
@pytest.mark.parametrize("name", SCHEDULERS)
def test_every_scheduler_drives_the_wrapper_as_it_drives_the_base(name, base):
    seen = []
    for wrapped in (False, True):
        run = Run(base, ConstantPolicy("base"), steps=6, name="mlp")
        optimizer = run.optimizer if wrapped else run.optimizer.base
        if not wrapped:
            run.optimizer.detach()
            run.optimizer = optimizer
            optimizer.report = None
        schedule, values = SCHEDULERS[name](optimizer), []
        for n in range(6):
            run.to(n + 1)
            schedule.step(*([1.0] if name == "ReduceLROnPlateau" else []))
            group = optimizer.param_groups[0]
            values.append((group["lr"], group.get("momentum"), group.get("betas")))
        seen.append((values, run.state()))
    assert seen[0][0] == seen[1][0]
    assert_equal(seen[0][1], seen[1][1])
    if name == "OneCycleLR":
        assert len({str(v[1:]) for v in seen[1][0]}) > 1  # momentum was cycled


@pytest.mark.parametrize("source", ["capture", "objective"])
def test_the_closure_is_called_once_a_step(source):
    problem, batch, calls = make("mlp", 12), [], []
    model, criterion = problem.model, problem.criterion
    given = {
        "capture": {"loss_fn": criterion},
        "objective": {"objective": lambda: criterion(model(batch[0]), batch[1])},
    }
    optimizer = AdaptiveOptimizer(BASES["adamw"](model.parameters()), model, probe=PROBE, **given[source])

    def closure():
        calls.append(torch.is_grad_enabled())
        optimizer.zero_grad()
        loss = criterion(model(batch[0]), batch[1])
        loss.backward()
        return loss

    for batch[:] in problem.batches:
        assert isinstance(optimizer.step(closure=closure), torch.Tensor)
    assert calls == [True] * 12
    assert optimizer.reading is not None


def test_a_learning_rate_of_zero_leaves_everything_alone_but_calls_the_closure():
    run, calls = Run().to(7), []
    for group in run.optimizer.param_groups:
        group["lr"] = 0.0
    own, params = copy.deepcopy(run.optimizer.control.state_dict()), [p.clone() for p in run.model.parameters()]
    rng = torch.get_rng_state()
    run.optimizer.step(lambda: calls.append(1))
    assert calls == [1]
    assert_equal(params, run.model.parameters())
    assert torch.equal(rng, torch.get_rng_state())
    assert str(own) == str(run.optimizer.control.state_dict())


def test_a_closure_that_raises_leaves_everything_as_it_was():
    run = Run().to(6)
    twin, rng = through_checkpoint(run, Run), torch.get_rng_state()
    own = str(run.optimizer.control.state_dict())
    before = run.state()[:2]

    def closure():
        run.optimizer.zero_grad()
        x, y = run.problem.batches[0]
        run.model.eval()
        run.criterion(run.model(x), y).backward()
        run.model.train()
        raise ArithmeticError("the user's own")

    with pytest.raises(ArithmeticError, match="the user's own"):
        run.optimizer.step(closure)
    assert_equal(before, run.state()[:2])
    assert own == str(run.optimizer.control.state_dict())
    torch.set_rng_state(rng)
    run.to(12)
    torch.set_rng_state(rng)
    twin.done = 6
    assert_equal(run.state(), twin.to(12).state())


def test_step_hooks_of_the_wrapper_fire_once():
    run, fired = Run(), []
    run.optimizer.register_step_pre_hook(lambda *_: fired.append("before"))
    run.optimizer.register_step_post_hook(lambda *_: fired.append("after"))
    run.to(6)
    assert fired == ["before", "after"] * 6


@pytest.mark.parametrize("to_none", [True, False])
def test_zero_grad_clears_or_zeroes(to_none):
    run = Run()
    x, y = run.problem.batches[0]
    run.criterion(run.model(x), y).backward()
    run.optimizer.zero_grad(set_to_none=to_none)
    assert all((p.grad is None) if to_none else not p.grad.any() for p in run.model.parameters())

"""The length of kfac's steps as a treatment: from what the next gradient says of the last one."""

import copy
from itertools import pairwise

import pytest
import torch
from test_contracts import assert_equal

from adaptive_opt import AdaptiveOptimizer, LanczosProbe
from adaptive_opt.interventions import Snapshot
from adaptive_opt.length import FARTHEST, GROWTH, StepLength
from adaptive_opt.records import Event
from adaptive_opt.verify import Trial
from experiments.tasks.canyon import Canyon
from experiments.tasks.poisson import Poisson


def descend(curvatures, lr, steps, noise=0.0, seed=0):
    """Gradient descent on a parabola with gradients of fresh noise, its steps scaled by a StepLength."""
    generator = torch.Generator().manual_seed(seed)
    w = torch.nn.Parameter(torch.full((len(curvatures),), 3.0))
    h = torch.tensor(curvatures)
    length, overshoots = StepLength(), []
    for _ in range(steps):
        w.grad = h * w.detach() + noise * torch.randn(w.shape, generator=generator)
        with length.watching([w], [0]), torch.no_grad():
            w.sub_(lr * length.scale * w.grad)
        overshoots.append(lr * length.scale * curvatures[0] / 2)
    return length, overshoots


def test_a_step_that_is_too_short_grows_until_it_ends_near_the_bottom():
    _, overshoots = descend([1.0], lr=0.2, steps=60)
    assert overshoots[0] == pytest.approx(0.1)
    assert 0.3 < overshoots[-1] < 0.5
    assert all(b <= GROWTH * a * (1 + 1e-6) for a, b in pairwise(overshoots))
    assert descend([1.0], lr=1e-4, steps=300)[0].scale == FARTHEST


def test_a_step_that_is_too_long_is_cut_before_it_explodes():
    _, overshoots = descend([1.0], lr=3.0, steps=60)  # above the limit of 2: three times too long, growing without it
    assert overshoots[-1] < 1


def test_an_overshoot_is_cut_once_and_not_again_for_as_long_as_it_is_remembered():
    _, overshoots = descend([1.0], lr=3.0, steps=60)
    assert min(overshoots) > 0.25


def test_while_the_gradient_grows_a_longer_step_grows_no_faster_than_it_may_and_is_never_shorter_than_the_users():
    # off a plateau: w grows by 2 % a step of the user's, and by 20 % a step at ten times that
    w = torch.nn.Parameter(torch.full((3,), 1e-3))
    length, taken, own = StepLength(), [], []
    for _ in range(120):
        w.grad = -w.detach().clone()
        before = w.detach().clone()
        with length.watching([w], [0]), torch.no_grad():
            w.sub_(0.02 * length.scale * w.grad)
        taken.append(float((w.detach() - before).norm()))
        own.append(0.02 * float(before.norm()))
    assert all(b <= GROWTH * a * (1 + 1e-5) for a, b in pairwise(taken))
    assert all(step >= user * (1 - 1e-5) for step, user in zip(taken, own, strict=True))
    assert taken[-1] / own[-1] == pytest.approx(length.scale / GROWTH, rel=1e-2)  # of the step to come, held in its turn
    assert 2 < taken[-1] / own[-1] < 3


def judge(length, w, index=0):
    """The last step, as at the beginning of the coming one; that one is not taken."""
    with length.watching([w], [index]):
        pass


def held(growth, scale=8.0):
    """A step `growth` times as long as the one before and on a gradient twice as large, with `scale` times the user's rate."""
    w = torch.nn.Parameter(torch.zeros(3))
    length = StepLength()
    for lr in (0.1, 0.1 * growth / 2):
        w.grad = -torch.ones(3) if w.grad is None else 2 * w.grad
        judge(length, w)
        before = w.detach().clone()
        with length.watching([w], [0]), torch.no_grad():
            length.scale = scale
            w.sub_(lr * w.grad)
    taken = float((w.detach() - before)[0])
    w.grad = 2 * w.grad
    judge(length, w)
    return taken, length.scale


@pytest.mark.parametrize(
    ("growth", "taken"), [(1.0, 0.1), (1.04, 0.104), (4.0, 0.1 * GROWTH), (100.0, 10 / 8)], ids=["0%", "4%", "x4", "x100"]
)
def test_a_step_that_is_held_is_that_long_and_its_scale_says_so(growth, taken):
    step, scale = held(growth)
    assert step == pytest.approx(taken, rel=1e-5)
    assert scale == pytest.approx(8 * taken / (0.1 * growth) * GROWTH, rel=1e-5)
    assert held(growth, scale=1.0)[0] == pytest.approx(0.1 * growth, rel=1e-5)  # the user's own are never held


def test_where_the_gradient_is_noise_the_steps_are_no_longer_than_the_users():
    # at the bottom of the valley the slope along the step is all the batch's own, and the next batch knows nothing of it
    quiet = descend([1.0], lr=0.02, steps=400)[0].scale
    noisy = [descend([1.0], lr=0.02, steps=400, noise=30.0, seed=seed)[0].scale for seed in range(5)]
    assert quiet == FARTHEST
    assert sorted(noisy)[2] <= 1.5


def test_what_cannot_be_judged_changes_nothing():
    w = torch.nn.Parameter(torch.ones(3))
    w.grad = torch.ones(3)
    length = StepLength()
    with length.watching([w], [0]), torch.no_grad():
        w.add_(w.grad)  # uphill
    with length.watching([w], [0]), torch.no_grad():
        w.sub_(0.1 * w.grad)
    assert length.scale == 1.0
    judge(length, w, 1)  # another parameter has the gradient now
    assert length.scale == 1.0
    length.forget()
    judge(length, w)
    assert length.scale == 1.0


def test_a_step_that_raises_leaves_the_length_as_it_was():
    length, w = StepLength(), torch.nn.Parameter(torch.ones(3))
    for _ in range(3):
        w.grad = w.detach().clone()
        with length.watching([w], [0]), torch.no_grad():
            w.sub_(0.01 * length.scale * w.grad)
    before = length.state_dict()
    w.grad = w.detach().clone()

    def step():
        with length.watching([w], [0]):
            assert length.scale != before["scale"]
            raise ArithmeticError

    with pytest.raises(ArithmeticError):
        step()
    assert all(length.state_dict()[name] is value for name, value in before.items())


def test_a_gradient_that_is_not_finite_leaves_the_length_as_it_was():
    w = torch.nn.Parameter(torch.ones(3))
    w.grad = torch.ones(3)
    length = StepLength()
    with length.watching([w], [0]), torch.no_grad():
        w.sub_(0.1 * w.grad)
    w.grad = torch.full((3,), float("nan"))
    judge(length, w)
    assert (length.scale, length.end) == (1.0, 0.0)


@pytest.mark.parametrize("seen", [True, False])
@pytest.mark.filterwarnings("ignore:adaptive_opt cannot evaluate this loss again")
def test_no_mode_is_tried_where_no_loss_is_seen(seen):
    run = Run()
    if not seen:  # no model, no closure: gradients alone
        run.optimizer = AdaptiveOptimizer(torch.optim.AdamW(run.task.model.parameters(), lr=0.03))
    run.to(30)
    assert any("kfac" in line for line in run.said) is seen


def test_no_mode_is_tried_while_the_step_is_held():
    run = Run()
    run.optimizer.control.damp.scale, run.optimizer.control.damp.since = 0.5, 0
    run.optimizer.control.damp.follow = lambda reading: None  # goes on holding
    run.optimizer.control.damp.look = lambda *seen: None
    run.optimizer.control.damp.asks = lambda step: False
    assert not any("kfac" in line for line in run.to(40).said)


def test_a_validation_loss_that_raises_in_the_middle_of_a_trial_is_said_and_the_run_goes_on():
    run, calls = Run(), []

    def validate():
        calls.append(run.optimizer.steps)
        if run.optimizer.steps >= 25:
            raise OSError("the disk is gone")
        return 1.0

    run.optimizer.control.validate = validate
    with pytest.warns(UserWarning, match="the disk is gone"):
        run.to(60)
    assert sum("the disk is gone" in line for line in run.said) == 1
    assert run.optimizer.control.validate is None
    assert run.optimizer.control.gate.trusted is True
    assert any("switched from base to kfac" in line for line in run.said)


class Run:
    """The canyon with AdamW: kfac is tried at step 25 and kept."""

    def __init__(self):
        torch.manual_seed(0)
        self.task = Canyon(seed=0)
        base = torch.optim.AdamW(self.task.model.parameters(), lr=0.03)
        probe = LanczosProbe(overhead=0.05, price=1.0)
        self.optimizer = AdaptiveOptimizer(base, self.task.model, loss_fn=self.task.loss_fn, probe=probe)
        self.done, self.losses, self.said = 0, [], []

    def to(self, step):
        for i in range(self.done, step):
            x, y = self.task.batch(i)
            self.optimizer.zero_grad()
            loss = self.task.loss_fn(self.task.model(x), y)
            loss.backward()
            self.optimizer.step()
            self.losses.append(loss.item())
            self.said += [event.sentence() for event in self.optimizer.report.events]
        self.done = step
        return self


def test_the_rules_try_kfac_on_a_canyon_and_keep_it():
    run = Run().to(150)
    assert any("kfac may be faster" in line and "-> kept" in line for line in run.said), run.said
    assert run.optimizer.report.mode == "kfac"
    assert run.optimizer.control.length.scale > 1
    assert run.optimizer.report.lr_scale == run.optimizer.control.length.scale
    assert run.losses[-1] < 1e-2 * run.losses[25]


def test_what_is_taken_back_within_kfac_leaves_it_a_treatment_with_its_length():
    control = Run().to(150).optimizer.control
    scale = control.length.scale
    ctx = control.gate.context(control.modes["kfac"])
    control._take_back(Trial("escape", Event(150, "escape", "", ""), 151, None, before=Snapshot.take(150, ctx)), ctx)
    assert (control.mode, control.mode_is_treatment, control.length.scale) == ("kfac", True, scale)
    assert control.length.moved is None


def test_a_run_resumed_among_kfacs_steps_goes_on_bit_for_bit():
    whole, first, second = Run(), Run().to(40), Run()
    second.task.model.load_state_dict(first.task.model.state_dict())
    second.optimizer.load_state_dict(copy.deepcopy(first.optimizer.state_dict()))
    second.done = 40
    whole.to(90)
    second.to(90)
    assert_equal(whole.task.model.state_dict().values(), second.task.model.state_dict().values())
    assert whole.optimizer.control.length.scale == second.optimizer.control.length.scale


def test_off_a_plateau_the_rules_steps_down_a_pinn_do_not_break():
    task = Poisson(seed=0, steps=500)
    base = torch.optim.SGD(task.model.parameters(), lr=1e-4, momentum=0.9)
    optimizer, said = AdaptiveOptimizer(base, task.model, objective=task.objective, probe=LanczosProbe(price=1.0)), []
    for _ in range(150):  # nothing but the objective shows the loss
        optimizer.zero_grad()
        task.objective().backward()
        optimizer.step()
        said += [event.sentence() for event in optimizer.report.events]
    assert any("kfac may be faster" in line and "-> kept" in line for line in said), said
    assert not any("rollback" in line or "went back" in line for line in said), said
    assert task.objective().item() < 100  # 600 at the start and, with one scale of ten, back there


def test_a_checkpoint_of_before_there_were_lengths_and_looks_goes_on():
    first, second = Run().to(40), Run()
    state = copy.deepcopy(first.optimizer.state_dict())
    old = state["adaptive"]
    del old["length"]
    for name in ("clip", "clipped", "cliffs", "learned"):
        del old["interventions"]["rollback"][name]
    for name in ("loss_steps", "norm_steps"):
        del old["signals"][name]
    for name in ("steps_before", "seconds", "length"):
        del old["trial"][name]
    second.task.model.load_state_dict(first.task.model.state_dict())
    second.optimizer.load_state_dict(state)
    second.done = 40
    second.to(160)
    assert second.optimizer.control.gate.trusted is True
    assert all(p.isfinite().all() for p in second.task.model.parameters())

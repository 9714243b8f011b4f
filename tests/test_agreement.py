"""Whether the gradients of successive batches agree: signal against noise, and who tries kfac for it."""

import copy
import math
from dataclasses import replace

import pytest
import torch
from torch import nn

from adaptive_opt import AdaptiveOptimizer, LanczosProbe, RulePolicy
from adaptive_opt.agreement import EVERY, FIRST, WINDOW, Agreement
from adaptive_opt.records import Condition, Diagnosis, Finding, History
from experiments.tasks.canyon import Canyon
from experiments.tasks.digits import Digits

HEALTHY = Diagnosis(0, (Finding(Condition.HEALTHY, 0.0, 0.0, "nothing stands out"),))
END = FIRST + WINDOW


def seen(gradients, first=FIRST, steps=None, indices=(0,)):
    """An Agreement after a window of these gradients."""
    agreement, w = Agreement(), torch.nn.Parameter(torch.zeros_like(gradients[0]))
    steps = range(first, first + len(gradients)) if steps is None else steps
    for step, g in zip(steps, gradients, strict=True):
        w.grad = g.clone()
        assert agreement.due(step)
        ended = agreement.see(step, [w], indices)
        assert ended == ((step - FIRST) % EVERY == WINDOW)
    return agreement


@pytest.mark.parametrize("noise", [0.0, 0.5, 1.0, 2.0])
def test_the_cosine_is_the_share_of_the_signal_in_a_batchs_gradient(noise):
    generator = torch.Generator().manual_seed(0)
    signal = torch.randn(20_000, generator=generator)
    gradients = [3 * (signal + math.sqrt(noise) * torch.randn(20_000, generator=generator)) for _ in range(WINDOW + 1)]
    assert seen(gradients).now(END) == pytest.approx(1 / (1 + noise), abs=0.01)


def test_steps_that_throw_the_gradient_to_the_other_side_and_back_are_no_noise():
    g = torch.ones(5)
    assert seen([g if i % 2 else -g for i in range(WINDOW + 1)]).now(END) == pytest.approx(1)


def test_a_window_of_too_few_good_steps_says_nothing_and_an_old_one_no_more():
    g = torch.ones(5)
    assert seen([g] * 4, steps=[FIRST, FIRST + 1, FIRST + 2, END]).now(END) is None
    whole = seen([g] * 8, steps=[*range(FIRST, FIRST + 7), END])
    assert whole.now(END) == whole.now(END + EVERY) == pytest.approx(1)
    assert whole.now(END + EVERY + 1) is None


def test_a_window_that_never_ended_is_no_part_of_the_next():
    g = torch.ones(5)
    agreement, w = seen([g] * 6), torch.nn.Parameter(torch.zeros(5))
    for step in range(FIRST + EVERY, END + EVERY + 1):
        w.grad = -g if step == FIRST + EVERY else torch.tensor([1.0, -1.0, 0.0, 0.0, 0.0])
        agreement.see(step, [w], (0,))
    assert agreement.now(END + EVERY) == pytest.approx(0.9)  # nine of ten: the first gradient is alike to nothing


def test_gradients_of_other_parameters_are_not_compared_and_none_is_no_number():
    g = torch.ones(5)
    agreement, w = Agreement(), torch.nn.Parameter(torch.zeros(5))
    for step in range(FIRST, END + 1):
        w.grad = g
        agreement.see(step, [w], (step % 2,))
    assert agreement.now(END) is None
    assert seen([torch.zeros(5)] * (WINDOW + 1)).now(END) == 0.0


def test_parameters_on_two_devices_and_a_model_that_was_moved_on_the_way_are_no_error():
    agreement, here = Agreement(), torch.nn.Parameter(torch.zeros(5))
    there = torch.nn.Parameter(torch.zeros(5, device="meta"))
    here.grad, there.grad = torch.ones(5), torch.ones(5, device="meta")
    assert not agreement.see(END, [here, there], (0, 1))
    for step in range(FIRST, END + 1):
        w = here if step < FIRST + 4 else torch.nn.Parameter(here.double())
        w.grad = torch.ones_like(w)
        agreement.see(step, [w], (0,))
    assert agreement.now(END) == pytest.approx(1)  # of the steps since


def test_a_window_whose_last_step_was_not_good_ends_with_the_next():
    late = seen([torch.ones(5)] * WINDOW)
    assert late.due(END + 1)
    w = torch.nn.Parameter(torch.ones(5))
    w.grad = torch.ones(5)
    assert late.see(END + 1, [w], (0,))
    assert (late.now(END + 1), late.due(END + 2)) == (pytest.approx(1), False)


@pytest.mark.parametrize(("agreement", "tried"), [(None, False), (0.29, False), (0.31, True)])
def test_a_mode_is_tried_only_where_there_is_more_signal_than_noise(agreement, tried):
    decision = RulePolicy().decide(HEALTHY, History(step=30, agreement=agreement))
    assert (decision.mode == "kfac") == tried
    if tried:
        assert decision.reason == "gradients of successive batches agree (|cosine| 0.31): kfac may be faster"


def test_no_mode_is_tried_once_nearly_all_labels_are_learnt_nor_kept_when_all_are():
    tried = [RulePolicy().decide(HEALTHY, History(step=30, agreement=0.9, nats=x)).mode for x in (None, 0.11, 0.09)]
    *others, kept = (
        RulePolicy().decide(HEALTHY, History(step=90, mode="kfac", mode_since=25, nats=x)) for x in (None, 0.011, 0.009)
    )
    assert tried == ["kfac", "kfac", "base"]
    assert [d.mode for d in (*others, kept)] == ["kfac", "kfac", "base"]
    assert kept.reason == "all labels are learnt, kfac has nothing left to gain"


LABELS = torch.arange(12) % 5


@pytest.mark.parametrize(
    ("loss_fn", "outputs", "target", "known"),
    [
        (nn.CrossEntropyLoss(), (12, 5), LABELS, True),
        (nn.NLLLoss(), (12, 5), LABELS, True),
        (nn.CrossEntropyLoss(), (12, 5), torch.full((12, 5), 0.2), False),
        (nn.CrossEntropyLoss(), (2, 5, 3, 3), torch.zeros(2, 3, 3, dtype=torch.long), False),  # of pixels
        (nn.CrossEntropyLoss(weight=torch.tensor([1e-6, 1, 1, 1, 1])), (12, 5), LABELS, False),
        (nn.CrossEntropyLoss(reduction="sum"), (12, 5), LABELS, False),
        (nn.BCEWithLogitsLoss(), (12,), torch.zeros(12), False),  # below 0.01 where one in a thousand is positive
        (nn.MSELoss(), (12,), torch.zeros(12), False),
    ],
)
def test_only_a_mean_cross_entropy_of_one_label_a_row_tells_that_labels_are_learnt(loss_fn, outputs, target, known):
    model = nn.Sequential(nn.Flatten(0), nn.Linear(4, math.prod(outputs)), nn.Unflatten(0, outputs))
    optimizer = AdaptiveOptimizer(torch.optim.SGD(model.parameters(), lr=0.0), model, loss_fn=loss_fn)
    loss = loss_fn(model(torch.ones(4)), target)
    (0.01 * loss).backward()
    nats = optimizer.control.gate.nats()
    assert nats is None if not known else nats.item() == pytest.approx(loss.item())


def test_what_a_closure_returns_is_no_cross_entropy_though_the_loss_fn_is():
    torch.manual_seed(0)
    criterion = nn.CrossEntropyLoss()
    model = nn.Linear(5, 3)
    optimizer = AdaptiveOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), model, loss_fn=criterion)
    x, y, losses = torch.randn(30, 5), torch.arange(30) % 3, []

    def closure():
        optimizer.zero_grad()
        losses.append(criterion(model(x), y))
        share = 0.005 * losses[-1]
        share.backward()
        return share

    for _ in range(12):
        optimizer.step(closure)
    signals = optimizer.control.signals
    assert max(signals.losses) < 0.01
    assert signals.nats == pytest.approx([loss.item() for loss in losses])
    assert optimizer.control._nats > 0.01
    signals.forget(but=3)
    assert len(signals.nats) == len(signals.losses) == 4


@pytest.mark.parametrize(("loss_fn", "nats"), [(nn.CrossEntropyLoss(), True), (nn.CrossEntropyLoss(reduction="sum"), False)])
def test_a_trial_ends_when_all_labels_are_learnt_and_nothing_is_taken_back(loss_fn, nats, monkeypatch):
    monkeypatch.setattr("adaptive_opt.verify.GAIN", 100.0)  # no verdict before that
    torch.manual_seed(0)
    x = torch.randn(64, 10)
    y = (x[:, 0] > 0).long()
    model = nn.Sequential(nn.Linear(10, 32), nn.Tanh(), nn.Linear(32, 2))
    base = torch.optim.AdamW(model.parameters(), lr=0.01)
    optimizer, said, losses = AdaptiveOptimizer(base, model, loss_fn=loss_fn, probe=LanczosProbe(price=1.0)), [], []
    for _ in range(150):
        optimizer.zero_grad()
        loss = loss_fn(model(x), y)
        loss.backward()
        optimizer.step()
        said += [event.sentence() for event in optimizer.report.events if event.name == "kfac"]
        losses.append(loss.item())
    assert any("kfac may be faster" in line for line in said), said
    assert any("all labels are learnt (loss" in line for line in said) == nats, said
    if nats:
        assert optimizer.report.mode == "base"
        assert optimizer.control.signals.losses[-1] == losses[-1] < 0.01  # no return to before the trial
        assert losses[-1] < losses[-50]


def optimizer_of(task, policy=None):
    base = torch.optim.AdamW(task.model.parameters(), lr=task_lr(task))
    source = {"loss_fn": task.loss_fn, "probe": LanczosProbe(price=1.0)}
    return AdaptiveOptimizer(base, task.model, policy=policy, **source)


def task_lr(task):
    return 0.03 if isinstance(task, Canyon) else 1e-3


def train(task, optimizer, steps):
    said = []
    for i in steps:
        x, y = task.batch(i)
        optimizer.zero_grad()
        task.loss_fn(task.model(x), y).backward()
        optimizer.step()
        said += [event.sentence() for event in optimizer.report.events]
    return said


def test_noisy_batches_are_left_alone_and_a_full_batch_is_not():
    torch.manual_seed(0)
    noisy, canyon = Digits(seed=0, batch_size=4), Canyon(seed=0)
    wrapped = optimizer_of(noisy)
    assert not any("kfac" in line for line in train(noisy, wrapped, range(60)))
    assert wrapped.control.agreement.now(60) < 0.3
    assert any("kfac may be faster" in line for line in train(canyon, optimizer_of(canyon), range(30)))


def test_a_run_resumed_within_a_window_sees_the_same_bit_for_bit():
    torch.manual_seed(0)
    whole, first, second = (Canyon(seed=0) for _ in range(3))
    a, b, c = map(optimizer_of, (whole, first, second))
    train(first, b, range(20))
    assert b.control.agreement.cosines
    second.model.load_state_dict(first.model.state_dict())
    c.load_state_dict(copy.deepcopy(b.state_dict()))
    train(whole, a, range(30))
    train(second, c, range(20, 30))
    assert a.control.agreement.mean == c.control.agreement.mean
    assert a.control.agreement.mean is not None


def test_who_tries_nothing_compares_nothing():
    torch.manual_seed(0)
    task = Canyon(seed=0)
    wrapped = optimizer_of(task, RulePolicy(tries=()))
    train(task, wrapped, range(30))
    assert wrapped.control.agreement.seen == -1


def test_a_window_in_which_another_mode_is_switched_on_is_let_go_of():
    class Early(RulePolicy):
        def decide(self, diagnosis, history):
            return replace(super().decide(diagnosis, history), mode="kfac" if history.step >= 20 else "base")

    torch.manual_seed(0)
    task = Canyon(seed=0)
    wrapped = optimizer_of(task, Early())
    train(task, wrapped, range(20))
    assert wrapped.control.agreement.last is not None
    train(task, wrapped, range(20, 22))
    assert wrapped.control.mode == "kfac"
    assert (wrapped.control.agreement.last, wrapped.control.agreement.cosines) == (None, [])


@pytest.mark.parametrize("why", ["the probe is idle", "the schedule ends", "all labels are learnt", "damp holds the step"])
def test_nothing_is_compared_where_no_mode_may_be_tried(why):
    torch.manual_seed(0)
    task = Canyon(seed=0)
    wrapped = optimizer_of(task)
    if why == "the probe is idle":
        wrapped.control.probe = LanczosProbe(overhead=0)
    train(task, wrapped, range(15))
    if why == "the schedule ends":
        wrapped.param_groups[0]["lr"] *= 0.01
    if why == "all labels are learnt":
        wrapped.control.signals.nats = [0.001] * 15
    if why == "damp holds the step":
        wrapped.control.damp.scale = 0.5
    train(task, wrapped, range(15, 20))
    assert wrapped.control.agreement.seen == -1


def test_a_checkpoint_of_before_there_was_agreement_takes_none_over_from_the_run_that_is_left():
    torch.manual_seed(0)
    old, used = Canyon(seed=0), Canyon(seed=0)
    a, b = optimizer_of(old), optimizer_of(used)
    train(old, a, range(5))
    train(used, b, range(30))
    assert b.control.agreement.mean is not None
    state = copy.deepcopy(a.state_dict())
    for part in ("agreement", "stays", "validation"):
        del state["adaptive"][part]
    del state["adaptive"]["signals"]["nats"]
    b.load_state_dict(state)
    assert (b.control.agreement.mean, b.control.agreement.seen, b.control.stays.stays) == (None, -1, [])
    assert b.control.signals.nats == [math.inf] * 5

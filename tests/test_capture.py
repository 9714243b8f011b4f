"""Where the batch comes from: every usual way of calling model and loss is captured, or refused by name."""

import pytest
import torch
from problems import make
from torch import nn
from torch.optim.swa_utils import AveragedModel

from adaptive_opt import AdaptiveOptimizer, LanczosProbe

PROBE = LanczosProbe(every=1, num_steps=3)


def wrap(model, criterion, *others, **kwargs):
    params = [p for m in (model, *others) for p in m.parameters()]
    base = torch.optim.SGD(params, lr=0.05, momentum=0.9)
    return AdaptiveOptimizer(base, model, loss_fn=criterion, **{"probe": PROBE, **kwargs})


def objective_of(optimizer):
    objective = optimizer.control.gate.context(None, None).objective
    assert objective is not None, optimizer.control.gate.why_not()
    return objective


def assert_replays(optimizer):
    """The replayed gradient is p.grad to 1e-6 of its norm."""
    objective = objective_of(optimizer)
    for g, p in zip(objective.gradient(), objective.params, strict=True):
        assert (g - p.grad).norm() <= 1e-6 * p.grad.norm().clamp_min(1e-3)


class Recurrent(nn.Module):
    """(B, T, 3) in, and out in whatever shape is asked for."""

    def __init__(self, pack=lambda out: out, bias=True):
        super().__init__()
        self.first, self.second, self.pack = nn.Linear(3, 8), nn.Linear(8, 4, bias), pack

    def forward(self, x, *, gain=1.0, more=None):
        x = x if more is None else x + more["shift"]
        return self.pack(self.second(torch.tanh(self.first(x)) * gain))


X, LABELS = torch.randn(6, 5, 3, generator=torch.Generator().manual_seed(1)), torch.arange(30).view(6, 5) % 4

VIEWS = {
    "view": lambda m, c: c(m(X).view(-1, 4), LABELS.view(-1)),
    "flatten": lambda m, c: c(m(X).flatten(0, 1), LABELS.flatten()),
    "transpose": lambda m, c: c(m(X).transpose(1, 2), LABELS),
    "permute": lambda m, c: c(m(X).permute(0, 2, 1), LABELS),
    "last": lambda m, c: c(m(X)[:, -1], LABELS[:, -1]),
    "squeeze": lambda m, c: c(m(X[:, :1]).squeeze(1), LABELS[:, 0]),
    "kwargs": lambda m, c: c(input=m(X, gain=2.0, more={"shift": X}).view(-1, 4), target=LABELS.view(-1)),
    "one sample": lambda m, c: c(m(X[0]), LABELS[0]),
}
PARTLESS = {"transpose": 0.5, "permute": 0.5, "last": 0.5}  # a strided view: taken whole, or cut rightly


@pytest.mark.parametrize("view", VIEWS)
def test_a_view_of_the_output_is_captured(view):
    model, criterion = Recurrent(), nn.CrossEntropyLoss()
    optimizer = wrap(model, criterion)
    loss = VIEWS[view](model, criterion)
    loss.backward()
    assert objective_of(optimizer).loss() == pytest.approx(loss.item(), rel=1e-6)
    assert_replays(optimizer)
    part = objective_of(optimizer).part(0.5, least=1)
    assert part is not None or view in PARTLESS
    optimizer.step()
    assert optimizer.report.reading.loss == pytest.approx(loss.item(), rel=1e-6)


@pytest.mark.parametrize("view", ["view", "flatten", "squeeze", "kwargs"])
def test_a_part_is_the_loss_on_the_first_samples(view):
    model, criterion = Recurrent(), nn.CrossEntropyLoss()
    optimizer = wrap(model, criterion)
    VIEWS[view](model, criterion).backward()
    part, fraction = objective_of(optimizer).part(0.5, least=1)
    assert (part.batch_size, fraction) == (3, 0.5)
    rows = slice(0, 3)
    want = {
        "squeeze": lambda: criterion(model(X[rows, :1]).squeeze(1), LABELS[rows, 0]),
        "kwargs": lambda: criterion(model(X[rows], gain=2.0, more={"shift": X[rows]}).view(-1, 4), LABELS[rows].view(-1)),
    }.get(view, lambda: criterion(model(X[rows]).view(-1, 4), LABELS[rows].view(-1)))
    assert part.loss() == pytest.approx(want().item(), rel=1e-6)


OUTPUTS = {
    "tuple": (lambda out: (out, out.detach()), lambda o: o[0]),
    "dict": (lambda out: {"hidden": out.tanh(), "logits": out}, lambda o: o["logits"]),
    "nested": (lambda out: [{"logits": (out, None)}], lambda o: o[0]["logits"][0]),
}


@pytest.mark.parametrize("kind", OUTPUTS)
def test_an_output_inside_a_container_is_captured(kind):
    pack, take = OUTPUTS[kind]
    model, criterion = Recurrent(pack), nn.CrossEntropyLoss()
    optimizer = wrap(model, criterion)
    criterion(take(model(X)).view(-1, 4), LABELS.view(-1)).backward()
    assert_replays(optimizer)


class Contrast(nn.Module):
    """A loss of two tensors of the output, one of them without gradient."""

    def forward(self, a, b, *, weights):
        return (weights * (a - 0.5 * b).pow(2).mean((1, 2))).sum()


def test_a_detached_output_stays_detached():
    model, criterion = Recurrent(), Contrast()
    optimizer = wrap(model, criterion)
    out = model(X)
    criterion(out, out.detach(), weights=torch.rand(6)).backward()
    assert_replays(optimizer)


UNREDUCED = {
    "mean": lambda each: each.mean(),
    "weights": lambda each: (each * torch.linspace(0.1, 2, len(each))).mean(),
}


@pytest.mark.parametrize("how", UNREDUCED)
def test_a_loss_for_each_sample_may_be_weighted_outside(how):
    model, criterion = Recurrent(), nn.CrossEntropyLoss(reduction="none")
    optimizer = wrap(model, criterion)
    x, y = X[:, 0], LABELS[:, 0]
    UNREDUCED[how](criterion(model(x), y)).backward()
    assert_replays(optimizer)
    part, _ = objective_of(optimizer).part(0.5, least=1)
    each = criterion(model(x), y)
    weights = torch.autograd.grad(UNREDUCED[how](each), each)[0]
    assert part.loss() == pytest.approx((weights * each)[:3].sum().item() * 2, rel=1e-5)
    optimizer.step()
    assert optimizer.control.gate.trusted is True


def test_loss_fn_called_twice_on_one_output_counts_twice():
    model, criterion = Recurrent(), nn.CrossEntropyLoss()
    optimizer = wrap(model, criterion)
    out = model(X)
    loss = criterion(out.view(-1, 4), LABELS.view(-1)) + 0.3 * criterion(out[:, -1], LABELS[:, 0])
    loss.backward()
    assert objective_of(optimizer).loss() == pytest.approx(loss.item(), rel=1e-6)
    assert_replays(optimizer)


def test_a_difference_of_losses_is_finite():
    model, criterion = Recurrent(), nn.CrossEntropyLoss()
    optimizer = wrap(model, criterion)
    (criterion(model(X[:, 0]), LABELS[:, 0]) - criterion(model(X[:, 1]), LABELS[:, 0])).backward()
    optimizer.step()
    assert optimizer.report.stepped
    assert optimizer.control.gate.trusted is True


@pytest.mark.parametrize("weights", [(1 / 3, 1 / 3, 1 / 3), (0.7, 0.2, 0.1)], ids=["equal", "unequal"])
def test_accumulated_micro_batches_are_replayed_together(weights):
    problem = make("cnn", 3, batch=16)
    optimizer = wrap(problem.model, problem.criterion)
    for w, (x, y) in zip(weights, problem.batches, strict=True):
        (w * problem.criterion(problem.model(x), y)).backward()
    assert_replays(optimizer)
    objective = objective_of(optimizer)
    assert objective.batch_size == 48
    part, fraction = objective.part(0.25)
    assert fraction == pytest.approx(1 / 3)
    assert part.batch_size == 16
    assert all(g.isfinite().all() for g in part.gradient())
    optimizer.step()
    assert optimizer.control.gate.trusted is True
    assert optimizer.report.reading.batch_size == 48
    assert not optimizer._capture.calls


def test_accumulated_micro_batches_take_part_in_a_small_reading():
    problem = make("mlp", 4)
    optimizer = wrap(problem.model, problem.criterion, probe=LanczosProbe(overhead=1.0, num_steps=3), interventions={})
    for x, y in problem.batches:
        (problem.criterion(problem.model(x), y) / 4).backward()
    x, y = problem.batches[0]
    want = problem.criterion(problem.model(x), y).item()
    optimizer.step()
    assert optimizer.report.reading.fraction == 0.25
    assert optimizer.report.reading.loss == pytest.approx(want, rel=1e-5)


@pytest.mark.parametrize(("before", "between"), [(30, 0), (0, 2)])
def test_validation_with_a_graph_but_no_backward_is_ignored(before, between):
    problem = make("mlp", 2)
    model, criterion = problem.model, problem.criterion
    optimizer = wrap(model, criterion)
    shadow = AveragedModel(model)
    (x, y), (vx, vy) = problem.batches

    def validate(passes):
        for _ in range(passes):
            criterion(model(vx), vy)
            criterion(shadow(vx), vy)
            criterion(model(vx).softmax(-1), vy)

    validate(before)
    loss = criterion(model(x), y)
    validate(between)
    loss.backward()
    assert_replays(optimizer)
    optimizer.step()
    assert optimizer.control.gate.trusted is True


def test_zero_grad_drops_what_went_backward_before():
    problem = make("mlp", 2)
    optimizer = wrap(problem.model, problem.criterion)
    for x, y in problem.batches:
        optimizer.zero_grad()
        loss = problem.criterion(problem.model(x), y)
        loss.backward()
    assert objective_of(optimizer).batch_size == 32
    assert_replays(optimizer)


@pytest.mark.parametrize("how", ["None", "zero"])
def test_the_model_s_own_zero_grad_drops_what_went_backward_before(how):
    problem = make("mlp", 6)
    optimizer = wrap(problem.model, problem.criterion)
    for n, (x, y) in enumerate(problem.batches):
        if n in (0, 2, 4):  # two micro-batches a step, of which the first step is skipped
            problem.model.zero_grad(set_to_none=how == "None")
        problem.criterion(problem.model(x), y).backward()
        if n in (3, 5):
            assert objective_of(optimizer).batch_size == 64
            assert_replays(optimizer)
            optimizer.step()
    assert optimizer.control.gate.trusted is True


def test_gradients_that_were_clipped_in_place_are_no_cleared_ones():
    problem = make("mlp", 3)
    optimizer = wrap(problem.model, problem.criterion)
    with torch.no_grad():
        for p in problem.model[2].parameters():
            p.zero_()  # the first layer's gradient is zero throughout
    for x, y in problem.batches:
        problem.criterion(problem.model(x), y).backward()
        torch.nn.utils.clip_grad_norm_(problem.model.parameters(), 1e3)
    assert objective_of(optimizer).batch_size == 96


def test_two_optimizers_on_one_model_do_not_see_each_others_replays():
    problem = make("mlp", 3)
    model, criterion = problem.model, problem.criterion
    halves = [
        AdaptiveOptimizer(torch.optim.SGD(part.parameters(), lr=1e-3), model, loss_fn=criterion, probe=PROBE)
        for part in (model[0], model[2])
    ]
    for x, y in problem.batches:
        for optimizer in halves:
            optimizer.zero_grad()
        criterion(model(x), y).backward()
        for optimizer in halves:
            optimizer.step()
            assert optimizer.report.reading is not None
            assert optimizer.control.gate.trusted is True


SPOILED = {
    "penalty": lambda m, c, x, y: (c(m(x), y) + 0.5 * sum(p.square().sum() for p in m.parameters())).backward(),
    "batch": lambda m, c, x, y: (c(m(x), y).backward(), y.add_(1).remainder_(4)),
}


@pytest.mark.parametrize("case", SPOILED)
def test_a_loss_that_a_replay_misses_is_refused_once_and_training_goes_on_as_bare(case):
    def run(wrapped):
        problem = make("mlp", 8)
        optimizer = base = torch.optim.SGD(problem.model.parameters(), lr=0.05, momentum=0.9)
        if wrapped:
            optimizer = AdaptiveOptimizer(base, problem.model, loss_fn=problem.criterion, probe=PROBE)
        for x, y in problem.batches:
            optimizer.zero_grad()
            SPOILED[case](problem.model, problem.criterion, x, y)
            optimizer.step()
        return [p.detach() for p in problem.model.parameters()], optimizer

    with pytest.warns(UserWarning, match=r"cosine .*an added penalty, a batch changed in place") as said:
        wrapped, optimizer = run(True)
    assert len(said) == 1
    assert optimizer.control.gate.trusted is False
    assert all(torch.equal(a, b) for a, b in zip(wrapped, run(False)[0], strict=True))


@pytest.mark.parametrize("between", [lambda out: out.softmax(-1), lambda out: out * 2, lambda out: out.float() + 0])
def test_a_computation_between_model_and_loss_is_refused_by_name(between):
    problem = make("mlp", 3)
    optimizer = wrap(problem.model, problem.criterion)
    before = problem.model[0].weight.detach().clone()

    def train():
        for x, y in problem.batches:
            optimizer.zero_grad()
            problem.criterion(between(problem.model(x)), y).backward()
            optimizer.step()
            assert optimizer.report.reading is None

    with pytest.warns(UserWarning, match="neither the model's output nor a view or cast of it; move the computation") as said:
        train()
    assert len(said) == 1
    assert not torch.equal(before, problem.model[0].weight)


def test_an_output_cast_to_float32_under_autocast_is_replayed():
    problem = make("mlp", 3)
    optimizer = wrap(problem.model, problem.criterion)
    for x, y in problem.batches:
        optimizer.zero_grad()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            out = problem.model(x)
        assert out.dtype == torch.bfloat16
        problem.criterion(out.float(), y).backward()
        optimizer.step()
        assert optimizer.report.reading is not None


class Positions(nn.Module):
    """An input beside the batch whose first dimension is the batch's by coincidence, and which must stay whole."""

    def __init__(self, error=RuntimeError):
        super().__init__()
        self.linear, self.error = nn.Linear(3, 4), error

    def forward(self, x, mixing):  # (B, 3), (B, B): a graph's adjacency
        if mixing.shape[0] != mixing.shape[1]:
            raise self.error("the mixing matrix is square")
        return self.linear(mixing @ x)


@pytest.mark.parametrize("error", [RuntimeError, ValueError])
def test_a_batch_that_cannot_be_cut_is_measured_whole_and_trusted(error):
    model, criterion = Positions(error), nn.CrossEntropyLoss()
    optimizer = wrap(model, criterion, probe=LanczosProbe(overhead=0.5))
    notes = []
    for _ in range(4):
        optimizer.zero_grad()
        criterion(model(torch.randn(40, 3), torch.eye(40)), torch.arange(40) % 4).backward()
        optimizer.step()
        reading = optimizer.report.reading
        notes += reading.notes if reading else ()
        assert reading is None or (reading.fraction, reading.batch_size) == (1.0, 40)
    assert sum("cannot be cut (the mixing matrix is square)" in note for note in notes) == 1
    assert optimizer.control.gate.trusted is True

"""standardised: the steps, and the start, that standardised data would give, and the model stays as it is."""

import copy

import pytest
import torch
from problems import BASES
from torch import nn

from adaptive_opt import AdaptiveOptimizer, ConstantPolicy, LanczosProbe, RulePolicy
from adaptive_opt.interventions import Snapshot
from adaptive_opt.modes import Standardised
from adaptive_opt.policy import TABLE

OFF = LanczosProbe(overhead=0)
LOSS, SQUARES = nn.CrossEntropyLoss(), nn.MSELoss()


def data(rows=96, offset=5.0):
    """Features of sizes 1e-2 to 1e3, `offset` spreads away from 0; what they are when standardised; two classes."""
    z = torch.randn(rows, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    z = (z - z.mean(0)) / z.std(0, correction=0)
    return (z + offset) * 10.0 ** torch.arange(-2, 4), z, (z[:, :3].sum(1) > z[:, 3:].prod(1)).long()


def net(bias=True):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 16, bias=bias), nn.ReLU(), nn.Linear(16, 2)).double()


def wrapped(model, base, loss_fn=LOSS, **more):
    given = {"probe": OFF, "policy": ConstantPolicy("standardised"), **more}
    return AdaptiveOptimizer(base, model, loss_fn=loss_fn, **given)


def train(optimizer, model, x, y, steps, loss_fn=LOSS):
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = loss_fn(model(x), y)
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    return losses


@pytest.mark.parametrize("base", BASES)
def test_it_learns_what_the_base_would_learn_from_standardised_data(base):
    x, z, y = data()
    model, twin = net(), net()
    train(wrapped(model, BASES[base](model.parameters())), model, x, y, 21)  # the first batch is of another start
    train(BASES[base](twin.parameters()), twin, z, y, 20)
    torch.testing.assert_close(model(x), twin(z), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("bias", [True, False])
def test_a_step_is_the_bases_own_in_the_other_coordinates(bias):
    """A convolution, by autograd on the coordinates themselves; without a bias nothing is centred."""
    torch.manual_seed(0)
    conv = nn.Conv2d(3, 4, 3, bias=bias).double()
    sizes = torch.tensor([1.0, 100.0, 1e4], dtype=torch.float64).reshape(3, 1, 1)
    x = torch.randn(40, 3, 5, 5, dtype=torch.float64) * sizes + 50
    mean = x.mean((0, 2, 3), keepdim=True)[0] if bias else torch.zeros_like(sizes)
    spread = ((x - mean) ** 2).mean((0, 2, 3), keepdim=True)[0].sqrt()
    W = (conv.weight * spread).detach().requires_grad_()
    b = (conv.bias + (conv.weight * mean).sum((1, 2, 3))).detach().requires_grad_() if bias else None
    parts = [p for p in (W, b) if p is not None]

    model = nn.Sequential(conv, nn.Flatten())
    optimizer = wrapped(model, torch.optim.SGD(model.parameters(), lr=1e-3), SQUARES)
    there = model(x).detach()
    train(optimizer, model, x, there, 1, SQUARES)  # the loss is 0: no other start is better, and nothing moves
    torch.testing.assert_close(model(x), there, rtol=0, atol=0)
    for _ in range(3):
        train(optimizer, model, x, torch.zeros_like(there), 1, SQUARES)
        out = nn.functional.conv2d((x - mean) / spread, W, b).flatten(1)
        for p, g in zip(parts, torch.autograd.grad((out**2).mean(), parts), strict=True):
            p.data -= 1e-3 * g
    torch.testing.assert_close(model(x), nn.functional.conv2d((x - mean) / spread, W, b).flatten(1))
    assert not torch.allclose(model(x), there, rtol=0.1)  # they did move


def test_what_was_learned_stays():
    x, z, y = data()
    model, twin = net(), net()
    train(torch.optim.Adam(twin.parameters(), lr=0.01), twin, z, y, 200)
    with torch.no_grad():  # the same function of the raw data
        first, spread, mean = twin[0], x.std(0, correction=0), x.mean(0)
        model.load_state_dict(twin.state_dict())
        model[0].weight.copy_(first.weight / spread)
        model[0].bias.copy_(first.bias - (first.weight / spread) @ mean)
    before = copy.deepcopy(model.state_dict())
    optimizer = wrapped(model, torch.optim.SGD(model.parameters(), lr=1e-9))
    train(optimizer, model, x, y, 1)
    assert optimizer.report.stepped
    torch.testing.assert_close(dict(model.state_dict()), dict(before), rtol=1e-6, atol=1e-6)


def test_data_of_the_usual_size_is_left_to_the_base_bit_for_bit():
    _, z, y = data()
    model, twin = net(), net()
    optimizer = wrapped(model, BASES["adamw"](model.parameters()))
    train(optimizer, model, z, y, 10)
    train(BASES["adamw"](twin.parameters()), twin, z, y, 10)
    assert optimizer.report.mode == "standardised"
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), twin.parameters(), strict=True))


def test_only_layers_at_the_front_with_enough_rows_count():
    x, _, y = data()
    model = nn.Sequential(nn.Linear(6, 16), nn.Linear(16, 2)).double()
    for rows, there in ((96, [0]), (31, [])):
        optimizer = wrapped(model, torch.optim.SGD(model.parameters(), lr=1e-3))
        train(optimizer, model, x[:rows], y[:rows], 1)
        assert list(optimizer.control.modes["standardised"].state_dict()["layers"]) == there


def test_weights_that_two_layers_share_are_left_alone():
    x, _, y = data()
    first, again = nn.Linear(6, 6).double(), nn.Linear(6, 6).double()
    again.weight = first.weight
    model = nn.Sequential(first, nn.Tanh(), again)
    optimizer = wrapped(model, torch.optim.SGD(model.parameters(), lr=1e-3))
    train(optimizer, model, x, y, 1)
    assert not optimizer.control.modes["standardised"].state_dict()["layers"]


def test_a_constant_feature_is_only_centred():
    x, _, y = data()
    x[:, 0] = 7.0
    model = net()
    optimizer = wrapped(model, BASES["adamw"](model.parameters()))
    losses = train(optimizer, model, x, y, 40)
    inputs = optimizer.control.modes["standardised"].state_dict()["layers"][0]
    assert (float(inputs["spread"][0]), float(inputs["mean"][0])) == (1.0, pytest.approx(7.0))
    assert losses[-1] < losses[1] < losses[0]


def test_a_run_goes_on_bit_for_bit_from_a_checkpoint_and_from_a_snapshot():
    x, _, y = data()
    model = net()
    optimizer = wrapped(model, BASES["adamw"](model.parameters()))
    train(optimizer, model, x, y, 8)
    saved = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
    control = optimizer.control
    snapshot = Snapshot.take(8, control.gate.context(control.modes["standardised"]))
    train(optimizer, model, x, y, 8)
    end = copy.deepcopy(list(model.parameters()))

    control._restore(snapshot)
    train(optimizer, model, x, y, 8)
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), end, strict=True))

    other = net()
    resumed = wrapped(other, BASES["adamw"](other.parameters()))
    other.load_state_dict(saved[0])
    resumed.load_state_dict(saved[1])
    train(resumed, other, x, y, 8)
    assert all(torch.equal(p, q) for p, q in zip(other.parameters(), end, strict=True))


def test_leaving_it_keeps_the_weights_and_the_base_begins_anew():
    x, _, y = data()
    model = net()
    optimizer = wrapped(model, BASES["adamw"](model.parameters()))
    train(optimizer, model, x, y, 8)
    control, before = optimizer.control, copy.deepcopy(model.state_dict())
    assert model[0].weight in optimizer.base.state
    control._enter("base", control.gate.context(control.modes["standardised"]))
    assert all(torch.equal(model.state_dict()[k], v) for k, v in before.items())
    assert model[0].weight not in optimizer.base.state
    assert model[2].weight in optimizer.base.state


def test_a_base_that_raises_leaves_everything_as_it_was():
    class Failing(torch.optim.SGD):
        armed = False

        def step(self, closure=None):
            super().step(closure)
            if self.armed:
                raise ArithmeticError("the base failed")

    x, _, y = data()
    model = net()
    base = Failing(model.parameters(), lr=0.01)
    optimizer = wrapped(model, base)
    train(optimizer, model, x, y, 3)
    first = model[0]
    held = [(p, p.data.clone()) for p in (first.weight, first.bias)]
    base.armed = True
    with pytest.raises(ArithmeticError, match="the base failed"):
        train(optimizer, model, x, y, 1)
    assert all(torch.equal(p.data, value) for p, value in held)
    assert first.weight.grad.shape == first.weight.shape


def test_a_replay_that_raises_leaves_the_start_as_it_was():
    """At the look at the loss where the start is the other one already."""
    x, _, y = data()
    model = net()
    before = copy.deepcopy(model.state_dict())

    def objective():
        if not torch.equal(model[0].weight, before["0.weight"]):
            raise RuntimeError("the data is gone")
        return LOSS(model(x), y)

    given = {"probe": OFF, "policy": ConstantPolicy("standardised")}
    optimizer = AdaptiveOptimizer(torch.optim.SGD(model.parameters(), lr=1e-300), model, objective=objective, **given)
    LOSS(model(x), y).backward()
    with pytest.warns(UserWarning, match="the data is gone"):
        optimizer.step()
    assert all(torch.equal(model.state_dict()[k], v) for k, v in before.items())


@pytest.mark.parametrize("base", ["sgd", "adamw"])
def test_the_rules_standardise_raw_data_at_the_first_step_and_keep_it(base):
    x, _, y = (t.float() if t.is_floating_point() else t for t in data())
    model, bare = net().float(), net().float()
    optimizer = AdaptiveOptimizer(BASES[base](model.parameters()), model, loss_fn=LOSS, probe=LanczosProbe(price=1.0))
    said, losses = [], []
    for _ in range(60):
        losses += train(optimizer, model, x, y, 1)
        said += [e for e in optimizer.report.events if e.name == "standardised"]
    assert [(e.step, e.outcome) for e in said] == [(0, "pending"), (0, "kept")]
    assert "features as large as" in said[0].seen
    assert optimizer.report.mode == "standardised"
    assert losses[-1] < 0.5 * train(BASES[base](bare.parameters()), bare, x, y, 60)[-1]


def test_where_a_normalisation_takes_the_scale_out_nothing_is_done():
    x, _, y = data(offset=0.0)
    made = []
    for interested in (True, False):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(6, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 2)).double()
        table = [rule for rule in TABLE if interested or rule.treatment != "standardised"]
        base = BASES["adamw"](model.parameters())
        given = {"probe": LanczosProbe(price=1.0), "policy": RulePolicy(table=table, tries=())}
        optimizer = AdaptiveOptimizer(base, model, loss_fn=LOSS, **given)
        said = []
        for _ in range(12):
            train(optimizer, model, x / x.std(0)[:1] * 100, y, 1)
            said += [e.done for e in optimizer.report.events if e.name == "standardised"]
        assert said == ["found nothing that helps"] * interested
        made.append(copy.deepcopy(model.state_dict()))
    assert all(torch.equal(made[0][k], v) for k, v in made[1].items())


def test_features_in_one_unit_keep_their_sizes():
    """Pixels: an edge that is nearly always dark is not made as loud as the middle."""
    _, z, y = data()
    sizes = torch.tensor([100.0, 100.0, 90.0, 80.0, 20.0, 5.0])
    model = net()
    optimizer = wrapped(model, torch.optim.SGD(model.parameters(), lr=1e-3))
    train(optimizer, model, z * sizes, y, 1)
    spread = optimizer.control.modes["standardised"].state_dict()["layers"][0]["spread"]
    torch.testing.assert_close(spread, (sizes.double() ** 2).mean().sqrt().expand(6))


def test_a_start_that_does_not_go_well_is_taken_back():
    x, _, y = (t.float() if t.is_floating_point() else t for t in data())
    model = net().float()
    base = torch.optim.SGD(model.parameters(), lr=1e4)  # far too high for standardised data too
    optimizer = AdaptiveOptimizer(base, model, loss_fn=LOSS, probe=LanczosProbe(price=1.0))
    said = []
    for _ in range(60):
        train(optimizer, model, x, y, 1)
        said += [e for e in optimizer.report.events if e.name == "standardised"]
    assert said[-1].outcome == "reverted"
    assert optimizer.report.mode == "base"


def test_a_broken_first_batch_is_not_taken_for_raw_data():
    x, _, y = (t.float() if t.is_floating_point() else t for t in data())
    x = (x - x.mean(0)) / x.std(0)
    model = net().float()
    before = copy.deepcopy(model.state_dict())
    base = torch.optim.AdamW(model.parameters(), lr=1e-3)
    optimizer = AdaptiveOptimizer(base, model, loss_fn=LOSS, probe=LanczosProbe(price=1.0))
    train(optimizer, model, 1000 * x, y, 1)
    assert optimizer.report.mode == "standardised"
    train(optimizer, model, x, y, 1)
    (event,) = (e for e in optimizer.report.events if e.name == "standardised")
    assert (event.outcome, event.result) == ("reverted", "the next batch is of another size")
    assert (optimizer.report.mode, optimizer.report.stepped) == ("base", False)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_bad_input_is_quoted():
    with pytest.raises(ValueError, match=r"Standardised\(raw=0\)"):
        Standardised(raw=0)

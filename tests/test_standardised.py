"""standardised: the steps, and the start, that standardised data would give, and the model stays as it is."""

import copy

import pytest
import torch
from problems import BASES
from torch import nn

from adaptive_opt import AdaptiveOptimizer, ConstantPolicy, LanczosProbe, RulePolicy
from adaptive_opt.interventions import Snapshot
from adaptive_opt.modes import Standardised
from adaptive_opt.parallel import ProcessLost
from adaptive_opt.policy import TABLE
from adaptive_opt.records import Decision, Event, Trend
from adaptive_opt.verify import Trial

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


def raw():
    x, _, y = data()
    return x.float(), y


def ruled(model, base, **more):
    return AdaptiveOptimizer(base, model, loss_fn=LOSS, probe=LanczosProbe(price=1.0), **more)


def told(optimizer, model, batches, y, name="standardised"):
    """The events of this name, one training step a batch."""
    said = []
    for x in batches:
        train(optimizer, model, x, y, 1)
        said += [e for e in optimizer.report.events if name in (None, e.name)]
    return said


def layers(optimizer):
    return optimizer.control.modes["standardised"].state_dict()["layers"]


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
    assert "layer 0 starts as for standardised features, loss 7.473 -> 0.7076; this batch's step was skipped" in said[0].done
    assert said[1].result.startswith("loss 0.7076 -> ")  # of the other start
    assert optimizer.report.mode == "standardised"
    assert losses[-1] < 0.5 * train(BASES[base](bare.parameters()), bare, x, y, 60)[-1]


@pytest.mark.parametrize(
    "base", [BASES["adamw"], lambda p: torch.optim.SGD(p, lr=50.0)], ids=["adamw", "sgd, and damp has its turn"]
)
def test_where_a_normalisation_takes_the_scale_out_the_run_goes_as_without_the_rule(base):
    x, _, y = data(offset=0.0)
    made, others = [], []
    for interested in (True, False):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(6, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 2)).double()
        table = [rule for rule in TABLE if interested or rule.treatment != "standardised"]
        optimizer = ruled(model, base(model.parameters()), policy=RulePolicy(table=table, tries=()))
        said = told(optimizer, model, [x / x.std(0)[:1] * 100] * 12, y, None)
        assert [e.done for e in said if e.name == "standardised"] == ["found nothing that helps"] * interested
        others.append([e for e in said if e.name != "standardised"])
        made.append(copy.deepcopy(model.state_dict()))
    assert others[0] == others[1]
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


@pytest.mark.parametrize("how", ["frozen", "no gradient", "lr 0", "frozen bias"])
def test_what_is_not_trained_is_not_overwritten(how):
    x, y = raw()
    model = net().float()
    first = model[0]
    still = [first.bias] if how == "frozen bias" else [first.weight, first.bias]
    for p in still:
        p.requires_grad_(how not in ("frozen", "frozen bias"))
    groups = [{"params": first.parameters(), "lr": 0.0 if how == "lr 0" else 0.01}, {"params": model[2].parameters()}]
    optimizer = wrapped(model, torch.optim.SGD(groups, lr=0.01))
    before = [p.clone() for p in still]
    for _ in range(10):
        optimizer.zero_grad()
        LOSS(model(x), y).backward()
        if how == "no gradient":
            first.weight.grad = first.bias.grad = None
        optimizer.step()
    assert all(torch.equal(p, q) for p, q in zip(still, before, strict=True))
    assert (0 in layers(optimizer)) == (how == "frozen bias")
    assert how != "frozen bias" or layers(optimizer)[0]["bias"] is None


def test_a_warm_up_is_given_the_time_that_it_takes():
    """One batch's loss at the other start may be lower than the others' there."""
    x, y = raw()
    model = net().float()
    base = torch.optim.AdamW(model.parameters(), lr=1e-3)
    optimizer, said = ruled(model, base, policy=RulePolicy(tries=())), []
    for step in range(110):
        base.param_groups[0]["lr"] = 1e-3 * (step + 1) / 500
        rows = torch.randint(96, (48,), generator=torch.Generator().manual_seed(step))
        said += told(optimizer, model, [x[rows]], y[rows])
    assert [e.outcome for e in said][-1] == "kept"


@pytest.mark.parametrize("at", [10, 40])
def test_a_return_stays_in_the_mode_that_the_parameters_are_of(at):
    """In its trial, which goes on, and after."""
    x, y = raw()
    model = net().float()
    optimizer = ruled(model, torch.optim.AdamW(model.parameters(), lr=0.01), policy=RulePolicy(tries=()))
    said = told(optimizer, model, [x * torch.nan if at <= i < at + 3 else x for i in range(80)], y, None)
    assert any(e.name == "rollback" and "went back to the parameters" in e.done for e in said)
    assert [(e.step, e.outcome) for e in said if e.name == "standardised"] == [(0, "pending"), (0, "kept")]
    assert optimizer.report.mode == "standardised"
    assert optimizer.report.loss < 0.1


def test_a_broken_batch_among_the_first_five_does_not_end_the_trial():
    x, y = raw()
    model = net().float()
    optimizer = ruled(model, torch.optim.AdamW(model.parameters(), lr=0.01))
    said = told(optimizer, model, [x * 1e5 if i == 3 else x for i in range(30)], y, None)
    assert any("the batch of step 3 lost" in e.seen and "went back" in e.done for e in said)
    assert [e.outcome for e in said if e.name == "standardised"] == ["pending", "kept"]


def test_a_trial_whose_mode_is_left_ends_with_an_event():
    class AtOnce(RulePolicy):
        def decide(self, diagnosis, history):
            if history.step == 0:
                return Decision("kfac", reason="at once", expects="progress a step")
            return super().decide(diagnosis, history)

    _, z, y = data()
    z, model = z.float(), net().float()
    optimizer = ruled(model, torch.optim.AdamW(model.parameters(), lr=0.01), policy=AtOnce())
    said = told(optimizer, model, [z * 1e5 if i == 3 else z for i in range(8)], y, "kfac")
    assert [(e.outcome, e.result) for e in said[:2]] == [("pending", ""), ("done", "no verdict: cut short by rollback")]
    assert optimizer.control.trial is None


@pytest.mark.parametrize("worse", ["loss", "validation"])
def test_it_is_taken_back_to_the_users_start_where_the_other_one_leads_to_worse(worse):
    x, y = raw()
    model = net().float()
    before = copy.deepcopy(model.state_dict())
    asked = []

    def validate():
        asked.append(0.0)
        return float(len(asked))

    base = torch.optim.SGD(model.parameters(), lr=10.0 if worse == "loss" else 0.1)
    more = {"validate": validate} if worse == "validation" else {}
    optimizer = ruled(model, base, policy=RulePolicy(tries=()), **more)
    sick = range(10, 13) if worse == "validation" else ()  # a return shortens and clips the steps of the other start
    *_, last = told(optimizer, model, [x * torch.nan if i in sick else x for i in range(26)], y)
    assert last.outcome == "reverted"
    assert ("validation loss " in last.result) == (worse == "validation")
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    rollback = optimizer.control.interventions["rollback"]
    assert (rollback.scale, rollback.clip, rollback.latest) == (1.0, None, None)
    told(optimizer, model, [x] * 20, y)
    assert optimizer.report.mode == "base"  # no snapshot leads there again


@pytest.mark.parametrize("losses", [[], [0.7] * 9])
def test_another_modes_trial_without_losses_is_undecided(losses):
    _, z, y = data()
    model = net()
    optimizer = ruled(model, BASES["adamw"](model.parameters()))
    train(optimizer, model, z, y, 20)
    control = optimizer.control
    control.signals.forget()
    trial = Trial("kfac", Event(10, "kfac", "", ""), 20, 0.7, list(range(len(losses))), losses)
    assert control._judge(trial, Trend(20, 0.6, 1.0), control.gate.context(control.modes["base"]), []).kept is None


def test_a_batch_that_cannot_be_believed_is_not_replayed_on_entry():
    x, y = raw()
    model, twin, calls = net().float(), net().float(), []
    optimizer = AdaptiveOptimizer(
        torch.optim.SGD(model.parameters(), lr=1e-3), model, probe=OFF, policy=ConstantPolicy("standardised")
    )

    def closure():
        calls.append(x * (-1) ** len(calls))  # another batch each time
        optimizer.zero_grad()
        loss = LOSS(model(calls[-1]), y)
        loss.backward()
        return loss

    with pytest.warns(UserWarning, match="does not reproduce the one that backward left"):
        optimizer.step(closure)
    train(torch.optim.SGD(twin.parameters(), lr=1e-3), twin, x, y, 1)
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), twin.parameters(), strict=True))
    for _ in range(2):
        optimizer.step(closure)
        assert not optimizer.report.events  # said once
    assert (len(calls), optimizer.report.mode) == (2 + 1 + 1, "base")


def test_constant_features_do_not_count_for_the_unit():
    x, y = raw()
    x = (x - x.mean(0)) / x.std(0) * torch.tensor([100.0, 80.0, 0.0, 0.0, 0.0, 0.0])
    model = net().float()
    optimizer = wrapped(model, torch.optim.SGD(model.parameters(), lr=1e-3))
    train(optimizer, model, x, y, 1)
    assert len(layers(optimizer)[0]["spread"].unique()) == 1


def test_an_automatic_step_size_stays_in_its_coordinates():
    x, y = raw()
    model = net().float()
    optimizer = ruled(model, torch.optim.AdamW(model.parameters(), lr=0.01), step_size="auto", policy=RulePolicy(tries=()))
    assert told(optimizer, model, [x] * 5, y) == []
    assert optimizer.report.mode == "base"


def test_where_it_finds_nothing_another_mode_goes_on_as_it_was():
    class Asks(ConstantPolicy):
        def decide(self, diagnosis, history):
            tried = history.step == 5 and "standardised" not in history.not_before
            return Decision("standardised", expects="less") if tried else super().decide(diagnosis, history)

    _, z, y = data()
    made = []
    for policy in (Asks("kfac"), ConstantPolicy("kfac")):
        model = net()
        optimizer = wrapped(model, BASES["adamw"](model.parameters()), policy=policy)
        said = told(optimizer, model, [z] * 15, y)
        assert [e.done for e in said] == ["found nothing that helps"] * isinstance(policy, Asks)
        assert optimizer.control.mode_since == 0
        made.append(list(model.parameters()))
    assert all(torch.equal(p, q) for p, q in zip(*made, strict=True))


def test_a_lost_process_is_not_taken_for_a_batch_that_is_gone():
    x, y = raw()
    model = net().float()
    before = copy.deepcopy(model.state_dict())

    def objective():
        if not torch.equal(model[0].weight, before["0.weight"]):
            raise ProcessLost("one of them has ended")
        return LOSS(model(x), y)

    given = {"probe": OFF, "policy": ConstantPolicy("standardised")}
    optimizer = AdaptiveOptimizer(torch.optim.SGD(model.parameters(), lr=1e-3), model, objective=objective, **given)
    objective().backward()
    with pytest.raises(ProcessLost, match="one of them has ended"):
        optimizer.step()
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_what_was_evaluated_is_charged():
    x, y = raw()
    for batch, passes in ((x, 3), (x / 1e4, 1)):
        model = net().float()
        optimizer = wrapped(model, torch.optim.SGD(model.parameters(), lr=1e-3))
        train(optimizer, model, batch, y, 1)
        assert optimizer.report.treatment_cost == pytest.approx(0.35 * passes)


def test_bad_input_is_quoted():
    with pytest.raises(ValueError, match=r"Standardised\(raw=0\)"):
        Standardised(raw=0)

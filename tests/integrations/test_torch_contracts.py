"""What PyTorch and its ecosystem demand of an optimizer, over five bases; every run is compared with the bare base.

docs/contracts.md says which demand is tested where.
"""

import copy
import io
import pickle
import warnings
from contextlib import nullcontext

import pytest
import torch
import torch.distributed.checkpoint as dcp
from bases import FIVE
from problems import CLASSES, CNN
from test_contracts import SCHEDULERS
from torch import nn
from torch.nn.utils import parametrizations
from torch.optim import lr_scheduler as lrs
from torch.optim import swa_utils
from torch.utils.checkpoint import checkpoint

from adaptive_opt import AdaptiveOptimizer, ConstantPolicy, LanczosProbe
from adaptive_opt.integrations.checkpoint import OptimizerState

BASES = dict(FIVE)
PROBED = {"probe": LanczosProbe(every=3, num_steps=3), "policy": ConstantPolicy("base")}
STEPS = 9


class MLP(nn.Sequential):
    def __init__(self, change=lambda layer: layer):
        super().__init__(change(nn.Linear(12, 16)), nn.Tanh(), nn.Dropout(0.2), change(nn.Linear(16, CLASSES)))


class Checkpointed(nn.Module):
    def __init__(self, reentrant):
        super().__init__()
        self.reentrant, self.inner = reentrant, MLP()
        self.first = nn.Linear(12, 12)

    def forward(self, x):
        return checkpoint(self.inner, self.first(x), use_reentrant=self.reentrant)


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.head = nn.Linear(12, 12), nn.Linear(12, 12), nn.Linear(12, CLASSES)
        self.b.weight = self.a.weight

    def forward(self, x):
        return self.head(torch.tanh(self.b(torch.tanh(self.a(x)))))


class Loop:
    """A plain training loop on a model; subclasses change one thing each."""

    batch_shape = (12,)
    measured = True  # a reading is expected

    def build(self):
        return MLP()

    def __init__(self, base, wrapped=None):
        torch.manual_seed(0)
        self.model, self.criterion = self.build(), nn.CrossEntropyLoss()
        self.batches = [(torch.randn(16, *self.batch_shape), torch.randint(0, CLASSES, (16,))) for _ in range(STEPS)]
        self.optimizer = BASES[base](self.params())
        if wrapped is not None:
            self.optimizer = AdaptiveOptimizer(self.optimizer, self.seen(), loss_fn=self.criterion, **wrapped)
        self.schedule = lrs.CosineAnnealingLR(self.optimizer, STEPS)
        self.done = 0

    def params(self):
        return self.model.parameters()

    def seen(self):
        """The module that the loop calls."""
        return self.model

    def step(self, x, y, n):
        self.optimizer.zero_grad()
        self.criterion(self.seen()(x), y).backward()
        self.optimizer.step()

    def train(self, to=STEPS):
        for n in range(self.done, to):
            torch.manual_seed(n)
            self.step(*self.batches[n], n)
            self.schedule.step()
        self.done = to
        return self

    def state(self):
        return {k: v.clone() for k, v in self.model.state_dict().items()}


class Clipping(Loop):
    def step(self, x, y, n):
        self.optimizer.zero_grad()
        self.criterion(self.model(x), y).backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), 0.1)
        self.optimizer.step()


class Accumulation(Loop):
    def step(self, x, y, n):
        for part in range(3):
            self.criterion(self.model(x[part::3]), y[part::3]).div(3).backward()
        self.optimizer.step()
        self.optimizer.zero_grad()


class WeightNorm(Loop):
    def build(self):
        return MLP(parametrizations.weight_norm)


class Orthogonal(Loop):
    def build(self):
        return MLP(parametrizations.orthogonal)


class SpectralNorm(Loop):
    """In training mode its power iteration moves two buffers in every forward pass, and the weight hangs on them."""

    def build(self):
        return MLP(parametrizations.spectral_norm)


class SpectralNormAccumulated(Accumulation):
    def build(self):
        return MLP(parametrizations.spectral_norm)


class OldSpectralNorm(Loop):
    def build(self):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            return MLP(nn.utils.spectral_norm)


class Reentrant(Loop):
    measured = False  # torch: no torch.autograd.grad through it

    def build(self):
        return Checkpointed(True)


class NonReentrant(Loop):
    def build(self):
        return Checkpointed(False)


class TiedWeights(Loop):
    def build(self):
        return Tied()


class Norm(Loop):
    batch_shape = (1, 8, 8)

    def build(self):
        return CNN()


class Frozen(Loop):
    """The first layer is frozen for three steps, the last from the sixth on."""

    def step(self, x, y, n):
        self.model[0].requires_grad_(n >= 3)
        self.model[3].requires_grad_(n < 6)
        super().step(x, y, n)


class SeveralGroups(Loop):
    def params(self):
        return [{"params": self.model[0].parameters(), "lr": 1e-3}, {"params": self.model[3].parameters(), "weight_decay": 0.0}]


class Named(Loop):
    def params(self):
        return self.model.named_parameters()


class AddedGroup(Loop):
    """The head joins after three steps."""

    def params(self):
        return self.model[0].parameters()

    def train(self, to=STEPS):
        super().train(3)
        self.optimizer.add_param_group({"params": list(self.model[3].parameters())})
        self.schedule = lrs.ConstantLR(self.optimizer)
        return super().train(to)


class Compiled(Loop):
    def seen(self):
        if not hasattr(self, "compiled"):
            self.compiled = torch.compile(self.model, backend="aot_eager")
        return self.compiled


class Averaged(Loop):
    """A running average of the weights, and SWA's schedule."""

    def __init__(self, *args):
        super().__init__(*args)
        self.average = swa_utils.AveragedModel(self.model, multi_avg_fn=swa_utils.get_ema_multi_avg_fn(0.9))
        self.swa = swa_utils.SWALR(self.optimizer, swa_lr=1e-3, anneal_epochs=2)

    def step(self, x, y, n):
        super().step(x, y, n)
        self.average.update_parameters(self.model)
        self.swa.step()

    def state(self):
        return super().state() | {f"average.{k}": v.clone() for k, v in self.average.state_dict().items()}


SITUATIONS = [
    Loop, Clipping, Accumulation, WeightNorm, Orthogonal, SpectralNorm, SpectralNormAccumulated, OldSpectralNorm, Reentrant,
    NonReentrant, TiedWeights, Norm, Frozen, SeveralGroups, Named, AddedGroup, Compiled, Averaged,
]  # fmt: skip


def assert_same(a, b):
    assert a.keys() == b.keys()
    for key in a:
        assert torch.equal(a[key], b[key]), key


@pytest.mark.parametrize("situation", SITUATIONS, ids=lambda s: s.__name__)
@pytest.mark.parametrize("base", BASES)
def test_a_probed_run_equals_the_bare_base_bit_for_bit(base, situation):
    bare = situation(base).train()
    probed = situation(base, PROBED)
    if situation.measured:
        probed.train()
        assert probed.optimizer.control.gate.trusted is True
        assert probed.optimizer.reading.stability is not None or base == "lion"
    else:
        with pytest.warns(UserWarning, match="use_reentrant"):
            probed.train()
    assert_same(bare.state(), probed.state())


# ---- GradScaler ---------------------------------------------------------------------------------------------------------


class Scaled(Loop):
    """float16 autocast with a scaler; the fourth batch overflows, and its gradients are cleared on the model."""

    def __init__(self, *args, scaler=None):
        super().__init__(*args)
        self.scaler = scaler or torch.amp.GradScaler("cpu", init_scale=2.0**8)

    def step(self, x, y, n):
        self.model.zero_grad()
        with torch.autocast("cpu", torch.float16):
            loss = self.criterion(self.model(x * (1e30 if n == 3 else 1)).float(), y)
        self.scaler.scale(loss).backward()
        self.scaler.unscale_(self.optimizer)
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.scaler.step(self.optimizer)
        self.scaler.update()


@pytest.mark.parametrize("base", BASES)
def test_a_gradient_scaler_skips_the_wrappers_step_and_what_was_captured_for_it(base):
    bare, probed = Scaled(base).train(), Scaled(base, PROBED).train()
    assert bare.scaler.get_scale() == probed.scaler.get_scale() == 2.0**7
    assert probed.optimizer.steps == STEPS - 1
    assert probed.optimizer.control.gate.trusted is True
    assert probed.optimizer.reading.step == 6
    assert_same(bare.state(), probed.state())


def test_a_fused_base_under_a_scaler():
    """It wants to unscale by itself; through the wrapper the scaler does it first, which a power of two cannot tell apart."""
    results = []
    for wrapped in (None, PROBED):
        BASES["fused"] = lambda p: torch.optim.AdamW(p, lr=1e-3, fused=True)
        try:
            run = Scaled("fused", wrapped)
        finally:
            del BASES["fused"]
        assert getattr(run.optimizer, "_step_supports_amp_scaling", False) is (wrapped is None)
        results.append(run.train().state())
    assert_same(*results)


@pytest.mark.parametrize("base", BASES)
def test_nothing_of_the_base_leaks(base):
    optimizer = Loop(base, PROBED).optimizer
    for name in ("train", "eval", "_step_supports_amp_scaling", "betas", "fused"):
        assert not hasattr(optimizer, name)


def test_lightnings_names_are_free():
    optimizer = Loop("adamw", PROBED).train(3).optimizer
    for name in ("_optimizer", "optimizer", "_strategy", "_on_before_step", "_on_after_step", "toggle_model"):
        assert not hasattr(optimizer, name)
    assert "step" not in vars(AdaptiveOptimizer(BASES["adamw"](MLP().parameters())))  # schedulers put theirs there


# ---- state --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("base", BASES)
def test_it_is_a_torch_optimizer_with_its_bases_defaults(base):
    bare, optimizer = Loop(base).optimizer, Loop(base, PROBED).optimizer
    assert isinstance(optimizer, torch.optim.Optimizer)
    assert {k: str(v) for k, v in optimizer.defaults.items()} == {k: str(v) for k, v in bare.defaults.items()}
    assert "lr" in optimizer.defaults


def through_torch_save(run, other):
    file = io.BytesIO()
    torch.save({"model": run.model.state_dict(), "optimizer": run.optimizer.state_dict()}, file)
    file.seek(0)
    loaded = torch.load(file)  # weights_only, torch's default
    other.model.load_state_dict(loaded["model"])
    other.optimizer.load_state_dict(state_dict=loaded["optimizer"])


def through_dcp(run, other, folder):
    for r, move in ((run, dcp.save), (other, dcp.load)):
        move({"model": r.model, "optimizer": OptimizerState(r.model, r.optimizer)}, checkpoint_id=folder)


def through(copier):
    def go(run, other):
        other.model, other.optimizer = copier((run.model, run.optimizer))
        other.optimizer.attach(other.model, loss_fn=other.criterion)

    return go


WAYS = {
    "torch.save": through_torch_save,
    "deepcopy": through(copy.deepcopy),
    "pickle": through(lambda pair: pickle.loads(pickle.dumps(pair))),
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("base", BASES)
def test_a_copy_or_checkpoint_goes_on_bit_for_bit(base, way):
    if base == "lion" and way != "torch.save":
        pytest.skip("a bare optimizer of pytorch_optimizer cannot be copied either: it loses its attribute `maximize`")
    run, other = Loop(base, PROBED).train(5), Loop(base, PROBED)
    WAYS[way](run, other)
    other.done = 5
    for r in (run, other):
        r.schedule = lrs.ConstantLR(r.optimizer)
        r.train()
    assert run.optimizer.steps == other.optimizer.steps == STEPS
    assert run.optimizer.reading.loss == other.optimizer.reading.loss
    assert_same(run.state(), other.state())


@pytest.mark.parametrize("base", BASES)
def test_state_holds_tensors_by_parameter_only(base):
    run = Loop(base, PROBED).train()
    assert all(isinstance(key, torch.Tensor) for key in run.optimizer.state)
    assert set(run.optimizer.state_dict()) == {"state", "param_groups", "adaptive"}


@pytest.mark.filterwarnings("ignore:.*torch.distributed is disabled, unavailable or uninitialized.*")
@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize(
    ("base", "policy"),
    [*((base, None) for base in BASES), *((base, ConstantPolicy("kfac")) for base in ("sgd", "adamw"))],
    ids=str,
)
def test_distributed_checkpoint_goes_on_bit_for_bit(tmp_path, base, policy):
    wrapped = {"probe": LanczosProbe(every=3, num_steps=3), "policy": policy}
    run, other = Loop(base, wrapped).train(5), Loop(base, wrapped)
    through_dcp(run, other, tmp_path)
    assert_same(run.state(), other.state())
    assert other.optimizer.steps == 5
    other.done = 5
    for r in (run, other):
        r.schedule = lrs.ConstantLR(r.optimizer)
        r.train()
    assert run.optimizer.reading.loss == other.optimizer.reading.loss
    assert run.optimizer.report.mode == other.optimizer.report.mode
    assert_same(run.state(), other.state())


@pytest.mark.filterwarnings("ignore:.*torch.distributed is disabled, unavailable or uninitialized.*")
@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("way", ["torch.save", "dcp"])
def test_factors_of_a_model_in_bfloat16_keep_their_digits_in_a_checkpoint(way, tmp_path):
    """torch casts what it finds in `state` to the parameter's dtype: kfac's factors and the probe's vectors lie elsewhere."""

    class Half(Loop):
        def build(self):
            return MLP().to(torch.bfloat16)

        def step(self, x, y, n):
            super().step(x.to(torch.bfloat16), y, n)

    wrapped = {"probe": LanczosProbe(every=3, num_steps=3), "policy": ConstantPolicy("kfac")}
    run, other = Half("adamw", wrapped).train(5), Half("adamw", wrapped)
    through_torch_save(run, other) if way == "torch.save" else through_dcp(run, other, tmp_path)
    dtypes = {t.dtype for t in torch.utils._pytree.tree_leaves(other.optimizer.control.state_dict()) if torch.is_tensor(t)}
    assert torch.float32 in dtypes
    other.done = 5
    for r in (run, other):
        r.schedule = lrs.ConstantLR(r.optimizer)
        r.train()
    assert_same(run.state(), other.state())


# ---- schedules ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("base", BASES)
def test_one_cycle_moves_momentum_as_in_the_bare_base(base):
    seen = []
    for wrapped in (None, PROBED):
        run = Loop(base, wrapped)
        cycles = base in ("sgd", "adamw", "rmsprop", "lion")
        run.schedule = lrs.OneCycleLR(run.optimizer, 0.01, total_steps=STEPS + 1, cycle_momentum=cycles)
        values = []
        for n in range(STEPS):
            run.train(n + 1)
            group = run.optimizer.param_groups[0]
            values.append((group["lr"], group.get("momentum"), group.get("betas")))
        assert len({str(v[1:]) for v in values}) > 1 or not cycles
        seen.append((values, run.state()))
    assert seen[0][0] == seen[1][0]
    assert_same(seen[0][1], seen[1][1])


WITHOUT_MOMENTUM = {
    "CyclicLR": lambda o: lrs.CyclicLR(o, 1e-3, 1e-1, 3, cycle_momentum=False),
    "OneCycleLR": lambda o: lrs.OneCycleLR(o, 0.1, 8, cycle_momentum=False),
}


@pytest.mark.parametrize("base", ["rmsprop", "adagrad", "lion"])
@pytest.mark.parametrize("name", SCHEDULERS)
def test_every_scheduler_drives_the_other_bases_too(name, base):
    """SGD and AdamW: tests/test_contracts.py."""
    make = WITHOUT_MOMENTUM.get(name, SCHEDULERS[name]) if base == "adagrad" else SCHEDULERS[name]
    seen = []
    for wrapped in (None, PROBED):
        run = Loop(base, wrapped)
        run.schedule, values = make(run.optimizer), []
        if name == "ReduceLROnPlateau":
            run.schedule.step = lambda step=run.schedule.step: step(1.0)
        for n in range(6):
            run.train(n + 1)
            group = run.optimizer.param_groups[0]
            values.append((group["lr"], group.get("momentum"), group.get("betas")))
        seen.append((values, run.state()))
    assert seen[0][0] == seen[1][0]
    assert_same(seen[0][1], seen[1][1])


@pytest.mark.parametrize("base", ["sgd", "adamw", "rmsprop", "adagrad"])
def test_a_schedule_survives_a_switch_of_mode(base):
    class Late:  # base, then kfac, and back
        def decide(self, diagnosis, history):
            return ConstantPolicy("kfac" if 3 <= history.step < 6 else "base").decide(diagnosis, history)

    run = SeveralGroups(base, {"probe": LanczosProbe(overhead=0), "policy": Late()})
    run.schedule = lrs.LambdaLR(run.optimizer, [lambda n: 0.9**n, lambda n: 0.8**n])
    groups, modes = run.optimizer.param_groups, []
    for n in range(STEPS):
        run.train(n + 1)
        modes.append(run.optimizer.report.mode)
    assert modes == ["base"] * 3 + ["kfac"] * 3 + ["base"] * 3
    assert run.optimizer.param_groups is groups
    assert [g["lr"] / g["initial_lr"] for g in groups] == pytest.approx([0.9**STEPS, 0.8**STEPS])


# ---- two optimizers, compiled steps ---------------------------------------------------------------------------------------


def two_on_one_model(order, base="sgd"):
    torch.manual_seed(0)
    model, criterion = MLP(), nn.CrossEntropyLoss()
    optimizers = [AdaptiveOptimizer(BASES[base](model[i].parameters()), model, loss_fn=criterion, **PROBED) for i in (0, 3)]
    for optimizer in optimizers:
        optimizer.param_groups[0]["lr"] = 0.5  # far enough for the replayed gradient to turn
    for _ in range(4):
        model.zero_grad()
        criterion(model(torch.randn(16, 12)), torch.randint(0, CLASSES, (16,))).backward()
        for i in order:
            optimizers[i].step()
    return optimizers


@pytest.mark.parametrize("base", BASES)
def test_of_two_optimizers_on_one_model_the_one_that_comes_second_says_why_it_cannot_replay(base):
    with pytest.warns(UserWarning, match="another optimizer has stepped first"):
        first, second = two_on_one_model((0, 1), base)
    assert first.control.gate.trusted is True
    assert first.reading is not None
    assert second.control.gate.trusted is False


@pytest.mark.filterwarnings("ignore:.torch.jit.script_method. is deprecated:DeprecationWarning")  # torch's own, in Adam
@pytest.mark.parametrize("base", BASES)
def test_a_compiled_training_step(base):
    states = []
    for wrapped in (None, PROBED):
        torch.compiler.reset()  # each base's step is compiled anew
        run = Loop(base, wrapped)
        plain = run.step
        run.step = torch.compile(lambda x, y, n, plain=plain: plain(x, y, n), backend="eager")
        said = nullcontext() if wrapped is None else pytest.warns(UserWarning, match="compile the model")
        with said:
            run.train()
        states.append(run.state())
        if wrapped is not None:
            assert run.optimizer.steps == STEPS
    for a, b in zip(states[0].values(), states[1].values(), strict=True):  # compiled, a bare base rounds otherwise
        torch.testing.assert_close(a, b)


def test_swa_update_bn_is_no_batch_of_the_optimizer():
    run = Norm("adamw", PROBED).train(3)
    average = swa_utils.AveragedModel(run.model)
    swa_utils.update_bn([x for x, _ in run.batches], average)
    swa_utils.update_bn([x for x, _ in run.batches], run.model)
    assert run.optimizer._capture.calls == []
    run.train()
    assert run.optimizer.control.gate.trusted is True

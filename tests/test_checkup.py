"""checkup: the right numbers on every kind of data, and a model left as it was."""

import copy

import pytest
import torch
from oracles import DEVICES, Net
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from adaptive_opt import checkup
from adaptive_opt.objective import ReplayError


def noisy_cnn():
    """Running statistics, random masks and a frozen layer, half of it in another mode."""
    model = nn.Sequential(
        nn.Conv2d(1, 3, 3),
        nn.BatchNorm2d(3),
        nn.ReLU(),
        nn.Dropout(0.5),
        nn.Flatten(),
        nn.BatchNorm1d(48),
        nn.Linear(48, 3),
    ).double()
    model[5].eval()
    model[0].bias.requires_grad_(False)
    return model


@pytest.mark.parametrize("as_loader", [False, True])
def test_parameters_gradients_buffers_modes_and_the_generator_are_left_as_they_were(as_loader):
    model = noisy_cnn()
    x, y = torch.randn(8, 1, 6, 6).double(), torch.randint(0, 3, (8,))
    F.cross_entropy(model(x), y).backward()
    grads = [p.grad for p in model.parameters()]
    values = [None if g is None else g.clone() for g in grads]
    state, modes = copy.deepcopy(model.state_dict()), [m.training for m in model.modules()]
    wanted = [p.requires_grad for p in model.parameters()]
    data = DataLoader(TensorDataset(x, y), batch_size=5, shuffle=True) if as_loader else (x, y)
    generator = torch.get_rng_state()
    reading = checkup(model, nn.CrossEntropyLoss(), data, num_steps=6)
    assert reading.lambda_max is not None
    assert torch.equal(generator, torch.get_rng_state())
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())
    assert modes == [m.training for m in model.modules()]
    assert wanted == [p.requires_grad for p in model.parameters()]
    for p, g, v in zip(model.parameters(), grads, values, strict=True):
        assert p.grad is g
        assert g is None or torch.equal(g, v)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_everything_is_put_back_when_the_loss_raises_too():
    model = noisy_cnn()
    state, generator = copy.deepcopy(model.state_dict()), torch.get_rng_state()

    def broken(out, y):
        raise KeyError("my own bug")

    with pytest.raises(KeyError, match="my own bug"):
        checkup(model, broken, (torch.randn(8, 1, 6, 6, generator=torch.Generator()).double(), torch.zeros(8).long()))
    assert torch.equal(generator, torch.get_rng_state())
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())


@pytest.mark.parametrize("device", DEVICES)
def test_a_loader_with_an_uneven_last_batch_weighs_samples_not_batches(device):
    net = Net("mlp", samples=14, device=device)
    loader = DataLoader(TensorDataset(net.x.cpu(), net.y.cpu()), batch_size=6)  # 6, 6, 2
    reading = checkup(net.model, nn.CrossEntropyLoss(), loader, num_steps=net.n)
    true = torch.linalg.eigvalsh(net.hessian())
    assert (reading.lambda_max, reading.lambda_min) == pytest.approx((float(true[-1]), float(true[0])), rel=1e-8)
    assert reading.loss == pytest.approx(net.loss().item(), rel=1e-13)
    whole = checkup(net.model, nn.CrossEntropyLoss(), (net.x, net.y), num_steps=net.n)
    assert whole.trace == pytest.approx(reading.trace, rel=1e-10)
    assert whole.batch_size == reading.batch_size == 14


def test_at_most_max_batches_are_read():
    net = Net("mlp", samples=12)
    batches = list(zip(net.x.split(4), net.y.split(4), strict=True))
    two = checkup(net.model, nn.CrossEntropyLoss(), batches, max_batches=2)
    first = checkup(net.model, nn.CrossEntropyLoss(), (net.x[:8], net.y[:8]))
    assert two.loss == pytest.approx(first.loss, rel=1e-13)
    assert two.lambda_max == pytest.approx(first.lambda_max, rel=1e-10)


def test_the_model_is_measured_in_the_mode_it_is_in():
    net = Net("batchnorm")
    net.model(net.x)  # running statistics that are not the batch's
    for mode in (True, False):
        net.model.train(mode)
        reading = checkup(net.model, nn.CrossEntropyLoss(), (net.x, net.y), num_steps=net.n)
        true = torch.linalg.eigvalsh(net.hessian())
        assert reading.lambda_max == pytest.approx(float(true[-1]), rel=1e-8)


def test_attention_has_a_second_derivative_without_the_callers_help():
    net = Net("attention")
    reading = checkup(net.model, nn.CrossEntropyLoss(), (net.x, net.y), num_steps=net.n)
    true = torch.linalg.eigvalsh(net.hessian())
    assert reading.backend == "exact"
    assert (reading.lambda_max, reading.lambda_min) == pytest.approx((float(true[-1]), float(true[0])), rel=1e-8)


def test_a_healthy_he_network_keeps_the_signal_and_a_shrunken_layer_shows():
    model = nn.Sequential(*(m for _ in range(4) for m in (nn.Linear(96, 96), nn.ReLU())), nn.Linear(96, 3))
    for layer in model[:-1:2]:
        nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
    data = torch.randn(64, 96), torch.randint(0, 3, (64,))
    healthy = checkup(model, nn.CrossEntropyLoss(), data, num_steps=3).layers
    assert [layer.name for layer in healthy] == ["0", "2", "4", "6", "8"]
    assert all(abs(layer.sigma_rms - 1) < 0.15 for layer in healthy[:4])
    assert all(1 < layer.sigma_max < 4 for layer in healthy[:4])
    with torch.no_grad():
        model[4].weight.mul_(0.1)
    sick = checkup(model, nn.CrossEntropyLoss(), data, num_steps=3).layers
    assert abs(sick[2].sigma_rms - 0.1) < 0.02
    assert abs(sick[1].sigma_rms - 1) < 0.15
    assert sick[2].gain == pytest.approx(0.1 * healthy[2].gain, rel=0.5)


def test_layers_called_with_keywords_and_models_without_layers_do_no_harm():
    class Keywords(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(3, 4), nn.Linear(4, 3)

        def forward(self, x):
            return self.b(torch.relu(self.a(input=x)))

    reading = checkup(Keywords(), nn.CrossEntropyLoss(), (torch.randn(6, 3), torch.randint(0, 3, (6,))))
    assert [layer.name for layer in reading.layers] == ["b"]

    class Bare(nn.Module):
        def __init__(self):
            super().__init__()
            self.w = nn.Parameter(torch.eye(3))

        def forward(self, x):
            return x @ self.w

    bare = checkup(Bare(), nn.CrossEntropyLoss(), (torch.randn(6, 3), torch.randint(0, 3, (6,))))
    assert bare.layers == ()
    assert any(note.startswith("layers:") for note in bare.notes)
    assert bare.lambda_max > 0


def test_it_works_inside_no_grad_and_gives_the_same_reading_twice():
    net = Net("layernorm")
    one = checkup(net.model, nn.CrossEntropyLoss(), (net.x, net.y))
    with torch.no_grad():
        two = checkup(net.model, nn.CrossEntropyLoss(), (net.x, net.y))
        assert not torch.is_grad_enabled()
    assert one.ritz_values == two.ritz_values
    assert (one.stability, one.kappa_effective, one.overshoot) == (None,) * 3


@pytest.mark.parametrize("data", [[], (torch.zeros(0, 5).double(), torch.zeros(0).long())], ids=["no batch", "no sample"])
def test_empty_data_is_refused(data):
    with pytest.raises(ValueError, match="the data is empty"):
        checkup(Net("mlp").model, nn.CrossEntropyLoss(), data)


def test_a_model_with_nothing_to_train_is_refused():
    net = Net("mlp")
    net.model.requires_grad_(False)
    with pytest.raises(ValueError, match="no parameter of the model requires gradients"):
        checkup(net.model, nn.CrossEntropyLoss(), (net.x, net.y))


@pytest.mark.parametrize(
    ("loss_fn", "words"),
    [
        (nn.CrossEntropyLoss(reduction="none"), "not a scalar"),
        (lambda out, y: F.cross_entropy(out, y).item(), "not a tensor"),
        (lambda out, y: F.cross_entropy(out, y).detach(), "no graph"),
    ],
    ids=["per sample", "float", "detached"],
)
@pytest.mark.filterwarnings("ignore:Converting a tensor with requires_grad")  # the caller's own .item()
def test_a_loss_that_is_no_scalar_tensor_with_a_graph_is_refused(loss_fn, words):
    net = Net("mlp")
    with pytest.raises(ReplayError, match=words):
        checkup(net.model, loss_fn, (net.x, net.y))


def test_a_sick_model_gets_a_reading_with_notes():
    net = Net("mlp")
    with torch.no_grad():
        net.params[0].fill_(float("nan"))
    reading = checkup(net.model, nn.CrossEntropyLoss(), (net.x, net.y))
    assert (reading.epsilon, reading.kappa, reading.delta) == (None, None, None)
    assert "curvature: the loss or its gradient is not finite" in reading.notes

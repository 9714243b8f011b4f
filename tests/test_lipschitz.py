"""The whole model's Jacobian against a dense float64 one, and the chain rule's bound on it."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from adaptive_opt.lipschitz import measure_lipschitz
from tests.oracles import NETS, SHAPES, dense_jacobian


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=generator(seed), dtype=torch.float64)


class Block(nn.Module):
    """A residual block as in ResNet, with its sum and activation in place or not."""

    def __init__(self, inplace=False):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 3, 3, padding=1), nn.BatchNorm2d(3)
        self.conv2, self.bn2, self.relu = nn.Conv2d(3, 3, 3, padding=1), nn.BatchNorm2d(3), nn.ReLU(inplace)
        self.inplace = inplace

    def forward(self, x):
        out = self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x)))))
        if self.inplace:
            out += x
            return self.relu(out)
        return self.relu(out + x)


class Tokens(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.mix, self.head = nn.Embedding(9, 4), nn.Linear(4, 4), nn.Linear(4, 9)

    def forward(self, ids):
        return self.head(torch.tanh(self.mix(self.embed(ids))))


class Split(nn.Module):
    """No single tensor carries everything."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x):
        return self.a(x) * self.b(x)


def resnet(inplace=False, blocks=3):
    chain = [nn.Conv2d(1, 3, 3), *(Block(inplace) for _ in range(blocks))]
    return nn.Sequential(*chain, nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(12, 3))


def transformer():
    layer = nn.TransformerEncoderLayer(4, 2, 8, dropout=0.0, batch_first=True, activation="gelu")
    return nn.Sequential(nn.Linear(4, 4), nn.TransformerEncoder(layer, 2, enable_nested_tensor=False), nn.Linear(4, 3))


MODELS = {  # name -> model, shape of the batch, factors of the bound
    **{name: (NETS[name], (6, *SHAPES[name]), None) for name in NETS},
    "linear": (lambda: nn.Linear(5, 3), (4, 5), 1),
    "mlp_of_three": (lambda: nn.Sequential(*(m for _ in range(3) for m in (nn.Linear(5, 5), nn.ReLU()))), (4, 5), 3),
    "mlp_inplace": (lambda: nn.Sequential(*(m for _ in range(3) for m in (nn.Linear(5, 5), nn.ReLU(True)))), (4, 5), 3),
    "resnet": (resnet, (3, 1, 6, 6), 5),  # the first convolution, three blocks (the last with the pooling), the head
    "resnet_inplace": (lambda: resnet(inplace=True), (3, 1, 6, 6), 5),
    "transformer": (transformer, (2, 3, 4), None),
    "lstm": (lambda: nn.Sequential(nn.Linear(3, 3), First(nn.LSTM(3, 4)), nn.Linear(4, 2)), (3, 2, 3), 3),
    "split": (Split, (3, 4), 1),
    "identity": (lambda: nn.Identity(), (3, 4), 1),
}


class First(nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x):
        return self.inner(x)[0]


def measure(model, x, num_steps=200, seed=0):
    def evaluate():
        return model(x).square().sum()

    with sdpa_kernel(SDPBackend.MATH):
        return measure_lipschitz(model, evaluate, generator(seed), num_steps)


def norm_of_jacobian(f, x):
    leaf = x.clone().requires_grad_()
    with sdpa_kernel(SDPBackend.MATH):
        return float(torch.linalg.matrix_norm(dense_jacobian(f(leaf.clone()), [leaf]), 2))


@pytest.mark.parametrize("name", MODELS)
def test_local_is_the_dense_jacobians_norm_and_the_bound_lies_above(name):
    make, shape, segments = MODELS[name]
    model, x = make().double(), randn(*shape)
    true = norm_of_jacobian(model, x)
    whole = measure(model, x)
    assert whole.local == pytest.approx(true, rel=1e-8)
    assert whole.bound >= true * (1 - 1e-9)
    assert segments is None or whole.segments == segments
    for seed in range(5):
        short = measure(model, x, 8, seed)
        assert short.local <= true * (1 + 1e-9)
        assert short.bound >= short.local


def test_one_linear_layer_and_a_chain_of_orthogonal_ones_meet_their_bound():
    layer = nn.Linear(6, 4).double()
    one = measure(layer, randn(3, 6))
    spectral_norm = float(torch.linalg.matrix_norm(layer.weight.detach(), 2))
    assert (one.local, one.bound) == (pytest.approx(spectral_norm, rel=1e-9), pytest.approx(spectral_norm, rel=1e-9))
    chain = nn.Sequential(*(nn.Linear(6, 6) for _ in range(5))).double()
    for i, m in enumerate(chain):
        nn.init.orthogonal_(m.weight, gain=1 + i / 10)
    five = measure(chain, randn(3, 6))
    assert five.segments == 5
    assert five.local == pytest.approx(1.1 * 1.2 * 1.3 * 1.4, rel=1e-9)
    assert five.bound == pytest.approx(five.local, rel=1e-9)


@pytest.mark.parametrize("inplace", [False, True])
def test_the_bound_is_the_product_of_the_segments_dense_norms(inplace):
    model, x = resnet(inplace, blocks=2).double(), randn(3, 1, 6, 6)
    product, h = 1.0, x
    for segment in (model[0], model[1], nn.Sequential(*model[2:5]), model[5]):
        product *= norm_of_jacobian(segment, h)
        h = segment(h.clone()).detach()
    assert measure(model, x).bound == pytest.approx(product, rel=1e-8)


def test_equal_bit_for_bit_in_place_and_not():
    model, twin, x = resnet().double(), resnet(inplace=True).double(), randn(3, 1, 6, 6)
    twin.load_state_dict(model.state_dict())
    assert measure(model, x, 8) == measure(twin, x, 8)


def test_tokens_are_measured_from_the_embedding_on():
    model, ids = Tokens().double(), torch.tensor([[1, 2, 3]])

    def evaluate():
        return F.cross_entropy(model(ids).flatten(0, 1), ids.flatten())

    found = measure_lipschitz(model, evaluate, generator(), 50)
    true = norm_of_jacobian(lambda e: model.head(torch.tanh(model.mix(e))), model.embed(ids).detach())
    assert found.local == pytest.approx(true, rel=1e-9)
    assert found.bound >= true
    assert "embed" in found.note


def test_without_separators_the_bound_is_local_plus_error():
    found = measure(Split().double(), randn(3, 4), 3)
    assert found.bound == found.local + found.local_error
    assert "no tensor" in found.note


def test_a_model_without_a_floating_input_and_a_sick_one_raise():
    model = nn.Linear(3, 3)
    with pytest.raises(RuntimeError, match="no floating input"):
        measure_lipschitz(model, lambda: model.weight.sum(), generator())
    with torch.no_grad():
        model.weight.fill_(float("nan"))
    with pytest.raises(FloatingPointError, match="not finite"):
        measure_lipschitz(model, lambda: model(torch.ones(2, 3)).sum(), generator())
    assert not model._forward_hooks
    assert not model._forward_pre_hooks


def test_the_work_grows_linearly_with_depth(monkeypatch):
    def calls(depth):
        model, count = resnet(blocks=depth).double(), []
        real = torch.autograd.grad
        with monkeypatch.context() as patch:
            patch.setattr(torch.autograd, "grad", lambda *a, **k: count.append(1) or real(*a, **k))
            segments = measure(model, randn(2, 1, 6, 6), 4).segments
        assert segments == depth + 2
        return len(count)

    four, eight, sixteen = calls(4), calls(8), calls(16)
    assert sixteen - eight == 2 * (eight - four)
    assert eight == 9 * (1 + 10)  # nine calls each for the whole and for ten segments

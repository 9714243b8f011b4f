"""Dense oracles in float64 (Hessians by double backward, Jacobians by rows), small nets to take them of, and counters."""

from __future__ import annotations

import weakref
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU"))]


def dense_hessian(loss: Tensor, params: Sequence[Tensor]) -> Tensor:
    """(n, n), row by row with autograd.grad: torch.func.hessian is silently wrong through LayerNorm and BatchNorm."""
    grads = torch.autograd.grad(loss, params, create_graph=True, allow_unused=True)
    g = torch.cat([torch.zeros_like(p).flatten() if d is None else d.flatten() for d, p in zip(grads, params, strict=True)])
    return dense_jacobian(g, params)


def dense_jacobian(output: Tensor, inputs: Sequence[Tensor]) -> Tensor:
    """(output.numel(), inputs' numel), row by row."""
    rows = []
    for entry in output.flatten():
        if entry.requires_grad:
            row = torch.autograd.grad(entry, inputs, retain_graph=True, allow_unused=True)
        else:
            row = [None] * len(inputs)
        rows.append(
            torch.cat([torch.zeros_like(p).flatten() if r is None else r.flatten() for r, p in zip(row, inputs, strict=True)])
        )
    return torch.stack(rows).detach()


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.norm, self.head = nn.Linear(4, 12), nn.LayerNorm(4), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).view(-1, 5, 6, 2).transpose(1, 2).chunk(3, 1)  # (batch, 2 heads, 5, 2)
        a = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.head(self.norm(x + a.transpose(1, 2).flatten(2)).mean(1))


NETS = {
    "mlp": lambda: nn.Sequential(nn.Linear(5, 6), nn.ReLU(), nn.Linear(6, 3)),
    "batchnorm": lambda: nn.Sequential(
        nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3), nn.Tanh(), nn.AvgPool2d(2), nn.Flatten(), nn.Linear(12, 3)
    ),
    "layernorm": lambda: nn.Sequential(nn.Linear(5, 6), nn.LayerNorm(6), nn.GELU(), nn.Linear(6, 3)),
    "attention": Attention,
}
SHAPES = {"mlp": (5,), "batchnorm": (1, 6, 6), "layernorm": (5,), "attention": (5, 4)}


class Net:
    """A small net in float64 with one batch; `loss()` has a second derivative, `hessian()` is dense."""

    def __init__(self, name: str, seed: int = 0, device: str = "cpu", samples: int = 12):
        torch.manual_seed(seed)
        self.model = NETS[name]().double().to(device)
        self.x = torch.randn(samples, *SHAPES[name], dtype=torch.float64).to(device)
        self.y = torch.randint(0, 3, (samples,)).to(device)
        self.params = list(self.model.parameters())
        self.n = sum(p.numel() for p in self.params)

    def loss(self) -> Tensor:
        with sdpa_kernel(SDPBackend.MATH):  # the fused kernels have no second derivative on the CPU
            return F.cross_entropy(self.model(self.x), self.y)

    def hessian(self) -> Tensor:
        return dense_hessian(self.loss(), self.params).cpu()

    def backward(self) -> None:
        for p in self.params:
            p.grad = None
        self.loss().backward()


def start(n, seed=0, device="cpu", dtype=torch.float64):
    return torch.randn(n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(device, dtype)


def symmetric(eigenvalues, seed):
    q, _ = torch.linalg.qr(
        torch.randn(len(eigenvalues), len(eigenvalues), generator=torch.Generator().manual_seed(seed)).double()
    )
    a = (q * torch.tensor(eigenvalues, dtype=torch.float64)) @ q.T
    return (a + a.T) / 2


class Transfers(TorchFunctionMode):
    """Counts what makes the host wait for a device."""

    def __init__(self):
        self.count = 0

    def __torch_function__(self, func, types, args=(), kwargs=None):
        self.count += getattr(func, "__name__", "") == "cpu"
        return func(*args, **(kwargs or {}))


class Scalars(TorchDispatchMode):
    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func is torch.ops.aten._local_scalar_dense.default
        return func(*args, **(kwargs or {}))


class LiveBytes(TorchDispatchMode):
    """The most bytes that tensors made inside held at any one time."""

    def __init__(self):
        super().__init__()
        self.live, self.peak = {}, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for t in tree_leaves(out):
            if isinstance(t, Tensor):
                storage = t.untyped_storage()
                holders, size = self.live.get(storage.data_ptr(), (0, storage.nbytes()))
                self.live[storage.data_ptr()] = holders + 1, size
                weakref.finalize(t, self._let_go, storage.data_ptr())
        self.peak = max(self.peak, sum(size for _, size in self.live.values()))
        return out

    def _let_go(self, where):
        holders, size = self.live[where]
        if holders == 1:
            del self.live[where]
        else:
            self.live[where] = holders - 1, size

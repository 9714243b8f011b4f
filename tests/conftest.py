"""Shared by all tests: one thread count, so that equal means equal."""

import sys

import pytest
import torch

try:
    import torchvision as torchvision
except Exception:  # PyHessian and backpack bring in one that may be built for another torch; transformers does without one
    sys.modules["torchvision"] = None  # type: ignore[assignment]


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)
    torch.set_num_threads(1)  # small tensors: more threads only fight


@pytest.fixture
def as_on_a_device(monkeypatch):
    """Lanczos as it runs where the host has to wait for a number: the code path of CUDA, on the CPU."""
    for name in ("lanczos", "vectors"):
        monkeypatch.setattr(sys.modules[f"adaptive_opt.curvature.{name}"], "waits", lambda x: True)

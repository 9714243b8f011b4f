"""Shared by all tests: one thread count, so that equal means equal."""

import pytest
import torch


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)
    torch.set_num_threads(1)  # small tensors: more threads only fight

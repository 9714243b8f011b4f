"""Accelerate: `prepare`, `accumulate`, `clip_grad_norm_`, `save_state`, `load_state`, the wrapper in the place of its base."""

import itertools

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState
from bases import FIVE
from problems import make
from torch.utils.data import DataLoader, TensorDataset

from adaptive_opt import AdaptiveOptimizer, ConstantPolicy, LanczosProbe

PROBE = LanczosProbe(every=3, num_steps=3)


class Run:
    """The loop of Accelerate's documentation; the optimizer alone differs."""

    def __init__(self, name, base, wrapped, accumulate=1, mixed_precision="no"):
        AcceleratorState._reset_state(reset_partial_state=True)
        GradientState._reset_state()
        self.accelerator = Accelerator(cpu=True, gradient_accumulation_steps=accumulate, mixed_precision=mixed_precision)
        problem = make(name, 24, batch=8)
        inputs, labels = (torch.cat(part) for part in zip(*problem.batches, strict=True))
        self.criterion = problem.criterion
        optimizer = FIVE[base](problem.model.parameters())
        if wrapped:
            optimizer = AdaptiveOptimizer(
                optimizer, problem.model, loss_fn=self.criterion, probe=PROBE, policy=ConstantPolicy("base")
            )
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 24)
        loader = DataLoader(TensorDataset(inputs, labels), batch_size=8)
        self.model, self.optimizer, self.loader, self.schedule = self.accelerator.prepare(
            problem.model, optimizer, loader, schedule
        )
        self.batches = iter(self.loader)

    def train(self, batches):
        for _ in range(batches):
            x, y = next(self.batches)
            with self.accelerator.accumulate(self.model):
                loss = self.criterion(self.model(x), y)
                self.accelerator.backward(loss)
                if self.accelerator.sync_gradients:
                    self.accelerator.clip_grad_norm_(self.model.parameters(), 0.5)
                self.optimizer.step()
                self.schedule.step()
                self.optimizer.zero_grad()
        return self

    def state(self):
        return {k: v.clone() for k, v in self.accelerator.unwrap_model(self.model).state_dict().items()}


def assert_same(a, b):
    for key in a:
        assert torch.equal(a[key], b[key]), key


@pytest.mark.parametrize(("accumulate", "mixed_precision"), [(1, "no"), (3, "no"), (3, "bf16")])
@pytest.mark.parametrize("base", FIVE)
def test_a_prepared_wrapper_is_probed_and_equals_its_base_bit_for_bit(base, accumulate, mixed_precision):
    bare = Run("cnn", base, False, accumulate, mixed_precision).train(24)
    run = Run("cnn", base, True, accumulate, mixed_precision).train(24)
    optimizer = run.optimizer.optimizer
    assert isinstance(optimizer, AdaptiveOptimizer)
    assert optimizer.steps == 24 // accumulate
    assert optimizer.control.gate.trusted is True
    assert base == "lion" or optimizer.reading.stability > 0
    assert_same(bare.state(), run.state())


def test_save_state_and_load_state_go_on_bit_for_bit(tmp_path):
    run = Run("cnn", "adamw", True).train(10)
    run.accelerator.save_state(tmp_path)
    run.train(8)
    other = Run("cnn", "adamw", True)
    batches = iter(other.accelerator.skip_first_batches(other.loader, 10))
    other.batches = itertools.chain([next(batches)], batches)  # begun before the RNG is put back: a loader draws a seed
    other.accelerator.load_state(tmp_path)
    other.train(8)
    assert other.optimizer.optimizer.steps == 18
    assert_same(run.state(), other.state())
    assert run.optimizer.optimizer.reading.stability == other.optimizer.optimizer.reading.stability

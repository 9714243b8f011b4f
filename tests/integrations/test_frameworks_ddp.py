"""Accelerate, Trainer and Lightning over two processes: each wraps the model in DistributedDataParallel itself."""

import os
import warnings

import pytest
import torch
import torch.distributed as dist
from problems import BASES, make

from adaptive_opt import AdaptiveOptimizer, ConstantPolicy, LanczosProbe

IDLE = {"probe": LanczosProbe(every=3, num_steps=3), "policy": ConstantPolicy("base")}


def as_launched():
    """The environment that torch's launcher gives a process; the group exists already."""
    warnings.simplefilter("ignore")  # what the frameworks say of each other
    rank, size = str(dist.get_rank()), str(dist.get_world_size())
    os.environ.update(RANK=rank, LOCAL_RANK=rank, WORLD_SIZE=size, LOCAL_WORLD_SIZE=size, GROUP_RANK="0")
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT="29555", TORCHELASTIC_RUN_ID="test", HF_HUB_OFFLINE="1")


def accelerate(tmp_path, wrapped):
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState, GradientState
    from torch.utils.data import DataLoader, TensorDataset

    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
    problem = make("mlp", 12, batch=8)
    optimizer = BASES["adamw"](problem.model.parameters())
    if wrapped:
        optimizer = AdaptiveOptimizer(optimizer, problem.model, loss_fn=problem.criterion, **IDLE)
    loader = DataLoader(TensorDataset(*(torch.cat(part) for part in zip(*problem.batches, strict=True))), batch_size=4)
    model, prepared, loader = accelerator.prepare(problem.model, optimizer, loader)
    assert isinstance(model, torch.nn.parallel.DistributedDataParallel)
    for x, y in loader:
        with accelerator.accumulate(model):
            accelerator.backward(problem.criterion(model(x), y))
            if accelerator.sync_gradients:
                accelerator.clip_grad_norm_(model.parameters(), 0.5)
            prepared.step()
            prepared.zero_grad()
    return problem.model, optimizer


def huggingface(tmp_path, wrapped):
    from accelerate.state import AcceleratorState
    from test_huggingface import AdaptiveFactory, bare, bert, trainer
    from transformers import Trainer

    AcceleratorState._reset_state(reset_partial_state=True)
    model, options = bert(), {"gradient_accumulation_steps": 2, "max_grad_norm": 0.1}
    asked = {"weight_decay": 0.01, "lr": 1e-3, **IDLE}
    given = {"optimizer_cls_and_kwargs": (AdaptiveFactory, asked)} if wrapped else {"optimizers": (bare(model, "AdamW"), None)}
    run: Trainer = trainer(tmp_path, model, steps=6, **given, **options)
    run.train()
    assert run.args.world_size == 2
    return model, run.optimizer


def lightning(tmp_path, wrapped):
    from test_lightning import IDLE, Module, fit

    module = Module(wrapped=IDLE if wrapped else None)
    given = {"strategy": "ddp", "devices": 2, "accumulate_grad_batches": 2, "gradient_clip_val": 0.1}
    trainer = fit(module, tmp_path, steps=6, **given)
    assert trainer.world_size == 2
    return module.net, trainer.optimizers[0]


def outcome(framework, tmp_path):
    as_launched()
    before = dict(os.environ)
    try:
        torch.manual_seed(7)
        model, _ = framework(tmp_path / "bare", False)
        torch.manual_seed(7)
        other, optimizer = framework(tmp_path / "probed", True)
    finally:
        os.environ.clear()
        os.environ.update(before)
    from adaptive_opt.integrations.unwrap import wrapper_in

    wrapper = wrapper_in(optimizer)
    for a, b in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(a, b)
    reading = wrapper.reading
    return {
        "steps": wrapper.steps,
        "why": wrapper.control.gate.distrust,
        "team": wrapper.control.team.size,
        "reading": (reading.step, reading.lambda_max, reading.stability, reading.batch_size),
        "params": [p.detach().clone() for p in other.parameters()],
    }


@pytest.mark.parametrize("framework", [accelerate, huggingface, lightning])
def test_two_processes_of_a_framework_are_one_team_and_equal_the_bare_base_bit_for_bit(two, tmp_path, framework):
    first, second = two.run(outcome, framework, tmp_path)
    assert (first["why"], first["team"], first["steps"]) == ("", 2, 6)
    assert first["reading"] == second["reading"]
    assert first["reading"][3] == {"accelerate": 16, "huggingface": 16, "lightning": 32}[framework.__name__]
    assert all(map(torch.equal, first["params"], second["params"]))

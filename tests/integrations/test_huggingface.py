"""Hugging Face's Trainer: both ways in, bit for bit beside the bare base, accumulation, clipping, resume, the log."""

import random

import pytest
import torch
from torch.optim import SGD, AdamW, RMSprop
from transformers import BertConfig, BertForSequenceClassification, Trainer, TrainingArguments

from adaptive_opt import AdaptiveOptimizer, ConstantPolicy, LanczosProbe
from adaptive_opt.integrations.huggingface import AdaptiveFactory, LogReadings, adaptive
from adaptive_opt.integrations.unwrap import wrapper_in

BASES = {"AdamW": (AdamW, {"lr": 1e-3}), "SGD": (SGD, {"lr": 0.05, "momentum": 0.9}), "RMSprop": (RMSprop, {"lr": 1e-4})}
IDLE = {"probe": LanczosProbe(every=3, num_steps=3), "policy": ConstantPolicy("base")}


class Tokens(torch.utils.data.Dataset):
    """Whether the first token is among the later ones."""

    def __init__(self, n=64):
        rng = random.Random(0)
        self.rows = [[rng.randrange(2, 30) for _ in range(8)] for _ in range(n)]

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, i):
        row = torch.tensor(self.rows[i])
        return {"input_ids": row, "attention_mask": torch.ones(8, dtype=torch.long), "labels": int(row[0] in row[1:])}


def bert():
    torch.manual_seed(0)
    size = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    return BertForSequenceClassification(BertConfig(vocab_size=32, max_position_embeddings=16, num_labels=2, **size))


def trainer(folder, model, steps=8, **kwargs):
    arguments = {"max_steps": steps, "per_device_train_batch_size": 4, "save_strategy": "no"}
    passed = {k: kwargs.pop(k) for k in ("optimizers", "optimizer_cls_and_kwargs") if k in kwargs}
    args = TrainingArguments(str(folder), use_cpu=True, report_to="none", disable_tqdm=True, **{**arguments, **kwargs})
    return Trainer(model, args, train_dataset=Tokens(), **passed)


def bare(model, base):
    make, kwargs = BASES[base]
    return adaptive(model, make, weight_decay=0.01, **kwargs).base


def weights(model):
    return [p.detach().clone() for p in model.parameters()]


def assert_same(a, b):
    assert all(torch.equal(s, t) for s, t in zip(a, b, strict=True))


@pytest.mark.parametrize("options", [{}, {"gradient_accumulation_steps": 3, "max_grad_norm": 0.1}, {"bf16": True}], ids=str)
@pytest.mark.parametrize("base", BASES)
def test_a_probed_trainer_run_equals_the_bare_one_bit_for_bit(tmp_path, base, options):
    model = bert()
    run = trainer(tmp_path, model, optimizers=(bare(model, base), None), **options)
    run.train()
    for way in ("optimizers", "optimizer_cls_and_kwargs"):
        other, (make, kwargs) = bert(), BASES[base]
        asked = {"base": make, "weight_decay": 0.01, **kwargs, **IDLE}
        given = (adaptive(other, **asked), None) if way == "optimizers" else (AdaptiveFactory, asked)
        probed = trainer(tmp_path, other, **{way: given}, **options)
        probed.train()
        optimizer = wrapper_in(probed.optimizer)
        assert optimizer.steps == 8
        assert optimizer.control.gate.trusted is True
        assert optimizer.reading.stability > 0
        assert_same(weights(model), weights(other))


def test_the_groups_are_those_of_the_trainer(tmp_path):
    model = bert()
    own = trainer(tmp_path, model, weight_decay=0.01, learning_rate=1e-3)
    own.create_optimizer()
    ours = adaptive(model, lr=1e-3, weight_decay=0.01)
    for a, b in zip(own.optimizer.param_groups, ours.param_groups, strict=True):
        assert a["weight_decay"] == b["weight_decay"]
        assert [id(p) for p in a["params"]] == [id(p) for p in b["params"]]


def test_resume_from_a_checkpoint_goes_on_bit_for_bit(tmp_path):
    saving = {"save_strategy": "steps", "save_steps": 5}
    asked = {"lr": 1e-3, "probe": LanczosProbe(overhead=1.0, num_steps=3, price=1.0)}  # and the rules
    model, resumed = bert(), bert()
    run = trainer(tmp_path, model, steps=12, optimizer_cls_and_kwargs=(AdaptiveFactory, asked), **saving)
    run.train()
    other = trainer(tmp_path, resumed, steps=12, optimizer_cls_and_kwargs=(AdaptiveFactory, asked), **saving)
    other.train(resume_from_checkpoint=str(tmp_path / "checkpoint-5"))
    a, b = wrapper_in(run.optimizer), wrapper_in(other.optimizer)
    assert a.steps == b.steps == 12
    assert a.reading.step > 5
    assert a.reading.stability == b.reading.stability
    assert_same(weights(model), weights(resumed))


def test_readings_reach_the_trainers_log(tmp_path):
    run = trainer(tmp_path, bert(), optimizer_cls_and_kwargs=(AdaptiveFactory, {"lr": 1e-3, **IDLE}))
    run.add_callback(LogReadings(run))
    run.train()
    logged = [line["adaptive/reading/stability"] for line in run.state.log_history if "adaptive/reading/stability" in line]
    assert len(logged) == 3
    assert logged[-1] == wrapper_in(run.optimizer).reading.stability


def test_sam_is_held_to_the_norm_that_the_trainers_clipping_let_through(tmp_path):
    asked = {"base": SGD, "lr": 0.1, "policy": ConstantPolicy("sam"), "probe": LanczosProbe(overhead=0)}
    constant = {"max_grad_norm": 0.01, "lr_scheduler_type": "constant"}
    run, moved = trainer(tmp_path, bert(), optimizer_cls_and_kwargs=(AdaptiveFactory, asked), **constant), []
    run.create_optimizer()
    run.optimizer.register_step_pre_hook(lambda *_: moved.append(weights(run.model)))
    run.optimizer.register_step_post_hook(lambda *_: moved.append(weights(run.model)))
    run.train()
    assert wrapper_in(run.optimizer).report.mode == "sam"
    assert len(moved) == 16
    for before, after in zip(moved[::2], moved[1::2], strict=True):
        step = torch.nn.utils.get_total_norm([b - a for a, b in zip(before, after, strict=True)])
        assert step <= 0.1 * 0.01 * 1.001


def test_what_holds_no_wrapper_is_named():
    with pytest.raises(TypeError, match="AdamW"):
        wrapper_in(AdamW([torch.nn.Parameter(torch.zeros(1))]))


def test_a_frozen_encoder_trains_its_head_alone(tmp_path):
    model = bert()
    model.bert.requires_grad_(False)
    run = trainer(tmp_path, model, optimizer_cls_and_kwargs=(AdaptiveFactory, {"lr": 1e-3, **IDLE}))
    run.train()
    optimizer = wrapper_in(run.optimizer)
    assert isinstance(optimizer, AdaptiveOptimizer)
    assert optimizer.control.gate.trusted is True
    assert sum(len(g["params"]) for g in optimizer.param_groups) == 2

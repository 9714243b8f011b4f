"""Hugging Face's Trainer: both ways in, bit for bit beside the bare base, accumulation, clipping, resume, the log."""

import random

import pytest
import torch
from bases import Lion
from torch.optim import SGD, Adagrad, AdamW, RMSprop
from transformers import BertConfig, BertForSequenceClassification, Trainer, TrainingArguments

from adaptive_opt import AdaptiveOptimizer, ConstantPolicy, LanczosProbe
from adaptive_opt.integrations.huggingface import AdaptiveFactory, LogReadings, adaptive
from adaptive_opt.integrations.unwrap import wrapper_in

BASES = {
    "AdamW": (AdamW, {"lr": 1e-3}),
    "SGD": (SGD, {"lr": 0.05, "momentum": 0.9}),
    "RMSprop": (RMSprop, {"lr": 1e-4}),
    "Adagrad": (Adagrad, {"lr": 1e-2}),
    "Lion": (Lion, {"lr": 1e-4}),
}
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
    passed = {k: kwargs.pop(k) for k in ("optimizers", "optimizer_cls_and_kwargs", "compute_loss_func") if k in kwargs}
    args = TrainingArguments(str(folder), use_cpu=True, report_to="none", disable_tqdm=True, **{**arguments, **kwargs})
    return Trainer(model, args, train_dataset=Tokens(), **passed)


def bare(model, base):
    make, kwargs = BASES[base]
    return adaptive(model, make, weight_decay=0.01, **kwargs).base


def weights(model):
    return [p.detach().clone() for p in model.parameters()]


def assert_same(a, b):
    assert all(torch.equal(s, t) for s, t in zip(a, b, strict=True))


OPTIONS = {
    "plain": {},
    "accumulation and clipping": {"gradient_accumulation_steps": 3, "max_grad_norm": 0.1},
    "bf16": {"bf16": True},
}


@pytest.mark.parametrize(
    ("base", "options"),
    [*(("AdamW", o) for o in OPTIONS), *((b, "accumulation and clipping") for b in BASES if b != "AdamW")],
)
def test_a_probed_trainer_run_equals_the_bare_one_bit_for_bit(tmp_path, base, options):
    model, options = bert(), OPTIONS[options]
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
        assert base == "Lion" or optimizer.reading.stability > 0
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
    asked = {"lr": 1e-3, "probe": LanczosProbe(every=4, num_steps=3)}  # and the rules
    model, resumed = bert(), bert()
    run = trainer(tmp_path, model, steps=12, optimizer_cls_and_kwargs=(AdaptiveFactory, asked), **saving)
    run.train()
    other = trainer(tmp_path, resumed, steps=12, optimizer_cls_and_kwargs=(AdaptiveFactory, asked), **saving)
    other.train(resume_from_checkpoint=str(tmp_path / "checkpoint-5"))
    a, b = wrapper_in(run.optimizer), wrapper_in(other.optimizer)
    assert a.steps == b.steps == 12
    assert a.reading.step > 5
    assert a.reading.lambda_max == b.reading.lambda_max
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


class Smoothed(torch.nn.Module):
    """A loss of one's own, as `compute_loss_func` is called."""

    def forward(self, outputs, labels, num_items_in_batch=None):
        loss = torch.nn.functional.cross_entropy(outputs.logits, labels, label_smoothing=0.1, reduction="sum")
        return loss / (len(labels) if num_items_in_batch is None else num_items_in_batch)


@pytest.mark.parametrize("accumulate", [1, 3])
def test_a_loss_of_ones_own_is_measured_if_it_is_a_module_that_the_wrapper_knows(tmp_path, accumulate):
    model, criterion = bert(), Smoothed()
    options = {"compute_loss_func": criterion, "gradient_accumulation_steps": accumulate}
    trainer(tmp_path, model, optimizers=(bare(model, "AdamW"), None), **options).train()
    other = bert()
    asked = {"weight_decay": 0.01, "lr": 1e-3, "loss_fn": criterion, **IDLE}
    run = trainer(tmp_path, other, optimizer_cls_and_kwargs=(AdaptiveFactory, asked), **options)
    run.train()
    optimizer = wrapper_in(run.optimizer)
    assert optimizer.control.gate.trusted is True
    assert optimizer.reading.batch_size == 4 * accumulate
    assert_same(weights(model), weights(other))


OUTSIDE = {
    "compute_loss_func": {"compute_loss_func": lambda outputs, labels, num_items_in_batch=None: Smoothed()(outputs, labels)},
    "label_smoothing_factor": {"label_smoothing_factor": 0.1},
}


@pytest.mark.parametrize("how", OUTSIDE)
def test_a_loss_that_nobody_hears_trains_as_with_the_bare_base_and_says_that_nothing_is_measured(tmp_path, how):
    model, other = bert(), bert()
    trainer(tmp_path, model, optimizers=(bare(model, "AdamW"), None), **OUTSIDE[how]).train()
    asked = {"weight_decay": 0.01, "lr": 1e-3, **IDLE}
    run = trainer(tmp_path, other, optimizer_cls_and_kwargs=(AdaptiveFactory, asked), **OUTSIDE[how])
    with pytest.warns(UserWarning, match="measures nothing: the model's output has no .loss and no loss_fn was given") as said:
        run.train()
    assert len([w for w in said if "adaptive_opt" in str(w.message)]) == 1
    assert wrapper_in(run.optimizer).reading is None
    assert_same(weights(model), weights(other))

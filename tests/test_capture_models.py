"""Where the batch comes from in models that frameworks make: Hugging Face, torch.compile, activation checkpointing."""

import os
import warnings

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest
import torch
from problems import make
from test_capture import assert_replays, objective_of, wrap
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint


def tiny(name):
    import transformers as hf

    sizes = {"vocab_size": 30}
    if name == "gpt2":
        return hf.GPT2LMHeadModel(hf.GPT2Config(n_layer=2, n_head=2, n_embd=16, n_positions=16, **sizes))
    config = hf.BertConfig(
        hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32, num_labels=3, **sizes
    )
    return hf.BertForSequenceClassification(config)


@pytest.mark.parametrize("name", ["gpt2", "bert"])
def test_the_own_loss_of_a_hugging_face_model_is_replayed_with_its_dropout(name):
    model = tiny(name).train()
    optimizer = wrap(model, None)
    tokens = torch.randint(0, 30, (8, 10))
    for _ in range(2):
        optimizer.zero_grad()
        labels = tokens if name == "gpt2" else tokens[:, 0] % 3
        loss = model(input_ids=tokens, attention_mask=torch.ones_like(tokens), labels=labels).loss
        loss.backward()
        assert_replays(optimizer)
        part, fraction = objective_of(optimizer).part(0.5, least=1)
        assert (part.batch_size, fraction) == (4, 0.5)
        assert part.loss() > 0
        optimizer.step()
        assert optimizer.report.loss == pytest.approx(loss.item(), rel=1e-6)
        assert optimizer.report.reading.backend == "exact"
        assert optimizer.report.reading.stability is not None


def test_an_output_without_a_loss_is_refused_by_name():
    problem = make("mlp", 1)
    optimizer = wrap(problem.model, None)
    F.cross_entropy(problem.model(problem.batches[0][0]), problem.batches[0][1]).backward()
    with pytest.warns(UserWarning, match=r"output has no \.loss and no loss_fn was given"):
        optimizer.step()


@pytest.mark.parametrize("given", ["compiled", "plain"])
def test_a_compiled_model_is_replayed_when_it_is_the_one_given(given):
    problem = make("mlp", 3)
    compiled = torch.compile(problem.model, backend="eager")
    optimizer = wrap(compiled if given == "compiled" else problem.model, problem.criterion)
    x, y = problem.batches[0]
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=DeprecationWarning)  # torch's own, while it compiles
        problem.criterion(compiled(x), y).backward()
    if given == "compiled":
        assert_replays(optimizer)
        optimizer.step()
        assert optimizer.report.reading.backend == "exact"
    else:
        with pytest.warns(UserWarning, match=r"the model was not.*what torch\.compile returned"):
            optimizer.step()
        assert optimizer.report.stepped
    problem.criterion(compiled(x), y).backward()  # and the compiled graph still runs
    torch._dynamo.reset()


@pytest.mark.parametrize("whole", [False, True], ids=["a block", "the whole model"])
def test_activation_checkpointing_is_replayed(whole):
    problem = make("mlp", 2)
    model, criterion = problem.model, problem.criterion

    class Frugal(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = model

        def forward(self, x):
            return checkpoint(self.inner, x, use_reentrant=False)

    net = model if whole else Frugal()
    optimizer = wrap(net, criterion)
    for x, y in problem.batches:
        optimizer.zero_grad()
        out = checkpoint(net, x, use_reentrant=False) if whole else net(x)
        criterion(out, y).backward()
        assert_replays(optimizer)
        optimizer.step()
        assert optimizer.report.reading.backend == "exact"

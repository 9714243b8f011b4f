"""The verdict on a finished model, its page, and `python -m adaptive_opt checkup`."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from oracles import Net
from torch import nn

from adaptive_opt import checkup
from adaptive_opt.__main__ import main
from adaptive_opt.page import page
from adaptive_opt.records import LayerReading, Reading
from adaptive_opt.verdict import verdict
from experiments.tasks.mnist import MNIST

ROOT = Path(__file__).resolve().parents[1]


class Bowl(nn.Module):
    """w' diag(h) w / 2 + 1 with its gradient at the origin zero."""

    def __init__(self, h, at=0.0):
        super().__init__()
        self.w = nn.Parameter(torch.full((len(h),), at, dtype=torch.float64))
        self.h = torch.tensor(h, dtype=torch.float64)

    def forward(self, x):
        return (self.h * self.w**2).sum() / 2 + 1 + 0 * x.sum()


def judged(model):
    return verdict(checkup(model, lambda out, y: out, (torch.ones(1), torch.ones(1))))


def test_a_bowl_is_a_minimum_a_ridge_a_saddle_and_a_wall_a_slope():
    assert judged(Bowl([1.0, 2.0, 3.0])).place == "minimum"
    assert "with probability 0.99 there is none" in judged(Bowl([1.0, 2.0, 3.0])).sentences[0]
    saddle = judged(Bowl([1.0, -2.0, -3.0]))
    assert saddle.place == "saddle"
    assert "at least 2 directions" in saddle.sentences[0]
    assert judged(Bowl([1.0, 2.0], at=1.0)).place == "slope"


def test_sharp_and_flat_are_what_a_nudge_of_one_percent_of_the_weights_does_to_the_loss():
    for h, shape in ((1.0, "flat"), (1e3, "neither"), (1e6, "sharp")):
        model = Bowl([h, 0.0], at=0.0)
        with torch.no_grad():
            model.w[1] = 1.0  # |w| = 1, along which the loss is level: a nudge of 0.01 adds h / 2 * 1e-4
        assert judged(model).shape == shape


def test_an_unmeasured_reading_has_no_verdict_and_a_linear_loss_says_so():
    assert verdict(Reading(step=0, loss=float("nan"), grad_norm=float("nan"))).place == "unknown"
    w = nn.Linear(3, 1)
    r = checkup(w, lambda out, y: out.sum(), (torch.randn(4, 3), torch.zeros(4)))
    assert verdict(r).place == "unknown"
    assert "no curvature" in verdict(r).sentences[0]


@pytest.mark.parametrize(("rms", "named"), [((1.0, 0.02), "b"), ((30.0, 1.0), "a"), ((2.0, 0.5), None)])
def test_the_layer_out_of_its_band_is_named(rms, named):
    layers = tuple(LayerReading(n, 2 * s, 0.0, s, 0.0, None) for n, s in zip("ab", rms, strict=True))
    v = verdict(Reading(step=0, loss=1.0, grad_norm=0.0, layers=layers))
    assert v.layer == named
    assert any("worries" in s for s in v.sentences)


def test_the_page_has_every_number_with_its_bound_and_fits_the_terminal():
    net = Net("layernorm")
    r = checkup(net.model, nn.CrossEntropyLoss(), (net.x, net.y), num_steps=12)
    text = page(r, verdict(r), "a net")
    for name in ("loss", "lambda_max", "lambda_min", "epsilon", "kappa", "delta", "trace", "Lipschitz", "sigma_rms"):
        assert name in text
    assert "stability, kappa_effective" in text  # what was not measured, and why
    assert max(map(len, text.splitlines())) <= 100
    bare = page(replace(r, epsilon=None, kappa=None, trace=None, layers=()), verdict(r), "a net")
    assert bare.count("not measured") >= 3


BUILD = """
import torch
from torch import nn

def build():
    torch.manual_seed(1)
    x = torch.randn(24, 5)
    return nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 3)), nn.CrossEntropyLoss(), (x, torch.arange(24) % 3)

def wrong():
    return 3
"""


@pytest.fixture
def built(tmp_path):
    (tmp_path / "mine.py").write_text(BUILD)
    model = nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 3))
    torch.save({"epoch": 3, "model": model.state_dict()}, tmp_path / "good.pt")
    torch.save(nn.Linear(2, 2).state_dict(), tmp_path / "other.pt")
    torch.save({"epoch": 3}, tmp_path / "empty.pt")
    (tmp_path / "text.pt").write_text("hello")
    return tmp_path, model


def test_the_command_prints_the_page_of_the_checkpoint_and_writes_the_same_numbers(built, capsys):
    folder, model = built
    out = folder / "reading.json"
    call = ["checkup", f"{folder}/mine.py:build", "--checkpoint", f"{folder}/good.pt", "--json", str(out), "--num-steps", "20"]
    assert main(call) == 0
    text = capsys.readouterr().out
    saved = json.loads(out.read_text())
    torch.manual_seed(1)
    x = torch.randn(24, 5)
    r = checkup(model.eval(), nn.CrossEntropyLoss(), (x, torch.arange(24) % 3), num_steps=20)
    assert saved["reading"]["lambda_max"] == r.lambda_max
    assert f"{r.lambda_max:.4g}" in text
    assert saved["verdict"]["place"] == verdict(r).place
    assert Reading.from_dict(saved["reading"]).layers == r.layers


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (["{f}/mine.py"], "FILE.py:FUNCTION"),
        (["{f}/nothing.py:build"], "no such file"),
        (["{f}/mine.py:nothing"], "no function 'nothing'"),
        (["{f}/mine.py:wrong"], "must return"),
        (["no.such.package:build"], "No module named"),
        (["{f}/mine.py:build", "--checkpoint", "{f}/nothing.pt"], "no such file"),
        (["{f}/mine.py:build", "--checkpoint", "{f}/text.pt"], "not a checkpoint"),
        (["{f}/mine.py:build", "--checkpoint", "{f}/empty.pt"], "no state dict"),
        (["{f}/mine.py:build", "--checkpoint", "{f}/other.pt"], "does not fit"),
        (["{f}/mine.py:build", "--only", "0.wieght"], "near: 0.weight"),
        (["{f}/mine.py:build", "--layers", "all"], "layers="),
    ],
)
def test_a_call_that_cannot_work_ends_in_one_sentence(built, capsys, call, words):
    folder, _ = built
    assert main(["checkup", *(word.format(f=folder) for word in call)]) == 2
    error = capsys.readouterr().err
    assert words in error
    assert "Traceback" not in error


def test_the_docs_example_runs_from_the_shell(tmp_path):
    torch.save(MNIST().model.state_dict(), tmp_path / "finished.pt")  # untrained: training it takes 20 s
    target = f"{ROOT / 'experiments/finished.py'}:build"
    call = ["checkup", target, "--checkpoint", "finished.pt", "--num-steps", "4", "--max-batches", "1"]
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-m", "adaptive_opt", *call], cwd=tmp_path, capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stderr
    assert "lambda_max" in done.stdout


@pytest.mark.slow
def test_the_finished_example_trains_and_saves_what_the_command_reads(tmp_path):
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    example = str(ROOT / "experiments/finished.py")
    for call in ([example], ["-m", "adaptive_opt", "checkup", f"{example}:build", "--checkpoint", "runs/finished.pt"]):
        done = subprocess.run([sys.executable, *call], cwd=tmp_path, capture_output=True, text=True, env=env)
        assert done.returncode == 0, done.stderr

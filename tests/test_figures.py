"""The article's figures: what they say of themselves is measured, and each can be drawn."""

import subprocess
import sys
from importlib import import_module
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from experiments.figures.canyon import descent, first, theory
from experiments.figures.common import Drawn, dense_spectrum
from experiments.figures.layers import signal
from experiments.figures.minima import rescaled, sharp
from scripts.figures import FIGURES, section

ROOT = Path(__file__).resolve().parents[1]


@pytest.mark.parametrize("kappa", [10, 100, 1000])
def test_gradient_descent_on_the_canyon_contracts_by_exactly_the_theorys_factor(kappa):
    errors = np.linalg.norm(descent(kappa, 5 * kappa), axis=1)
    np.testing.assert_allclose(errors[1:] / errors[:-1], (kappa - 1) / (kappa + 1), rtol=1e-9)
    assert abs(first(errors, 0.5) - theory(kappa, 0.5)) <= 1


def test_the_dense_spectrum_is_that_of_a_known_quadratic():
    w = nn.Parameter(torch.ones(3, dtype=torch.float64))
    A = torch.diag(torch.tensor([3.0, -2.0, 0.5], dtype=torch.float64))
    np.testing.assert_allclose(dense_spectrum(lambda: w @ A @ w / 2, [w]), [-2.0, 0.5, 3.0], atol=1e-12)


def test_the_gradient_at_each_layer_is_backwards_own():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2))
    x, y = torch.randn(5, 4), torch.tensor([0, 1, 0, 1, 1])
    found = signal(model, nn.CrossEntropyLoss(), x, y)
    x = x.clone().requires_grad_()
    nn.CrossEntropyLoss()(model(x), y).backward()
    assert x.grad is not None
    assert found[0] == pytest.approx(float(x.grad.norm()))
    assert len(found) == 2


@pytest.mark.slow  # trains to a loss of 0.01
def test_the_rescaled_net_is_the_same_function():
    m = sharp(0)
    other = rescaled(m, 8.0)  # a power of two: nothing is rounded
    x = m.task.test[0]
    assert torch.equal(m.model(x), other.model(x))
    assert m.reading.epsilon is not None
    assert other.reading.epsilon is not None
    assert other.reading.epsilon > 2 * m.reading.epsilon


def test_a_section_shows_its_pictures_its_command_and_both_sides():
    text = section(Drawn("Fig. 9", ("a.png", "b.png"), "What it is.", ("This.",), ("That.",), seed=3), "canyon")
    assert text.count("](figures/") == 2
    assert "Seed 3; `python scripts/figures.py --only canyon`." in text
    assert text.index("What holds:") < text.index("- This.") < text.index("What does not") < text.index("- That.")


def test_the_docs_have_every_figure_and_every_figure_is_there():
    text = (ROOT / "docs" / "figures.md").read_text()
    for name in FIGURES:
        assert f"--only {name}`" in text
        assert import_module(f"experiments.figures.{name}").draw.__module__.endswith(name)
    for part in text.split("](figures/")[1:]:
        assert (ROOT / "docs" / "figures" / part.partition(")")[0]).read_bytes().startswith(b"\x89PNG")


def drawn(name, out):
    words = [sys.executable, "scripts/figures.py", "--only", name, "--out", str(out)]
    subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=True)
    return (out / "figures-some.md").read_text()


def test_the_saddle_is_drawn_and_its_numbers_are_the_runs(tmp_path):
    text = drawn("saddle", tmp_path)
    assert (tmp_path / "figures" / "fig5.png").stat().st_size > 10_000
    assert "SGD and Adam both stay" in text
    assert "-> kept" in text


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in FIGURES if name != "saddle"])
def test_every_figure_is_drawn(name, tmp_path):
    if name == "panels":
        from adaptive_opt.dashboard.picture import NoBrowser, browser

        try:
            browser()
        except NoBrowser:
            pytest.skip("no Chromium")
    drawn(name, tmp_path)
    assert list((tmp_path / "figures").glob("*.png"))

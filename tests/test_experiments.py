"""Experiments: every configuration file composes and trains two steps; the sweep of the README runs; faults are real."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hydra import compose, initialize_config_dir

from adaptive_opt.telemetry import read_reports
from experiments.faults import Faults
from experiments.tasks.canyon import Canyon
from experiments.tasks.mnist import images
from experiments.train import run

ROOT = Path(__file__).resolve().parents[1]
CONFIGS = ROOT / "configs"
GROUPS = ("task", "base", "probe", "policy", "mode", "intervention", "telemetry", "experiment")
CHOICES = [f"{group}={path.stem}" for group in GROUPS for path in sorted((CONFIGS / group).glob("*.yaml"))]


def composed(*overrides):
    with initialize_config_dir(str(CONFIGS), version_base="1.3"):
        return compose("train", list(overrides))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # tensorboard's imports
@pytest.mark.parametrize("choice", CHOICES)
def test_every_configuration_file_trains_two_steps(choice, tmp_path):
    outcome = run(composed(choice, "steps=2"), tmp_path)
    assert outcome.steps == 2
    assert json.loads((tmp_path / "metrics.json").read_text())["steps"] == 2


def test_a_run_can_be_left_as_one_page(tmp_path):
    run(composed("task=digits", "steps=2", "telemetry.page=true"), tmp_path)
    assert "2 lines" in (tmp_path / "run.html").read_text()


@pytest.mark.parametrize("path", sorted((CONFIGS / "experiment").glob("*.yaml")), ids=lambda p: p.stem)
def test_every_experiment_file_opens_with_its_command(path):
    assert f"# python experiments/train.py experiment={path.stem}" in path.read_text().splitlines()[:2]


def test_the_same_seed_gives_the_same_run_bit_for_bit(tmp_path):
    for name in ("a", "b"):
        run(composed("task=digits", "steps=30", "seed=3"), tmp_path / name)
    a, b = (list(read_reports(tmp_path / name)) for name in ("a", "b"))
    assert [(r.loss, r.grad_norm) for r in a] == [(r.loss, r.grad_norm) for r in b]


def test_the_sweep_of_the_readme_runs(tmp_path):
    command = [sys.executable, "experiments/train.py", "-m", "task=digits", "policy=base,rules", "seed=0,1", "steps=3"]
    out = subprocess.run([*command, f"hydra.sweep.dir={tmp_path}"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert out.count("run folder") == 4
    assert len(list(tmp_path.glob("*/metrics.json"))) == 4


def test_a_canyon_has_the_condition_number_it_was_asked_for():
    task = Canyon(kappa=1e4)
    spectrum = torch.linalg.eigvalsh(task.x.T @ task.x / len(task.x))
    assert float(spectrum[-1] / spectrum[0]) == pytest.approx(1e4, rel=1e-6)


def test_the_images_are_real_ones():
    x, y = images()
    assert x.shape == (5000, 1, 28, 28)
    assert y.bincount().tolist() == [500] * 10


def test_faults_break_the_share_of_batches_that_was_asked_for():
    faults = Faults(0.1, "mixed", seed=0)
    x = torch.ones(2, 2)
    broken = [faults(x) for _ in range(1000)]
    assert faults.count == pytest.approx(100, abs=30)
    assert sum(torch.isnan(b).all() for b in broken) == faults.count // 2
    with pytest.raises(ValueError, match="kind='other'"):
        Faults(0.1, "other")


def test_the_readmes_example_is_the_file_that_runs():
    code = (ROOT / "experiments" / "quickstart.py").read_text()
    assert code.split("\n", 2)[2].strip() in (ROOT / "README.md").read_text()
    out = subprocess.run([sys.executable, "experiments/quickstart.py"], cwd=ROOT, capture_output=True, text=True, check=True)
    last = [line for line in out.stdout.splitlines() if line.startswith("epoch 9")]
    assert float(last[0].split("loss ")[1].split(",")[0]) < 1.0
    assert "holding the learning rate" in out.stdout

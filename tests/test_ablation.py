"""The ablation's numbers are those of their definitions, and whatever lies in a folder of runs is counted or named."""

import itertools
import json
import math
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from experiments.ablation import tables
from experiments.ablation.runs import RunRow, Skipped, find, first_below, read
from experiments.ablation.statistics import adjusted, difference, iqm_interval, mean_interval, profile, sign_test
from experiments.train import run
from tests.test_experiments import composed

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    """Two workloads, two arms, two seeds, as the sweep of configs/study/ablation.yaml lays them out."""
    folder = tmp_path_factory.mktemp("study")
    for workload, arm, seed in itertools.product(("healthy", "saddle"), ("bare", "rules"), (0, 1)):
        words = [f"experiment={workload}", f"arm={arm}", f"seed={seed}", "steps=25", "telemetry=quiet", "measure.target=2.2"]
        run(composed(*words), folder / workload / arm / f"seed{seed}")
    return folder


@pytest.fixture
def copy(study, tmp_path):
    return shutil.copytree(study, tmp_path / "study")


# ---- statistics -----------------------------------------------------------------------------------------------------------


def test_the_interquartile_mean_is_the_mean_of_the_middle_half():
    assert iqm_interval([0.0, 1.0, 2.0, 1000.0]).value == 1.5


def test_a_bootstrap_interval_holds_its_mean_and_covers_the_truth_as_often_as_it_says():
    rng = np.random.default_rng(0)
    held = 0
    for _ in range(100):
        interval = mean_interval(rng.normal(size=20).tolist())
        assert interval.low is not None
        assert interval.high is not None
        assert interval.low < interval.value < interval.high
        held += interval.low < 0 < interval.high
    assert 85 <= held <= 99  # 95 % asked for; the percentile interval of 20 samples is a little short


def test_one_run_has_no_interval_and_equal_runs_have_an_empty_one():
    assert mean_interval([3.0]).low is None
    assert (iqm_interval([2.0, 2.0, 2.0]).low, iqm_interval([2.0, 2.0, 2.0]).high) == (2.0, 2.0)


def test_the_permutation_test_is_the_count_over_all_signs():
    d = np.array([1.0, 2.0, -0.5, 3.0, 0.7])
    signs = np.array(list(itertools.product((1, -1), repeat=5)))
    means = (signs * d).mean(1)
    share = 2 * min((means >= d.mean()).mean(), (means <= d.mean()).mean())
    found = difference(d.tolist(), [0.0] * 5)
    assert found.p == pytest.approx(share)
    assert found.smallest == 2 / 32


def test_equal_runs_differ_with_p_one():
    assert difference([1.0, 2.0], [1.0, 2.0]).p == 1.0


def test_adjusted_p_values_are_benjamini_and_hochbergs():
    p = [0.01, 0.04, 0.03, 0.005]
    by_hand = {0.005: 0.02, 0.01: 0.02, 0.03: 0.04, 0.04: 0.04}  # smallest of p_k n / k from k upwards
    assert adjusted(p) == pytest.approx([by_hand[x] for x in p])
    assert adjusted([]) == []


def test_a_profile_counts_what_is_solved_within_each_factor_of_the_best():
    costs = np.array([[1.0, 2.0], [4.0, 1.0], [math.inf, 3.0], [math.inf, math.inf]])
    shares = profile(costs, np.array([1.0, 2.0, 4.0]))
    assert shares.tolist() == [[0.25, 0.25, 0.5], [0.5, 0.75, 0.75]]


def test_a_sign_test_of_a_coin():
    assert sign_test(0, 0) == 1.0
    assert sign_test(5, 0) == 2 / 32


def test_the_target_is_reached_where_the_median_of_fifteen_is_below():
    assert first_below([1.0] * 14 + [0.0] * 8, 0.5) == 21
    assert first_below([1.0] * 40, 0.5) is None
    assert first_below([0.1] * 10 + [math.nan] + [0.1] * 15, 0.5) == 25


# ---- folders --------------------------------------------------------------------------------------------------------------


def test_every_finished_run_is_read_with_its_own_numbers(study):
    found = find(study)
    assert len(found.rows) == 8
    assert found.skipped == ()
    row = next(r for r in found.rows if (r.workload, r.arm, r.seed) == ("healthy", "rules", 1))
    metrics = json.loads((study / "healthy" / "rules" / "seed1" / "metrics.json").read_text())
    assert (row.value, row.steps, row.gradients) == (metrics["test_accuracy"], 25, metrics["gradients"])
    saddle = next(r for r in found.rows if (r.workload, r.arm, r.seed) == ("saddle", "bare", 0))
    assert saddle.metric == "log10 train_loss"
    assert saddle.gradients == 25  # the bare optimizer spends a gradient a step


def test_the_cost_to_the_target_is_the_curves(study):
    folder = study / "healthy" / "rules" / "seed0"
    lines = [line.split(",") for line in (folder / "curve.csv").read_text().splitlines()[1:]]
    row = read(folder)
    at = first_below([float(loss) for _, loss, _ in lines], 2.2)
    assert at is not None
    assert (row.steps_to_target, row.gradients_to_target) == (at + 1, float(lines[at][2]))
    assert row.gradients_to_target > row.steps_to_target  # it was probed


def _damaged(copy):
    bad = {name: copy / "healthy" / "rules" / name for name in ("failed", "half", "older", "broken", "odd")}
    for folder in bad.values():
        shutil.copytree(copy / "healthy" / "rules" / "seed0", folder)
    (bad["failed"] / "failed.txt").write_text("Traceback\nRuntimeError: no memory\n")
    (bad["half"] / "metrics.json").unlink()
    metrics = json.loads((bad["older"] / "metrics.json").read_text())
    (bad["older"] / "metrics.json").write_text(json.dumps({**metrics, "schema": 0}))
    (bad["broken"] / "metrics.json").write_text('{"schema": 1, "st')
    (bad["odd"] / "metrics.json").write_text('{"schema": 1}')
    return bad


def test_what_is_not_finished_failed_or_cannot_be_read_is_named_and_not_counted(copy):
    _damaged(copy)
    found = find(copy)
    assert len(found.rows) == 8
    assert {name.rpartition("/")[2]: why.partition(" (")[0] for name, why in found.skipped} == {
        "failed": "failed: RuntimeError: no memory",
        "half": "not finished",
        "older": "metrics.json has schema 0, and this version reads 1",
        "broken": "metrics.json cannot be read",
        "odd": "something is missing in it",
    }


def test_a_run_that_ended_with_nan_counts_with_the_loss_it_started_with(copy):
    folder = copy / "saddle" / "bare" / "seed0"
    metrics = json.loads((folder / "metrics.json").read_text())
    (folder / "metrics.json").write_text(json.dumps({**metrics, "train_loss": None}))
    row = read(folder)
    assert not row.finite
    assert row.value == math.log10(metrics["start_loss"])


def test_a_folder_without_a_run_is_skipped(tmp_path):
    with pytest.raises(Skipped, match=r"no run.json"):
        read(tmp_path)
    with pytest.raises(ValueError, match="no such folder"):
        find(tmp_path / "nowhere")


# ---- tables ---------------------------------------------------------------------------------------------------------------


def row(arm, seed, value, cost=10.0, workload="w", higher=True):
    return RunRow(workload, arm, seed, "accuracy", higher, value, True, 100, 105.0, 1.0, 1, 0, cost, cost, cost)


def test_arms_are_compared_on_the_seeds_that_both_have():
    rows = [row("rules", 0, 1.0), row("rules", 1, 2.0), row("bare", 1, 5.0), row("bare", 2, 100.0)]
    first, second = tables.lines(rows, "rules")
    assert (first.arm, first.versus) == ("rules", None)
    assert second.versus is not None
    assert (second.versus.pairs, second.versus.mean.value) == (1, 3.0)


@pytest.mark.parametrize("higher", [True, False])
def test_better_means_what_the_metric_says(higher):
    rows = [row(arm, seed, value, higher=higher) for arm, value in (("rules", 1.0), ("bare", 2.0)) for seed in range(3)]
    bare = tables.overall(rows, "rules")[1]
    assert (bare.wins, bare.ties, bare.losses) == ((3, 0, 0) if higher else (0, 0, 3))


def test_cells_that_hold_markup_do_not_break_a_table():
    assert tables.markdown(["a|b"], [["1"]]).splitlines()[0] == "| a\\|b |"
    assert r"no\_damp & 5 \% \\" in tables.latex(["arm", "x"], [["no_damp", "5 %"]])


def test_the_command_writes_tables_and_figures_and_says_what_it_left_out(copy):
    _damaged(copy)
    done = subprocess.run(
        [sys.executable, "scripts/ablate.py", str(copy)], cwd=ROOT, capture_output=True, text=True, check=True
    )
    out = copy / "tables"
    text = (out / "ablation.md").read_text()
    assert "| bare | 2 | 0 |" in text
    assert "## Left out: 5" in text
    assert done.stderr.count("left out") == 5
    assert r"\toprule" in (out / "ablation.tex").read_text()
    assert len((out / "runs.csv").read_text().splitlines()) == 9
    assert len((out / "arms.csv").read_text().splitlines()) == 5
    for name in ("differences.png", "profiles.png"):
        assert (out / name).read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["nowhere"], "nowhere: no such folder"),
        (["configs"], "no finished run below configs"),
        (["{study}", "--reference", "rule"], "--reference rule: no such arm; there are"),
    ],
)
def test_a_call_that_cannot_work_is_answered_in_a_sentence(words, message, study):
    words = [w.format(study=study) for w in words]
    done = subprocess.run([sys.executable, "scripts/ablate.py", *words], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode in (1, 2)
    assert message in done.stderr
    assert "Traceback" not in done.stderr

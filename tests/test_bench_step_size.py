"""scripts/bench_step_size.py: every arm takes steps, also on a task that has no loss_fn; the long runs are the script's own."""

import logging
import math
from functools import partial

import pytest
import torch

from experiments.tasks.base import loss_of
from experiments.tasks.digits import Digits
from experiments.tasks.poisson import Poisson
from scripts import bench_step_size as bench

PACKAGES = {
    "Prodigy": "prodigyopt",
    "D-Adaptation Adam": "dadaptation",
    "D-Adaptation SGD": "dadaptation",
    "DoG": "dog",
    "GeN AdamW": "GeN",
    "GeN SGD": "GeN",
    "schedule-free AdamW": "schedulefree",
}


@pytest.fixture(autouse=True)
def _as_it_was():
    """A run sets the threads and the log's level."""
    log, threads = logging.getLogger("adaptive_opt"), torch.get_num_threads()
    level = log.level
    yield
    log.setLevel(level)
    torch.set_num_threads(threads)


@pytest.mark.parametrize("arm", [*bench.OURS, *bench.PEERS])
def test_an_arm_takes_steps_on_a_task_with_its_own_objective(arm, monkeypatch):
    if arm in bench.PEERS:
        pytest.importorskip(PACKAGES[arm])
    monkeypatch.setitem(bench.WORKLOADS, "PINN", partial(Poisson, steps=12, points=16))
    before = float(loss_of(Poisson(0, points=16), *Poisson(0, points=16).batch(0)).detach())
    row = bench.outcome({"workload": "PINN", "base": "AdamW", "seed": 0, "arm": arm, "power": -1.0})
    assert "error" not in row
    assert row["loss"] != before
    assert math.isfinite(row["loss"])


@pytest.mark.parametrize("arm", bench.WITHOUT)
def test_an_ingredient_is_switched_off_and_on_again(arm, monkeypatch):
    """In so short a run nothing goes far beyond the bottom. kfac is tried at step 26 of the PINN, whose gradients agree."""
    task = partial(Poisson, steps=90, points=16) if arm == "kfac not tried" else partial(Digits, steps=40)
    monkeypatch.setitem(bench.WORKLOADS, "short", task)
    run = {"workload": "short", "base": "AdamW", "seed": 0, "power": 0.0}
    rows = [bench.outcome({**run, "arm": a}) for a in ("auto", arm, "auto")]
    assert rows[0]["loss"] == rows[2]["loss"]
    assert (rows[1]["loss"] != rows[0]["loss"]) or arm == "always to the bottom"


def test_the_table_says_how_wide_and_how_far():
    """A loss of 1 at the middle, doubling with every half power of ten away from it."""
    run = {"workload": "RNN", "base": "AdamW", "seed": 0}
    rows = [{**run, "arm": "bare", "power": k, "loss": 2.0 ** abs(2 * k)} for k in bench.POWERS]
    rows += [{**run, "arm": "user", "power": k, "loss": 1.5} for k in bench.POWERS]
    rows += [{**run, "arm": "auto", "power": 0.0, "loss": 1.2, "probing": 0.05}]
    text = bench.table(rows)
    assert "| RNN, AdamW | 1, lr 0.01 | x10, x1e+03 | x1e+04, x1e+04 | 1.50 | 1.20 | 5.0% |" in text
    assert "auto: 1.20 times the best loss" in text
    assert "0% of 1 within 5 %, 100% within 25 %" in text


def test_a_seed_comes_after_the_other():
    names = [(r["seed"], r["arm"]) for r in bench.runs(2, ["RNN"], ["AdamW"], ["auto", "DoG"])]
    assert names == [(0, "auto"), (0, "DoG"), (1, "auto"), (1, "DoG")]

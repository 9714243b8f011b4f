"""The clinic: rows say what happened and what it cost, sicknesses are what they are called, tables are their definitions."""

import itertools
import json
import math
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from torch import nn

from adaptive_opt.records import Event
from experiments.clinic import cost, tables
from experiments.clinic.arms import ARMS, base_of
from experiments.clinic.book import Book, jobs
from experiments.clinic.cost import Meter
from experiments.clinic.events import Diary
from experiments.clinic.records import Job
from experiments.clinic.run import run
from experiments.clinic.workloads import WORKLOADS
from experiments.clinic.workloads.ill_conditioned import whitened
from experiments.clinic.workloads.saddles import identical

ROOT = Path(__file__).resolve().parents[1]
PEERS = {"StabilityGuard": "stabilityguard", "ZClip": "zclip"}
OURS = [arm for arm in ARMS if arm not in PEERS]


# ---- runs -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("arm", OURS)
def test_every_arm_of_ours_gives_a_row(arm):
    row = run(Job("factorisation", arm, "SGD", 0, "steps"), steps=2)
    assert row["steps"] == 2
    assert row["gradient_equivalents"] >= 2
    assert math.isfinite(row["value"])
    json.dumps(row)


@pytest.mark.parametrize("arm", PEERS)
def test_every_peer_gives_a_row(arm):
    if find_spec(PEERS[arm]) is None:
        pytest.skip(f"{PEERS[arm]} is in the extra `bench`")
    assert run(Job("factorisation", arm, "AdamW", 0, "steps"), steps=2)["steps"] == 2


@pytest.mark.parametrize("name", [name for name in WORKLOADS if name != "noisy mnist1d"])  # its data take seven seconds to make
def test_every_workload_runs_bare_and_as_the_human_would(name):
    for arm in ("bare", "human") if WORKLOADS[name].human else ("bare",):
        row = run(Job(name, arm, "AdamW", 0), steps=2)
        assert (row["steps"], row["gradient_equivalents"]) == (2, 2)


@pytest.mark.parametrize("name", ["scaled features", "MNIST CNN"])  # the second has dropout
def test_at_equal_steps_an_untreated_run_equals_the_bare_one(name):
    bare, ours = (run(Job(name, arm, "AdamW", 1, "steps"), steps=4) for arm in ("bare", "rules"))
    assert ours["value"] == bare["value"]
    assert ours["gradient_equivalents"] > bare["gradient_equivalents"]


def test_a_budget_is_kept_by_whoever_pays_for_more_than_gradients():
    row = run(Job("factorisation", "sam", "AdamW", 0), steps=30)
    assert row["steps"] <= 16  # a replay a step, and what else it takes
    assert 30 <= row["gradient_equivalents"] < 34


def test_a_run_that_nobody_can_save_ends_early():
    row = run(Job("lr x1000", "bare", "SGD", 0), steps=40)
    assert row["steps"] < 40
    assert row["train_loss"] is None


# ---- the price ------------------------------------------------------------------------------------------------------------


def test_what_a_step_takes_beyond_the_base_and_beside_passes_is_charged(monkeypatch):
    now = iter(itertools.count())
    monkeypatch.setattr(cost.time, "process_time", lambda: float(next(now)))  # every look at the clock takes a second
    model = nn.Linear(2, 2)
    base = torch.optim.SGD(model.parameters(), lr=0.1)
    meter = Meter(base, model)
    for _ in range(4):
        with meter.gradient():
            model(torch.ones(1, 2)).sum().backward()
        with meter.step():
            base.step()
            w = torch.zeros(2, requires_grad=True)
            torch.autograd.grad((w**2).sum(), w)
    # a step has five looks between its first and its last, two of them around the base, two around the pass
    assert (meter.step_seconds, meter.base_seconds, meter.pass_seconds) == (4 * 5.0, 4 * 1.0, 4 * 1.0)
    assert meter.one == 2.0  # the model's own hook looks once inside of a gradient
    meter.passes = 3.0
    assert meter.spent == 4 + 3 + (20 - 4 - 4) / 2
    assert meter.timed == (20 - 4) / 2


def test_the_bare_base_is_charged_its_gradients_alone():
    row = run(Job("factorisation", "bare", "AdamW", 0), steps=7)
    assert (row["steps"], row["gradient_equivalents"], row["other"], row["timed"]) == (7, 7, 0, 0)


# ---- workloads ------------------------------------------------------------------------------------------------------------


def test_there_are_eighteen_sick_and_four_healthy_ones():
    assert sum(not w.healthy for w in WORKLOADS.values()) >= 18
    assert sum(w.healthy for w in WORKLOADS.values()) == 4
    assert all(w.reference == "human" or WORKLOADS[w.reference].healthy for w in WORKLOADS.values())


def test_identical_units_stay_identical():
    task = identical(0)
    base = base_of("AdamW", task.model, 1e-2)
    for step in range(3):
        x, y = task.batch(step)
        base.zero_grad()
        task.loss_fn(task.model(x), y).backward()
        base.step()
    w = next(task.model.parameters())
    torch.testing.assert_close(w, w[:1].expand_as(w), rtol=1e-4, atol=1e-6)


def test_whitened_inputs_have_a_condition_number_of_one():
    x = whitened(0).x
    torch.testing.assert_close(x.T @ x / len(x), torch.eye(x.shape[1], dtype=x.dtype), rtol=0, atol=1e-9)


# ---- what was done --------------------------------------------------------------------------------------------------------


def test_treatments_are_counted_by_their_last_word():
    diary = Diary()
    diary.write([Event(3, "damp", "too long", "held", "pending"), Event(7, "rollback", "nan", "skipped this batch", "done")])
    diary.write([Event(3, "damp", "too long", "held", "done", "loss 1 -> 2")])
    diary.write([Event(9, "kfac", "zig-zag", "switched", "kept", "progress 2e-3 -> 1e-3 of the loss a step, loss 1 -> 0.9")])
    diary.write([Event(11, "kfac", "zig-zag", "switched", "kept", "progress 1e-3 -> 2e-3 of the loss a step, loss 1 -> 0.9")])
    diary.write(
        [Event(12, "escape", "flat", "found nothing that helps", "done"), Event(13, "sgd", "the policy", "switched", "done")]
    )
    diary.write([Event(14, "spectral", "drift", "scaled", "reverted")])
    found = diary.summary()
    assert (found.interventions, found.reverted, found.gainless, found.skipped, found.void) == (5, 1, 2, 1, 1)


# ---- the book -------------------------------------------------------------------------------------------------------------


def test_what_is_done_is_not_run_again_and_what_fails_is_a_row(tmp_path, monkeypatch):
    wanted = jobs(["factorisation"], ["bare", "kfac"], ["SGD"], 1)
    monkeypatch.setitem(ARMS, "kfac", 5)
    book = Book(tmp_path / "rows.json")
    first, second = book.fill(wanted, steps=2)
    assert first["arm"] == "bare"
    assert second["error"].startswith("AttributeError")
    again = Book(tmp_path / "rows.json")
    assert again.rows == [first, second]
    assert list(again.fill(wanted, steps=2)) == []
    assert "bare" in tables.write(again.rows)


def test_the_most_telling_runs_come_first():
    order = [job.arm for job in jobs(["canyon", "digits MLP"], list(ARMS), ["SGD"], 2)]
    assert order[:7] == ["bare", "human", "rules", "rules", "bare", "rules", "rules"]
    assert not {"bare", "human", "rules"} & set(order[14:])


# ---- tables ---------------------------------------------------------------------------------------------------------------


def row(workload, arm, value, seed=0, budget="compute", **more):
    w = WORKLOADS[workload]
    chance = 0.0 if w.metric.startswith("log10") else w.chance
    return {
        "workload": workload, "arm": arm, "base": "SGD", "seed": seed, "budget": budget, "value": value, "chance": chance,
        "steps": 100, "interventions": 0, "reverted": 0, "gainless": 0, "skipped": 0, **more,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("workload", "healthy", "value", "healed"),
    [
        ("tiny start", 90.0, 81.0, True),
        ("tiny start", 90.0, 80.0, False),
        ("autoencoder", 0.010, 0.0109, True),
        ("autoencoder", 0.010, 0.0112, False),
        ("canyon", -6.0, -5.5, True),
        ("canyon", -6.0, -5.3, False),
        ("canyon", -6.0, None, False),
    ],
)
def test_healed_is_within_a_tenth_of_the_reference(workload, healthy, value, healed):
    rows = tables.judged([row(workload, "human", healthy), row(workload, "rules", value)])
    assert (rows[1]["healthy_value"], rows[1]["healed"]) == (healthy, healed)


def test_a_hot_run_is_held_against_its_healthy_twin():
    rows = tables.judged([row("digits MLP", "bare", 97.0), row("lr x10", "rules", 90.0)])
    assert (rows[1]["healthy_value"], rows[1]["healed"]) == (97.0, True)
    assert rows[0]["healed"] is None


def test_regret_is_the_share_of_the_way_from_the_best_known_back_to_nothing_learned():
    rows = [row("tiny start", arm, v) for arm, v in (("rules", 90.0), ("bare", 50.0), ("human", 98.0), ("kfac", 1.0))]
    found = tables.regrets(rows)["tiny start", "SGD"]  # chance is 10
    assert found["rules"] == 0
    assert found["bare"] == pytest.approx((90 - 50) / (98 - 10))
    assert found["human"] == pytest.approx((90 - 98) / (98 - 10))
    assert found["kfac"] == 1  # worse than nothing learned


def test_only_seeds_that_all_arms_have_are_averaged():
    rows = [row("tiny start", "bare", 50.0), row("tiny start", "bare", 90.0, seed=1), row("tiny start", "rules", 80.0)]
    assert tables.means(rows)["tiny start", "SGD"] == {"bare": 50.0, "rules": 80.0}


def test_rates_are_of_the_runs_in_which_the_bare_base_fails():
    rows = [row("tiny start", "human", 90.0, seed) for seed in (0, 1)]
    rows += [row("tiny start", "bare", v, seed) for seed, v in enumerate((20.0, 89.0))]
    rows += [row("tiny start", "rules", 88.0, seed) for seed in (0, 1)]
    rules = next(s for s in tables.standings(rows) if s.arm == "rules")
    assert (rules.healed, rules.sick) == (1, 1)
    low, high = tables.wilson(1, 1)
    assert low == pytest.approx(0.2065, abs=1e-3)  # 1 / (1 + z^2)
    assert high == 1


def test_harm_is_named():
    rows = [
        row("char-GPT", "bare", 2.0),
        row("char-GPT", "rules", 2.2),
        row("char-GPT", "rules", 2.0, budget="steps", skipped=1),
    ]
    assert tables.against_bare(rows, "compute")[0].short.value == pytest.approx(0.1)
    text = tables.write(rows)
    assert "| char-GPT, SGD | compute | 2 | 2.2 | -10.0% |" in text
    assert "1 of them false alarms" in text
    assert "5.00 per 1000 steps" in text


# ---- the command ----------------------------------------------------------------------------------------------------------


def call(*words):
    return subprocess.run([sys.executable, "scripts/clinic.py", *words], cwd=ROOT, capture_output=True, text=True)


def test_a_call_that_cannot_work_is_answered_in_a_sentence():
    done = call("--seeds", "0")
    assert done.returncode == 2
    assert "--seeds 0" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.slow  # half a minute
def test_the_quick_clinic_ends_with_tables_and_figures(tmp_path):
    out = tmp_path / "clinic.json"
    words = ["--quick", "--out", str(out), "--bases", "SGD", "--arms", "bare", "human", "rules", "kfac", "--workloads"]
    done = call(*words, "tiny start", "factorisation", "digits MLP", "lr x100")
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert len(rows) == 4 * 4 + 4 - 1  # the rules twice, nobody to fix what is healthy
    assert not [r for r in rows if "error" in r]
    hot = next(r for r in rows if r["workload"] == "lr x100" and r["arm"] == "rules")
    assert hot["healed"]
    assert "## Healthy controls" in done.stdout
    for name in ("regret.png", "healed.png", "profile.png"):
        assert (tmp_path / "clinic" / name).read_bytes().startswith(b"\x89PNG")
    assert call(*words, "tiny start").returncode == 0  # nothing is run again
    assert len(out.read_text().splitlines()) == len(rows)

"""The state of a run in a colour and in words: from the report alone, for the page and for the terminal."""

import subprocess
import sys
from dataclasses import replace

import pytest
from made_runs import append, healthy_run, plain, saddle_run, unstable

from adaptive_opt.__main__ import main
from adaptive_opt.dashboard.log import entries
from adaptive_opt.dashboard.run import Run
from adaptive_opt.dashboard.status import KINDS, status
from adaptive_opt.dashboard.text import text
from adaptive_opt.dashboard.words import NOT_MEASURED, WORDS, number
from adaptive_opt.policy import TABLE
from adaptive_opt.records import Condition, Diagnosis, Event, Finding
from adaptive_opt.telemetry import read_reports


@pytest.fixture(scope="module")
def saddle(tmp_path_factory):
    return saddle_run(tmp_path_factory.mktemp("runs") / "saddle")


@pytest.fixture(scope="module")
def reports(saddle):
    return list(read_reports(saddle))


def test_a_saddle_turns_the_light_red_and_its_escape_is_told_with_the_verdict(reports):
    before, at, after = (status([r for r in reports if r.step <= step]) for step in (48, 49, 50))
    assert before.light == "green"
    assert at.light == "red"
    assert at.headline.startswith("AT A SADDLE: at least 3 negative directions")
    assert "stepped" in at.headline
    assert "on trial" in at.headline
    assert after.light == "amber"
    assert "kept: next batch's loss" in after.headline


def test_a_healed_run_is_green_again_after_a_hundred_steps(reports):
    last = reports[-1].step
    assert status([*reports, *(plain(last + i) for i in range(1, 80))]).light == "amber"
    assert status([*reports, *(plain(last + i) for i in range(1, 120))]).light == "green"


def test_a_treatment_in_force_keeps_the_light_amber(reports):
    kept = Event(0, "damp", "too far", "holding the learning rate at 0.1 of the user's", "kept", "loss 2 -> 1")
    held = [plain(i, lr_scale=0.1, events=(kept,) if i == 50 else ()) for i in range(400)]
    assert status(held).light == "amber"
    assert "holding the learning rate at 0.1" in status(held).headline


def test_what_nobody_treats_is_red_with_a_recommendation_of_a_number(reports):
    reading = next(r.reading for r in reports if r.reading and r.reading.stability)
    sick = unstable(1, reading)
    alone = plain(1, diagnosis=sick.diagnosis, reading=reading)
    now = status([plain(0), alone])
    assert now.light == "red"
    assert f"recommended: lower the learning rate below its stability limit, {1e-3 / reading.stability:.2g}" in now.headline


def test_what_was_taken_back_is_not_recommended_again():
    found = Diagnosis(9, (Finding(Condition.SADDLE, 0.3, 0.01, "no progress"),))
    back = Event(3, "escape", "no progress", "stepped 0.1", "reverted", "worse")
    reading = healthy_reading()
    now = status([plain(4, events=(back,)), plain(9, diagnosis=found, reading=reading)])
    assert "escape was tried at step 3 and taken back" in now.headline


def test_a_treatment_that_is_in_force_is_neither_recommended_nor_said_to_have_been_taken_back():
    seen = "kappa_effective is 52.5, median of the last three"
    found = Diagnosis(950, (Finding(Condition.ILL_CONDITIONED, 52.5, 50.0, seen),))
    back, kept = Event(100, "kfac", seen, "switched", "reverted"), Event(800, "kfac", seen, "switched", "kept")
    run = [plain(100, events=(back,)), plain(850, events=(kept,), mode="kfac")]
    run.append(plain(950, diagnosis=found, reading=healthy_reading(), mode="kfac"))
    assert [a.step for a in status(run).alerts] == [800]
    assert "was tried at step 100" in status([run[0], replace(run[2], mode="base")]).headline
    assert "recommended: precondition" in status([*run[:2], replace(run[2], mode="base")]).headline


def healthy_reading():
    from adaptive_opt.records import Reading

    return Reading(step=9, loss=1.0, grad_norm=1.0, delta=2, lambda_min=-1.0, lambda_min_error=0.1)


def test_a_skipped_batch_is_red_then_amber_then_forgotten():
    event = Event(5, "rollback", "loss nan, gradient norm nan", "skipped this batch", "done")
    run = [plain(i, events=(event,) if i == 5 else (), loss=None if i == 5 else 1.0) for i in range(300)]
    assert [status(run[: i + 1]).light for i in (4, 5, 30, 250)] == ["green", "red", "amber", "green"]
    assert status(run[:6]).headline.startswith("NOT FINITE: loss nan")


def test_a_gate_that_refused_is_said_for_good():
    event = Event(5, "gate", "the replayed gradient does not reproduce", "switched off what needs a replay", "done")
    run = [plain(i, events=(event,) if i == 5 else ()) for i in range(500)]
    assert status(run).headline.startswith("NOTHING IS MEASURED: the replayed gradient")


def test_every_condition_and_every_treatment_of_the_rules_has_its_words():
    assert set(KINDS) == set(Condition) - {Condition.HEALTHY}
    assert all(rule.treatment in KINDS[rule.condition].treatments for rule in TABLE)


def test_a_verdict_takes_the_place_of_what_was_pending(reports):
    told = entries(reports)
    assert [(e.event.step, e.event.outcome, e.at) for e in told] == [(49, "kept", 50)]


def test_numbers_are_shown_with_their_error_and_none_is_said():
    assert number(0.012345, 0.00041) == "0.0123 ± 0.00041"
    assert number(457_000.0, 12_345.0) == "457,000 ± 1.2e4"
    assert number(None) == NOT_MEASURED
    assert all(word.says.endswith((".", ":")) for word in WORDS.values())


# ---- the terminal --------------------------------------------------------------------------------------------------------


def test_watch_prints_status_numbers_and_events(saddle, capsys):
    assert main(["watch", str(saddle), "--once", "--snapshot", "50"]) == 0
    shown = capsys.readouterr().out
    assert shown.startswith("[AMBER] saddle\nAT A SADDLE: at least 3 negative directions")
    assert "lambda_min        -1.3" in shown
    assert "Lipschitz, bound" in shown
    assert "- step 49: no progress" in shown
    assert max(map(len, shown.splitlines())) <= 120


def test_a_log_cannot_steer_the_terminal(tmp_path):
    event = Event(0, "rollback", "loss \x1b[2J\x1b]0;gone\x07", "skipped\r\n\x9b31m", "done")
    append(tmp_path, plain(0, events=(event,), mode="ba\x1bse"))
    shown = text(Run(tmp_path / "steps.jsonl").finish(), "na\x1bme")
    assert all(c.isprintable() or c == "\n" for c in shown)
    assert "loss ?[2J?]0;gone?" in shown


@pytest.mark.parametrize("command", ["watch", "dashboard"])
def test_what_is_not_there_is_said_and_not_raised(command, tmp_path, capsys):
    more = ["--export", str(tmp_path / "out.html")] if command == "dashboard" else []
    assert main([command, str(tmp_path / "nowhere"), *more]) == 1
    assert main([command, str(tmp_path), *more]) == 1
    append(tmp_path / "a", plain(0))
    assert main([command, str(tmp_path), "--run", "../a", *more]) == 1
    told = capsys.readouterr().err.splitlines()
    assert "no such folder" in told[0]
    assert "no run in" in told[1]
    assert "no run '../a'" in told[2]


def test_without_the_extra_the_library_imports_watch_works_and_the_dashboard_says_what_to_install(tmp_path):
    healthy_run(tmp_path, steps=3)
    code = (
        "import sys; sys.modules['dash'] = sys.modules['plotly'] = None\n"
        "import importlib.util as u; real = u.find_spec\n"
        "u.find_spec = lambda name, *a: None if name in ('dash', 'plotly') else real(name, *a)\n"
        "from adaptive_opt.__main__ import main; import adaptive_opt.dashboard as d\n"
        f"assert main(['watch', {str(tmp_path)!r}]) == 0\n"
        f"assert main(['dashboard', {str(tmp_path)!r}]) == 1\n"
        "try: d.figures\n"
        "except ImportError as error: print(error)"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "[GREEN]" in out.stdout
    assert 'pip install "adaptive-opt[dashboard]"' in out.stdout
    assert 'pip install "adaptive-opt[dashboard]"' in out.stderr

"""Optuna by ask and tell: the study goes on where it was stopped, and finds what is better."""

import sqlite3
import subprocess
import sys
from pathlib import Path

import pytest

from scripts.tune import space

ROOT = Path(__file__).resolve().parents[1]


def tune(folder, trials, *words):
    call = [sys.executable, "scripts/tune.py", "experiment=saddle", "steps=5", "--out", str(folder), "--trials", str(trials)]
    return subprocess.run([*call, *words], cwd=ROOT, capture_output=True, text=True)


def test_a_study_goes_on_where_it_was_stopped(tmp_path):
    pytest.importorskip("optuna")
    first = tune(tmp_path, 2)
    assert first.stdout.count("trial ") == 2, first.stderr
    marks = {path: path.stat().st_mtime_ns for path in tmp_path.glob("tune/*/*/metrics.json")}
    with sqlite3.connect(tmp_path / "tune.db") as db:  # as a killed process leaves its trial
        db.execute(
            "INSERT INTO trials (number, study_id, state, datetime_start) VALUES (2, 1, 'RUNNING', '2026-11-25 00:00:00')"
        )
    again = tune(tmp_path, 3, "--search", "base.lr=1e-3:1e-1:log")
    assert again.stdout.count("trial ") == 1, again.stderr
    assert "best of 3" in again.stdout
    assert all(path.stat().st_mtime_ns == mark for path, mark in marks.items())


@pytest.mark.parametrize("word", ["base.lr", "base.lr=1", "=1:2", "a=2:1", "a=0:1:log", "a=1:2:lin", "a=x:y"])
def test_a_space_that_is_none_is_quoted(word):
    with pytest.raises(ValueError, match=f"--search {word}:"):
        space(word)


def test_spaces_are_ranges_or_choices():
    assert space("base.lr=1e-4:1:log") == ("base.lr", (1e-4, 1.0, True))
    assert space("policy=base,rules") == ("policy", ["base", "rules"])

"""report.md and `compare`: what a run folder holds, in words; whatever is broken in it is said, and never a traceback."""

import json
import shutil

import pytest

from adaptive_opt.__main__ import main
from adaptive_opt.report import Unreadable, compare, report, summary
from tests.made_runs import healthy_run, saddle_run


@pytest.fixture(scope="module")
def saddle(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "saddle"
    saddle_run(folder)
    return folder


@pytest.fixture(scope="module")
def healthy(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "healthy"
    healthy_run(folder)
    return folder


@pytest.fixture
def copy(saddle, tmp_path):
    return shutil.copytree(saddle, tmp_path / "saddle")


def test_a_report_tells_the_treatments_and_their_verdicts_with_their_numbers(saddle):
    text = report(saddle)
    assert "**escape**" in text
    assert "kept: next batch's loss" in text
    assert "| lambda_min | -" in text
    assert "## Layers" in text


def test_a_healthy_run_is_reported_as_one(healthy):
    text = report(healthy)
    assert "HEALTHY" in text
    assert "None: there was no reason to." in text
    assert "4 full and 0 cheap readings" in text


def test_every_number_of_the_table_is_the_readings_own(healthy):
    s = summary(healthy)
    assert f"| epsilon | {s.readings[0].epsilon:.3g} |" in report(healthy)
    assert s.last("epsilon") == s.readings[-1].epsilon


def test_runs_side_by_side_show_where_they_differ(saddle, healthy, capsys):
    assert main(["compare", str(saddle), str(healthy)]) == 0
    out = capsys.readouterr().out
    assert "| task | Saddle | Digits |" in out
    assert "| treatments kept / taken back / done | 1 / 0 / 0 | 0 / 0 / 0 |" in out


def test_two_folders_of_one_name_stay_apart(saddle, copy):
    assert "| saddle (1) | saddle (2) |" in compare([summary(saddle), summary(copy)])


def test_what_is_written_can_be_read_again(copy, capsys, tmp_path):
    assert main(["report", str(copy)]) == 0
    assert (copy / "report.md").read_text() == report(copy)
    assert main(["compare", str(copy), "--out", str(tmp_path / "table.md")]) == 0
    assert (tmp_path / "table.md").read_text().strip() in capsys.readouterr().out


def test_a_half_written_line_is_left_out_and_a_broken_one_is_counted(copy):
    lines = (copy / "steps.jsonl").read_text().splitlines(keepends=True)
    (copy / "steps.jsonl").write_text("".join([*lines[:-2], "{broken}\n", lines[-1][:40]]))
    s = summary(copy)
    assert s.steps == len(lines) - 2
    assert any("1 lines of the file could not be read" in note for note in s.notes)


def test_an_unfinished_and_a_failed_run_are_called_so(copy):
    assert "not finished" in report(copy)
    (copy / "failed.txt").write_text("Traceback ...\nRuntimeError: out of memory\n")
    assert "the run failed: RuntimeError: out of memory" in report(copy)


def _without_lines(folder):
    (folder / "steps.jsonl").unlink()


def _older(folder):
    lines = (folder / "steps.jsonl").read_text().replace('{"schema": 1', '{"schema": 0')
    (folder / "steps.jsonl").write_text(lines)


def _older_run(folder):
    run = json.loads((folder / "run.json").read_text())
    (folder / "run.json").write_text(json.dumps({**run, "schema": 0}))


@pytest.mark.parametrize(
    ("damage", "why"),
    [
        (_without_lines, "no metrics.json, and no line in steps.jsonl"),
        (_older, "none of the 60 lines of steps.jsonl is one of schema 1"),
        (_older_run, "run.json has schema 0, and this version reads 1"),
        (shutil.rmtree, "no such folder"),
    ],
)
def test_what_cannot_be_used_is_skipped_with_the_reason(damage, why, copy, healthy, capsys):
    damage(copy)
    with pytest.raises(Unreadable, match=why):
        summary(copy)
    assert main(["compare", str(copy), str(healthy)]) == 0
    told = capsys.readouterr()
    assert why in told.err
    assert "| healthy |" in told.out
    assert main(["compare", str(copy)]) == 1
    assert main(["report", str(copy)]) == 1


@pytest.mark.parametrize("name", ["run.json", "metrics.json"])
@pytest.mark.parametrize("text", ["{", "[]", "\x00"])
def test_a_broken_json_file_is_noted_and_the_lines_are_used(name, text, copy):
    (copy / name).write_text(text)
    s = summary(copy)
    assert s.steps == 60
    assert any(name in note for note in s.notes)

"""Reading a run that is being written: every whole line once, nothing hostile, memory bounded, nothing outside the folder."""

import itertools
import json
import os
import sys
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st
from made_runs import append, healthy_run, plain, saddle_run

from adaptive_opt.dashboard import follower as follower_module
from adaptive_opt.dashboard.follower import Follower
from adaptive_opt.dashboard.run import Run
from adaptive_opt.dashboard.runs import Runs
from adaptive_opt.dashboard.sound import sound
from adaptive_opt.dashboard.tail import LONGEST, Tail, parse
from adaptive_opt.dashboard.thin import Even, Extremes
from adaptive_opt.telemetry import read_reports, to_json


@pytest.fixture(scope="module")
def saddle(tmp_path_factory):
    return saddle_run(tmp_path_factory.mktemp("runs") / "saddle")


def test_a_short_run_is_kept_whole(saddle):
    run = Run(saddle / "steps.jsonl").finish()
    assert list(run.reports) == list(read_reports(saddle))
    assert run.notes == ()


def test_lines_come_as_they_are_written_and_half_a_line_waits_for_its_other_half(tmp_path):
    append(tmp_path, plain(0), plain(1))
    run = Run(tmp_path / "steps.jsonl").finish()
    line = to_json(plain(2)) + "\n"
    for part in (line[:30], line[30:200]):
        with (tmp_path / "steps.jsonl").open("a") as file:
            file.write(part)
        assert not run.update()
    with (tmp_path / "steps.jsonl").open("a") as file:
        file.write(line[200:])
    assert run.update()
    assert [r.step for r in run.reports] == [0, 1, 2]
    assert run.tail.broken == 0


def test_a_run_that_crashed_in_the_middle_of_a_line_and_went_on_loses_only_that_line(tmp_path):
    append(tmp_path, plain(0))
    with (tmp_path / "steps.jsonl").open("a") as file:
        file.write(to_json(plain(1))[:100])
    append(tmp_path, plain(1), plain(2))
    run = Run(tmp_path / "steps.jsonl").finish()
    assert [r.step for r in run.reports] == [0, 1, 2]
    assert run.tail.broken == 1


@pytest.mark.parametrize("content", [[plain(0)], [plain(i, loss=9.0) for i in range(8)]], ids=["shorter", "longer"])
def test_a_file_that_begins_anew_is_read_anew(tmp_path, content):
    append(tmp_path, *map(plain, range(5)))
    run = Run(tmp_path / "steps.jsonl").finish()
    (tmp_path / "steps.jsonl").unlink() if len(content) > 5 else (tmp_path / "steps.jsonl").write_text("")
    append(tmp_path, *content)
    run.finish()
    assert list(run.reports) == content
    assert any("anew" in note for note in run.notes)


def test_a_resumed_run_takes_the_place_of_the_steps_that_it_takes_again(tmp_path):
    append(tmp_path, *map(plain, range(700)))
    again = [plain(i, loss=7.0) for i in range(500, 520)]
    append(tmp_path, *again)
    run = Run(tmp_path / "steps.jsonl").finish()
    assert run.reports[-1] == again[-1]
    assert [r.step for r in run.reports] == list(range(520))
    assert run.notes == ("resumed at step 500: steps 500 to 699 of before are left out",)


HOSTILE = {
    "text for a step": {"step": "1"},
    "text for a loss": {"loss": "<script>alert(1)</script>"},
    "a truth for a number": {"lr": True},
    "a step beyond 2^53": {"step": 2**60},
    "a negative step": {"step": -1},
    "an endless number": {"lr": 1e999},
    "a list for a mode": {"mode": ["base"]},
    "half a character": {"mode": "\ud800"},
    "events that are none": {"events": [{"step": 1, "name": 2, "seen": 3, "done": 4}]},
    "a field that is not there": {"surprise": 1},
    "a reading of nothing": {"reading": {"layers": [], "ritz_values": [], "ritz_weights": [], "notes": []}},
    "text of a million letters": {"mode": "x" * 100_000},
}


@pytest.mark.parametrize("change", HOSTILE.values(), ids=HOSTILE)
def test_a_hostile_line_is_counted_and_passed_over(tmp_path, change):
    line = json.dumps({**json.loads(to_json(plain(1))), **change})
    append(tmp_path, plain(0))
    with (tmp_path / "steps.jsonl").open("a") as file:
        file.write(line + "\n")
    append(tmp_path, plain(2))
    run = Run(tmp_path / "steps.jsonl").finish()
    assert [r.step for r in run.reports] == [0, 2]
    assert run.notes == ("1 lines of the file could not be read and are left out",)


@pytest.mark.parametrize("raw", [b"\xff\xfe\n", b"[" * 100_000 + b"\n", b'{"schema": 1}\n', b"9" * 5000 + b"\n", b"null\n"])
def test_a_line_of_anything_is_counted_and_passed_over(tmp_path, raw):
    (tmp_path / "steps.jsonl").write_bytes(raw)
    append(tmp_path, plain(0))
    run = Run(tmp_path / "steps.jsonl").finish()
    assert [r.step for r in run.reports] == [0]
    assert run.tail.broken == 1


@given(st.binary(max_size=300))
def test_no_bytes_at_all_raise_anything(raw):
    assert parse(raw) is None or sound(parse(raw))


def test_a_line_that_never_ends_is_not_held_in_memory(tmp_path):
    (tmp_path / "steps.jsonl").write_bytes(b"x" * (3 * LONGEST))
    tail = Tail(tmp_path / "steps.jsonl")
    assert list(tail.look(60)) == []
    assert len(tail._rest) <= LONGEST
    with (tmp_path / "steps.jsonl").open("a") as file:
        file.write("\n" + to_json(plain(0)) + "\n")
    assert [line.report.step for line in tail.look(60) if line] == [0]
    assert tail.broken == 1


def test_a_pipe_in_the_place_of_the_file_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "steps.jsonl")
    assert Run(tmp_path / "steps.jsonl").finish().reports == ()


def test_of_a_long_run_a_bounded_number_is_kept_with_its_extremes_its_readings_and_its_events(tmp_path, saddle):
    template = next(r for r in read_reports(saddle) if r.reading is not None and r.reading.kind == "full")
    reports = [plain(i, loss=1.0) for i in range(12_000)]
    reports[6_789] = plain(6_789, loss=77.0)
    for i in range(0, 12_000, 20):
        reports[i] = plain(i, reading=template.reading)
    append(tmp_path, *reports)
    run = Run(tmp_path / "steps.jsonl").finish()
    kept = run.reports
    assert len(kept) < 5_000
    assert max(r.loss for r in kept) == 77.0  # no peak is lost
    assert list(kept[-512:]) == reports[-512:]
    steps = [r.step for r in kept if r.reading is not None]
    assert 125 <= len(steps) <= 290
    assert max(b - a for a, b in itertools.pairwise(steps)) <= 120  # spread over the whole run


def test_kept_bytes_are_bounded_whatever_the_lines_are():
    kept = Even(500, 1000)
    for i in range(10_000):
        kept.add(plain(i), 300)
    assert kept.bytes <= 1000
    assert len(kept.kept) >= 2


@given(st.lists(st.one_of(st.none(), st.floats(-1e6, 1e6)), min_size=1, max_size=300))
def test_thinning_by_extremes_keeps_the_lowest_and_the_highest_loss(losses):
    course = Extremes(8)
    for i, loss in enumerate(losses):
        course.add(plain(i, loss=loss))
    known = [x for x in losses if x is not None]
    kept = [r.loss for r in course.reports() if r.loss is not None]
    assert len(course.buckets) <= 9
    assert not known or (min(kept), max(kept)) == (min(known), max(known))


def test_a_look_back_ends_at_its_step(saddle):
    assert [r.step for r in Run(saddle / "steps.jsonl", until=30).finish().reports] == list(range(31))


# ---- folders -----------------------------------------------------------------------------------------------------------


def test_runs_are_found_below_a_folder_and_called_by_their_paths(tmp_path):
    for name in ("a", "sweep/0", "sweep/1", "<script>alert(1)</script>"):
        append(tmp_path / name, plain(0))
    runs = Runs(tmp_path)
    assert sorted(runs.names()) == sorted(["a", "sweep/0", "sweep/1", "<script>alert(1)</script>"])
    append(tmp_path, plain(0))
    assert "." in runs.names()
    assert runs.label(".") == tmp_path.name


@pytest.mark.parametrize("name", ["../secret", "/etc", "a/../../secret", "..", "a\0", "", None, 3, ["a"]])
def test_no_name_leads_out_of_the_folder(tmp_path, name):
    append(tmp_path / "secret", plain(0))
    append(tmp_path / "runs" / "a", plain(0))
    runs = Runs(tmp_path / "runs")
    with pytest.raises(ValueError, match="no run"):
        runs.path(name)
    follower = Follower(runs)
    try:
        with pytest.raises(ValueError, match="no run"):
            follower.get(name)
    finally:
        follower.close()


@pytest.mark.skipif(sys.platform == "win32", reason="links need rights there")
def test_a_link_out_of_the_folder_is_not_followed(tmp_path):
    append(tmp_path / "secret", plain(0))
    (tmp_path / "runs" / "a").mkdir(parents=True)
    (tmp_path / "runs" / "a" / "steps.jsonl").symlink_to(tmp_path / "secret" / "steps.jsonl")
    (tmp_path / "runs" / "b").symlink_to(tmp_path / "secret")
    assert Runs(tmp_path / "runs").names() == []
    assert Run(tmp_path / "runs" / "a" / "steps.jsonl").finish().reports == ()


def test_the_background_reads_what_is_asked_for(tmp_path):
    healthy_run(tmp_path / "a", steps=3)
    follower = Follower(Runs(tmp_path))
    try:
        run = follower.get("a")
        while run.tail.behind or run.last is None:
            pass
        assert run.last.step == 2
    finally:
        follower.close()


def test_a_long_file_waits_while_a_page_is_opened_and_a_short_one_does_not(tmp_path, monkeypatch):
    monkeypatch.setattr(follower_module, "CALM", 1e6)
    append(tmp_path / "short", plain(0))
    append(tmp_path / "long", plain(0))
    with (tmp_path / "long" / "steps.jsonl").open("a") as file:  # sparse: more than can be read in the first look
        file.truncate(1 << 34)
    follower = Follower(Runs(tmp_path))
    try:
        long = follower.get("long")
        while not long.tail.left:
            pass
        follower.opened()
        before = -1
        while before != long.tail.offset:  # the look that was going on comes to its end
            before = long.tail.offset
            time.sleep(0.3)
        short = follower.get("short")
        while short.last is None:
            pass
        assert long.tail.offset == before < long.tail.size
        monkeypatch.setattr(follower_module, "CALM", 0.0)
        while long.tail.offset == before:
            pass
    finally:
        follower.close()

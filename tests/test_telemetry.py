"""Telemetry: a report comes back from its line as it was; a broken line is nobody's problem."""

import json
import math
import subprocess
import sys
from dataclasses import replace

import pytest
from problems import make
from torch.optim import AdamW

from adaptive_opt import AdaptiveOptimizer, LanczosProbe
from adaptive_opt.records import Condition, Decision, Diagnosis, Event, Finding, LayerReading, Reading, StepReport
from adaptive_opt.telemetry import ConsoleSink, JsonlSink, from_json, read_reports, to_json

FULL = StepReport(
    step=3,
    loss=1.5,
    grad_norm=0.1,
    lr=1e-3,
    lr_scale=0.5,
    mode="kfac",
    stepped=True,
    reading=Reading(
        step=3,
        loss=1.5,
        grad_norm=0.1,
        kappa=7.0,
        delta=2,
        ritz_values=(-1.0, 2.0),
        layers=(LayerReading("a", 1, 0, 1, 0, None),),
    ),
    diagnosis=Diagnosis(3, (Finding(Condition.UNSTABLE, 3.0, 2.0, "seen"),)),
    decision=Decision("kfac", ("damp",), ("why",), "seen", "progress"),
    events=(Event(3, "damp", "seen", "done", "kept", "loss 2 -> 1"),),
    probe_cost=4.5,
)


def trained(tmp_path, steps=12, **kwargs):
    problem = make("mlp", steps)
    optimizer = AdaptiveOptimizer(
        AdamW(problem.model.parameters()),
        problem.model,
        loss_fn=problem.criterion,
        probe=LanczosProbe(every=4),
        sinks=[JsonlSink(tmp_path, {"task": "mlp"}, seed=0)],
        **kwargs,
    )
    for x, y in problem.batches:
        optimizer.zero_grad()
        problem.criterion(problem.model(x), y).backward()
        optimizer.step()
    return optimizer


def test_a_report_comes_back_from_its_line_as_it_was():
    assert from_json(to_json(FULL)) == FULL


def test_a_line_of_before_there_were_limits_is_read():
    written = json.loads(to_json(replace(FULL, lr_limit=0.1, lr_limit_age=7)))
    assert (written.pop("lr_limit"), written.pop("lr_limit_age")) == (0.1, 7)
    assert from_json(json.dumps(written)) == FULL


def test_nan_and_infinity_are_null_on_the_line():
    line = to_json(StepReport(0, math.nan, math.inf, 1.0, 1.0, "base", stepped=False))
    assert json.loads(line)["loss"] is None
    assert "NaN" not in line
    assert "Infinity" not in line


def test_every_step_of_a_run_is_one_line_and_run_json_says_what_it_was(tmp_path):
    optimizer = trained(tmp_path)
    reports = list(read_reports(tmp_path))
    assert [r.step for r in reports] == list(range(12))
    assert reports[-1] == optimizer.report
    assert [r.step for r in reports if r.reading is not None] == [0, 4, 8]
    run = json.loads((tmp_path / "run.json").read_text())
    assert run["config"] == {"task": "mlp"}
    assert run["seed"] == 0
    assert run["versions"]["torch"]
    assert set(run) >= {"git", "command", "started", "schema"}


def test_lines_are_there_while_training_goes_on_and_half_a_line_is_passed_over(tmp_path):
    trained(tmp_path)
    with (tmp_path / "steps.jsonl").open("a") as file:
        file.write('{"schema": 1, "step": 12, "lo')
    assert len(list(read_reports(tmp_path))) == 12


@pytest.mark.parametrize("line", ["", "{}", "[]", "null", '{"schema": 99}', '{"schema": 1}', "<script>"])
def test_a_broken_line_is_refused_with_the_reason(line):
    with pytest.raises(ValueError, match="not a StepReport line"):
        from_json(line)


def test_the_console_prints_events_and_numbers_every_n_steps():
    lines = []
    sink = ConsoleSink(every=3, write=lines.append)
    sink(FULL)
    assert lines[0] == "step 3: seen; done -> kept: loss 2 -> 1"
    assert lines[1].startswith("step 3  mode kfac  lr 0.0005  loss 1.5")
    with pytest.raises(ValueError, match="every=0"):
        ConsoleSink(every=0)


def test_tensorboard_gets_the_numbers(tmp_path):
    # in a process of its own: importing tensorboard raises deprecation warnings that are not ours
    code = (
        "import sys; sys.path.insert(0, 'tests'); from test_telemetry import FULL\n"
        "from adaptive_opt.telemetry import TensorBoardSink\n"
        f"s = TensorBoardSink({str(tmp_path)!r}); s(FULL); s.close()\n"
        "from tensorboard.backend.event_processing.event_accumulator import EventAccumulator\n"
        f"e = EventAccumulator({str(tmp_path)!r}); e.Reload(); print(sorted(e.Tags()['scalars']))"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert "'reading/kappa'" in out
    assert "'train/loss'" in out

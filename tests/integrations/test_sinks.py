"""W&B (offline), MLflow (its local stores) and Python's logging receive what happened in a real run."""

import logging
from pathlib import Path

import pytest
from problems import BASES, make

from adaptive_opt import AdaptiveOptimizer, LanczosProbe, RulePolicy
from adaptive_opt.telemetry import LoggingSink, MlflowSink, WandbSink, scalars


def train(sink):
    """A run with readings and a broken batch; returns its reports."""
    problem, reports = make("mlp", 12), []
    optimizer = AdaptiveOptimizer(
        BASES["sgd"](problem.model.parameters()),
        problem.model,
        loss_fn=problem.criterion,
        probe=LanczosProbe(every=4, num_steps=3),
        policy=RulePolicy(),
        sinks=[sink, reports.append],
    )
    for n, (x, y) in enumerate(problem.batches):
        optimizer.zero_grad()
        problem.criterion(problem.model(x if n != 6 else x * float("nan")), y).backward()
        optimizer.step()
    assert sum(r.reading is not None for r in reports) >= 2
    assert any(r.events for r in reports)
    return reports


def test_wandb_offline(tmp_path, monkeypatch):
    wandb = pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_SILENT", "true")
    run = wandb.init(mode="offline", dir=tmp_path, project="adaptive")
    reports = train(WandbSink(run))
    summary = dict(run.summary)
    run.finish()
    last = [r for r in reports if r.reading is not None][-1]
    assert summary["adaptive/reading/stability"] == pytest.approx(last.reading.stability)
    assert summary["adaptive/step"] == reports[-1].step
    assert "skipped this batch" in summary["adaptive/events"]
    assert list(Path(tmp_path).rglob("*.wandb"))


def test_mlflow_local_store(tmp_path, monkeypatch):
    mlflow = pytest.importorskip("mlflow")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")  # all that mlflow-skinny has without a data base
    client = mlflow.tracking.MlflowClient(tracking_uri=f"file:{tmp_path / 'mlruns'}")
    run = client.create_run(client.create_experiment("adaptive"))
    reports = train(MlflowSink(run.info.run_id, every=1, client=client))
    saved = client.get_metric_history(run.info.run_id, "adaptive/reading/stability")
    assert [(m.step, m.value) for m in saved] == [(r.step, r.reading.stability) for r in reports if r.reading is not None]
    losses = client.get_metric_history(run.info.run_id, "adaptive/train/lr_effective")
    assert len(losses) == len(reports)
    tags = client.get_run(run.info.run_id).data.tags
    assert any("skipped this batch" in text for name, text in tags.items() if name.startswith("adaptive.event.6"))


def test_python_logging(caplog):
    with caplog.at_level(logging.INFO, logger="adaptive_opt"):
        reports = train(LoggingSink(every=6))
    told = [r.report.step for r in caplog.records if r.name == "adaptive_opt.steps"]
    assert told == [r.step for r in reports if r.reading is not None or r.step % 6 == 0]
    assert sum("skipped this batch" in r.getMessage() for r in caplog.records) == 1


def test_scalars_leave_out_what_is_unknown():
    report = train(lambda _: None)[0]
    assert scalars(report)["train/loss"] == report.loss
    assert all(value is not None for value in scalars(report).values())


@pytest.mark.parametrize("make_sink", [lambda: LoggingSink(every=0), lambda: MlflowSink("x", every=0)])
def test_bad_intervals_are_refused(make_sink):
    with pytest.raises(ValueError, match="every=0"):
        make_sink()

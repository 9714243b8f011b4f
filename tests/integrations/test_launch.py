"""A Hydra job starts its own ranks; torchrun around it is refused; submitit's local executor runs a sweep."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
TRAIN = str(ROOT / "experiments" / "train.py")
ENV = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "PYTHONWARNINGS": "ignore"}
SHORT = ["task=digits", "steps=30", "telemetry.console=false", "policy=rules", "probe=every", "schedule=constant"]


def called(command, cwd, timeout=400):
    return subprocess.run(command, cwd=cwd, env=ENV, capture_output=True, text=True, timeout=timeout)


def numbers(folder):
    steps = [json.loads(line) for line in (folder / "steps.jsonl").read_text().splitlines()]
    return json.loads((folder / "metrics.json").read_text()), [s["reading"] for s in steps if s.get("reading")]


def test_a_job_of_two_ranks_trains_as_one_process(tmp_path):
    for nproc in (1, 2):
        done = called(
            [sys.executable, TRAIN, *SHORT, f"trainer.nproc={nproc}", f"hydra.run.dir={tmp_path / str(nproc)}"], tmp_path
        )
        assert done.returncode == 0, done.stderr
    (one, read), (two, read_by_two) = (numbers(tmp_path / n) for n in ("1", "2"))
    assert two["final_loss"] == pytest.approx(one["final_loss"], rel=1e-3)
    assert two["test_loss"] == pytest.approx(one["test_loss"], rel=1e-3)
    assert [r["batch_size"] for r in read_by_two] == [r["batch_size"] for r in read]
    assert read_by_two[0]["lambda_max"] == pytest.approx(read[0]["lambda_max"], rel=1e-3)


def test_a_rank_that_fails_fails_the_job(tmp_path):
    done = called(
        [sys.executable, TRAIN, *SHORT, "task.batch_size=63", "trainer.nproc=2", f"hydra.run.dir={tmp_path}"], tmp_path
    )
    assert done.returncode != 0
    assert "trainer.nproc=2: a batch of 63 cannot be dealt out evenly" in done.stderr + done.stdout


def test_torchrun_around_a_sweep_is_refused(tmp_path):
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    done = called([*torchrun, TRAIN, "-m", "seed=0,1", f"hydra.sweep.dir={tmp_path / 'sweep'}"], tmp_path)
    assert done.returncode != 0
    assert "every rank would run Hydra as a whole, with -m the whole sweep" in done.stderr
    assert "-m seed=0,1" in done.stderr
    assert "trainer.nproc=2" in done.stderr
    assert not (tmp_path / "sweep").exists()


def test_a_sweep_by_submitit_on_this_machine(tmp_path):
    """What SLURM would be given, run by submitit's local executor; each job starts two ranks."""
    sweep = ["hydra/launcher=local", "seed=0,1", "trainer.nproc=2", f"hydra.sweep.dir={tmp_path}"]
    done = called([sys.executable, TRAIN, "-m", *SHORT[:-1], *sweep], tmp_path, timeout=500)
    assert done.returncode == 0, done.stderr
    found = sorted(tmp_path.rglob("metrics.json"))
    assert len(found) == 2
    assert all(json.loads(path.read_text())["steps"] == 30 for path in found)

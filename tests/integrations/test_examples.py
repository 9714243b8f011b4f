"""README's examples for the frameworks: at most 15 lines each, and they run."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

ROOT = Path(__file__).resolve().parents[2]
SAID = {  # what each shows of a reading
    "with_huggingface.py": "adaptive/sigma_rms/classifier",
    "with_accelerate.py": "Reading(step=",
    "with_lightning.py": "",
}


@pytest.mark.parametrize("name", SAID)
def test_an_example_is_short_and_runs(name, tmp_path):
    path = ROOT / "experiments" / name
    assert len([line for line in path.read_text().splitlines() if line.strip()]) <= 15
    env = {**os.environ, "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run([sys.executable, path], cwd=tmp_path, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert SAID[name] in done.stdout
    if name == "with_lightning.py":
        log = EventAccumulator(str(next(tmp_path.rglob("events.out*")).parent)).Reload()
        assert any(tag.startswith("adaptive/") for tag in log.Tags()["scalars"])


@pytest.mark.slow
def test_a_real_transformer_is_fine_tuned_probed_and_resumed():
    """scripts/finetune_minilm.py: 22.7M parameters, 20 steps, within 10 minutes and 6 GiB on 2 cores."""
    script = ROOT / "scripts" / "finetune_minilm.py"
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, timeout=1800)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "the very same bits" in done.stdout
    whole = next(line for line in done.stdout.splitlines() if line.startswith("whole"))
    seconds, peak = float(whole.split(" s,")[0].split()[-1]), float(whole.split("peak memory ")[1].split()[0])
    assert seconds < 600
    assert peak < 6
    assert done.stdout.count("lambda_max") >= 4  # two readings at least of either run

"""A long run in which everything breaks now and then: no error of ours, every parameter finite, exact resumption."""

import random
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from soaking import BASES, FAULTS, STYLES, soak

HERE = Path(__file__).parent
COMBINATIONS = [(style, base) for style in STYLES for base in BASES]


def killed_and_resumed(folder, style, base, steps, kills, **options):
    """The log of a run whose process is killed at these steps, each time started again; the last part runs here."""
    for step in kills:
        arguments = {"style": style, "base": base, "steps": steps, "die-at": step, **options}
        words = [str(word) for name, value in arguments.items() for word in (f"--{name}", value)]
        program = [sys.executable, str(HERE / "soaking.py"), str(folder), *words]
        done = subprocess.run(program, capture_output=True, text=True)
        assert done.returncode == -signal.SIGKILL, done.stderr
    soak(folder, base, style, steps=steps, **options)
    return (folder / "log").read_text()


@pytest.mark.parametrize(("style", "base"), [("closure", "adamw"), ("capture", "momentum"), ("objective", "adamw")])
def test_faults_at_random_steps_leave_every_parameter_finite(tmp_path, style, base):
    run = soak(tmp_path, base, style, rate=0.15, steps=200)
    lines = (tmp_path / "log").read_text().splitlines()
    assert set(run.faults) == set(FAULTS)  # each kind was there
    assert len(lines) == 200
    assert not [line for line in lines if line.endswith("NOT FINITE")]


def test_a_killed_run_goes_on_bit_for_bit(tmp_path):
    soak(tmp_path / "whole", "adamw", "capture", rate=0.15, steps=120, every=20)
    parts = killed_and_resumed(
        tmp_path / "parts", "capture", "adamw", 120, [random.Random(0).randrange(30, 90)], rate=0.15, every=20
    )
    assert parts == (tmp_path / "whole" / "log").read_text()


@pytest.mark.slow
@pytest.mark.parametrize(("style", "base"), COMBINATIONS)
def test_ten_thousand_steps(tmp_path, style, base):
    run = soak(tmp_path / "whole", base, style)
    lines = (tmp_path / "whole" / "log").read_text().splitlines()
    assert len(lines) == 10_000
    assert not [line for line in lines if line.endswith("NOT FINITE")]
    assert sum(run.faults.values()) > 400
    kills = sorted(random.Random(f"{style} {base}").sample(range(200, 10_000), 3))
    assert killed_and_resumed(tmp_path / "parts", style, base, 10_000, kills) == "\n".join(lines) + "\n"


@pytest.mark.slow
@pytest.mark.parametrize("base", BASES)
def test_parameters_stay_finite_when_every_third_step_is_broken(tmp_path, base):
    soak(tmp_path, base, "capture", rate=0.33, steps=3000)
    lines = (tmp_path / "log").read_text().splitlines()
    assert not [line for line in lines if line.endswith("NOT FINITE")]

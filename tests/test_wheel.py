"""The installed wheel has the library and, under a name of their own, the experiments with their configs."""

import json
import os
import site
import subprocess
import sys
import zipfile
from importlib.metadata import version
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
pytestmark = pytest.mark.slow  # builds and installs a wheel


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    if int(version("setuptools").split(".")[0]) < 77:
        pytest.skip("building needs setuptools 77")
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"  # a build leaves folders behind
    words = ["git", "ls-files", "-co", "--exclude-standard", "-z"]
    for name in subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=True).stdout.split("\0"):
        if name and (ROOT / name).is_file():
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            (source / name).write_bytes((ROOT / name).read_bytes())
    build = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "-q", "-w", str(folder), str(source)]
    subprocess.run(build, check=True, capture_output=True, text=True)
    return next(folder.glob("*.whl"))


@pytest.fixture(scope="module")
def python(wheel, tmp_path_factory):
    """The interpreter of an environment with the wheel, which finds the dependencies where this one has them."""
    folder = tmp_path_factory.mktemp("venv")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(folder)], check=True)
    packages = next((folder / "lib").glob("python*")) / "site-packages"
    with zipfile.ZipFile(wheel) as archive:  # what installing a pure wheel is
        archive.extractall(packages)
    (packages / "dependencies.pth").write_text("\n".join(site.getsitepackages()))
    return folder / "bin" / "python"


def run(python, *words, cwd):
    env = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    return subprocess.run([str(python), *map(str, words)], cwd=cwd, env=env, capture_output=True, text=True)


def test_every_module_and_config_is_in_the_wheel(wheel):
    names = set(zipfile.ZipFile(wheel).namelist())
    for folder, there in (("adaptive_opt", "adaptive_opt"), ("experiments", "adaptive_opt_experiments"),
                          ("configs", "adaptive_opt_experiments/configs")):  # fmt: skip
        for path in (ROOT / folder).rglob("*"):
            if path.suffix in (".py", ".yaml", ".css", ".js") or path.name == "py.typed":
                assert f"{there}/{path.relative_to(ROOT / folder).as_posix()}" in names
    assert not any(name.split("/")[0] in ("experiments", "configs", "tests", "scripts") for name in names)


def test_the_library_comes_from_the_wheel_and_knows_no_hydra(python, tmp_path):
    code = "import sys, adaptive_opt; adaptive_opt.AdaptiveOptimizer; print(adaptive_opt.__file__, 'hydra' in sys.modules)"
    out = run(python, "-c", code, cwd=tmp_path).stdout.split()
    assert str(python.parents[1]) in out[0]
    assert out[1] == "False"


def test_experiments_run_from_the_wheel_and_can_be_compared(python, tmp_path):
    done = run(python, "-m", "adaptive_opt_experiments", "experiment=saddle", "steps=2", "hydra.run.dir=one", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "one" / "metrics.json").read_text())["steps"] == 2
    words = ["-m", "adaptive_opt_experiments", "-m", "seed=0,1", "steps=2", "hydra/launcher=basic", "hydra.sweep.dir=sweep"]
    assert run(python, *words, cwd=tmp_path).returncode == 0
    runs = sorted((tmp_path / "sweep").glob("*/"))
    runs = [folder for folder in runs if (folder / "metrics.json").exists()]
    assert len(runs) == 2
    out = run(python, "-m", "adaptive_opt", "compare", *runs, cwd=tmp_path)
    assert "| seed | 0 | 1 |" in out.stdout


def test_an_unknown_name_is_answered_from_the_wheel_too(python, tmp_path):
    done = run(python, "-m", "adaptive_opt_experiments", "task=digit", cwd=tmp_path)
    assert done.returncode == 1
    assert "did you mean task=digits?" in done.stderr

"""The public names: all there, whatever is imported first; and whoever only reads runs does not load torch."""

import subprocess
import sys
from pathlib import Path

import pytest
from made_runs import append, plain

import adaptive_opt

ROOT = Path(__file__).resolve().parents[1]


def fresh(code):
    """What a new interpreter prints."""
    out = subprocess.run([sys.executable, "-W", "error", "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    return out.stdout


def test_every_public_name_is_there_and_listed():
    for name in adaptive_opt.__all__:
        assert getattr(adaptive_opt, name).__module__.startswith("adaptive_opt."), name
    assert set(adaptive_opt.__all__) <= set(dir(adaptive_opt))
    with pytest.raises(AttributeError, match="module 'adaptive_opt' has no attribute 'AdaptiveOptimiser'"):
        adaptive_opt.AdaptiveOptimiser  # noqa: B018


ORDERS = {
    "the name alone": "import adaptive_opt as a",
    "its file first": "import adaptive_opt.checkup; import adaptive_opt as a",
    "from its file": "from adaptive_opt.checkup import checkup as c; import adaptive_opt as a; assert a.checkup is c",
    "the name, then its file": "import adaptive_opt as a; a.checkup; import adaptive_opt.checkup",
    "its file by import_module": "import importlib, adaptive_opt as a; importlib.import_module('adaptive_opt.checkup')",
    "its command first": "import adaptive_opt.commands.checkup; import adaptive_opt as a",
    "with a star": "from adaptive_opt import *; import adaptive_opt as a; assert a.checkup is checkup",
}


def test_checkup_is_the_function_in_every_order_of_imports():
    code = (
        f"import sys\nfor name, order in {ORDERS!r}.items():\n"
        "    for m in [m for m in sys.modules if m.partition('.')[0] == 'adaptive_opt']: del sys.modules[m]\n"
        "    exec(order, scope := {})\n"
        "    from adaptive_opt import checkup\n"
        "    print(name, scope['a'].checkup is checkup and type(checkup).__name__ == 'function', sep=': ')\n"
        "import adaptive_opt; print(adaptive_opt.curvature.lanczos.__name__)"  # a room, without being imported by name
    )
    assert fresh(code).splitlines() == [*(f"{name}: True" for name in ORDERS), "lanczos"]


def test_reading_and_showing_a_run_loads_no_torch(tmp_path):
    append(tmp_path, plain(0), plain(1))
    code = (
        "import sys; from adaptive_opt.__main__ import main\n"
        "import adaptive_opt.dashboard.page, adaptive_opt.dashboard.server, adaptive_opt.telemetry\n"
        f"assert main(['watch', {str(tmp_path)!r}]) == 0\n"
        f"assert main(['dashboard', {str(tmp_path)!r}, '--export', {str(tmp_path / 'out.html')!r}]) == 0\n"
        "print('torch' in sys.modules)"
    )
    assert fresh(code).endswith("False\n")
    assert (tmp_path / "out.html").stat().st_size > 1e6

"""Imports run one way (docs/design.md), and the library knows nothing of Hydra or of the experiments."""

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[1] / "adaptive_opt"
DESIGN = PACKAGE.parent / "docs" / "design.md"
ROOMS = {  # room -> what it may import of ours, besides itself
    "records": set(),
    "curvature": set(),
    "sharded": {"curvature"},
    "parallel": {"curvature", "sharded"},
    "moving": set(),
    "capture": {"moving", "parallel", "sharded"},
    "notice": set(),
    "objective": {"capture", "curvature", "parallel", "sharded"},
    "family": set(),
    "metric": {"curvature", "family"},
    "ahead": {"curvature", "metric", "objective"},
    "length": {"curvature", "sharded"},
    "agreement": {"curvature"},
    "layers": {"curvature", "parallel", "records"},
    "lipschitz": {"curvature", "layers", "parallel"},
    "clock": set(),
    "memory": {"clock"},
    "schedule": {"memory", "records"},
    "spectra": {"curvature", "memory", "metric", "records"},
    "probe": {
        "ahead", "curvature", "layers", "lipschitz", "memory", "metric", "objective", "parallel", "records", "schedule",
        "spectra",
    },
    "signals": {"records"},
    "diagnosis": {"records"},
    "policy": {"records"},
    "policies": {"policy", "records"},
    "stays": {"records"},
    "validation": {"capture", "clock", "objective", "probe", "records"},
    "verify": {"interventions", "objective", "records"},
    "gate": {"capture", "curvature", "modes", "objective", "parallel"},
    "modes": {"capture", "curvature", "family", "objective", "parallel", "records", "sharded"},
    "interventions": {"family", "metric", "modes", "objective", "records", "curvature", "probe", "sharded", "signals"},
    "checkpoint": {"interventions", "length", "modes", "records", "sharded", "verify"},
    "controller": {
        "agreement", "capture", "checkpoint", "curvature", "diagnosis", "gate", "interventions", "layers", "length", "memory",
        "modes", "notice", "objective", "parallel", "policy", "probe", "records", "signals", "stays", "validation", "verify",
    },
    "optimizer": {
        "capture", "controller", "interventions", "modes", "notice", "parallel", "policy", "probe", "records", "sharded",
    },
    "checkup": {"capture", "memory", "objective", "probe", "records"},
    "commands": {"checkup", "curvature", "dashboard", "page", "report", "telemetry", "verdict"},
    "report": {"dashboard", "records", "telemetry"},
    "verdict": {"records"},
    "page": {"records", "verdict"},
    "__main__": {"commands"},
    "telemetry": {"records"},
    "integrations": {"optimizer", "records", "telemetry"},
    "dashboard": {"diagnosis", "records", "signals", "telemetry"},
}  # fmt: skip
FILES = [p for p in PACKAGE.rglob("*.py") if p != PACKAGE / "__init__.py"]


def room_of(path):
    first = path.relative_to(PACKAGE).parts[0]
    return first.removesuffix(".py")


def imports(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module == "adaptive_opt":
            yield from (f"adaptive_opt.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_run_one_way(path):
    room = room_of(path)
    for name in imports(path):
        assert name.split(".")[0] not in ("hydra", "omegaconf", "experiments", "scripts", "tests"), name
        if name.startswith("adaptive_opt."):
            other = name.split(".")[1]
            assert other == room or other in ROOMS[room], f"{room} imports {other}"


def test_every_room_is_on_the_map():
    assert {room_of(p) for p in FILES} == set(ROOMS)


def test_the_table_in_the_docs_is_this_one():
    rows = [line.split("|") for line in DESIGN.read_text().splitlines() if line.startswith("| `")]
    table = {row[1].strip(" `"): {name.strip() for name in row[3].split(",")} - {""} for row in rows}
    assert table == ROOMS

"""docs/contracts.md names a test for every demand: they exist."""

import ast
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
NAMED = re.findall(r"`([\w/]+\.py)::(\w+)`", (ROOT / "docs" / "contracts.md").read_text())


def test_every_test_that_the_page_names_exists():
    assert len(NAMED) > 60
    for file in {file for file, _ in NAMED}:
        tree = ast.parse((ROOT / "tests" / file).read_text())
        there = {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}
        assert {name for f, name in NAMED if f == file} <= there, file


def test_every_line_of_the_contract_is_there():
    lines = re.findall(r"^\| (\d+) \|", (ROOT / "docs" / "contracts.md").read_text(), re.MULTILINE)
    assert lines == [str(n) for n in range(1, 23)]

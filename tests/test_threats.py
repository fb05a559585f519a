"""docs/threats.md promises a test for every rule: they are there."""

from __future__ import annotations

import ast
import re
from pathlib import Path

ROOT = Path(__file__).parent.parent
ROWS = dict(re.findall(r"^\| (R\d+) \| .* \| (.*) \|$", (ROOT / "docs" / "threats.md").read_text(), re.MULTILINE))


def test_every_rule_has_tests_that_exist() -> None:
    assert list(ROWS) == [f"R{number}" for number in range(8, 23)]
    for rule, cell in ROWS.items():
        named = re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", cell)
        assert named, rule
        for path, name in named:
            tree = ast.parse((ROOT / path).read_text())
            assert name in {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}, f"{path}::{name}"

"""Every row of docs/integrations.md names a test, and every test that it names is there."""

from __future__ import annotations

import ast
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
COLUMNS = ["what", "supported", "how", "caveat", "test"]


def rows() -> list[list[str]]:
    """The cells of every row, tables' heads and rules left out."""
    lines = (ROOT / "docs" / "integrations.md").read_text(encoding="utf-8").splitlines()
    found = [
        [cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]]
        for line in lines
        if line.startswith("|")
    ]
    return [cells for cells in found if cells != COLUMNS and set("".join(cells)) - set("-: ")]


def names_in(path: Path) -> set[str]:
    """The names of the test functions in a file, those in classes too."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    return {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}


def test_every_row_names_tests_that_exist():
    wrong = []
    for cells in rows():
        named = re.findall(r"`([^`]+)`", cells[-1])
        if len(cells) != len(COLUMNS) or not named or not all(cells[:2]):
            wrong.append(f"{cells[0]}: a row has {', '.join(COLUMNS)}, and names a test")
        for name in named:
            file, _, test = name.partition("::")
            path = ROOT / file
            if not path.is_file() or not test or test.split("::")[-1].split("[")[0] not in names_in(path):
                wrong.append(f"{cells[0]}: no test {name}")
    assert not wrong, "\n".join(wrong)
    assert len(rows()) > 20

"""Run the Python examples of README.md and docs/*.md.

Blocks fenced with ```python are run, file by file, top to bottom and in one namespace per file, so that a
later block can use what an earlier one made. A block that can't run just anywhere is fenced ```python no-run.
"""

from __future__ import annotations

import os
import re
import sys
import tempfile
import traceback
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
FENCE = re.compile(r"^```python[ \t]*(?P<info>[^\n]*)\n(?P<code>.*?)^```[ \t]*$", re.MULTILINE | re.DOTALL)


class Block(NamedTuple):
    """One fenced block; `line` is that of its first line of code."""

    path: Path
    line: int
    code: str
    runs: bool


def blocks(path: Path) -> list[Block]:
    """All Python blocks of a Markdown file."""
    text = path.read_text(encoding="utf-8")
    return [
        Block(
            path,
            text.count("\n", 0, match.start("code")) + 1,
            match["code"],
            "no-run" not in match["info"].split(),
        )
        for match in FENCE.finditer(text)
    ]


def run(path: Path) -> list[str]:
    """Run a file's blocks; the errors, one text each. Later blocks of a file are skipped after the first."""
    namespace: dict[str, object] = {"__name__": "__docs__"}
    for block in blocks(path):
        if not block.runs:
            continue
        # Blank lines in front make the traceback's line numbers those of the Markdown file.
        code = "\n" * (block.line - 1) + block.code
        try:
            exec(compile(code, str(path), "exec", dont_inherit=True), namespace)
        except Exception:
            return [f"{path.relative_to(ROOT)}:{block.line}: this example fails\n{traceback.format_exc()}"]
    return []


def main() -> int:
    files = [file for file in [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))] if file.exists()]
    count = sum(block.runs for file in files for block in blocks(file))
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)  # examples may write files
        errors = [error for file in files for error in run(file)]
        os.chdir(ROOT)
    for error in errors:
        print(error, file=sys.stderr)
    print(f"{count} examples in {len(files)} documents, {len(errors)} failing")
    return 1 if errors else 0


if __name__ == "__main__":
    sys.exit(main())

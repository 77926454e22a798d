"""Generated files against those that are kept, which a reviewer reads; `python -m tests.golden` accepts changes."""

from __future__ import annotations

import difflib
import subprocess
import sys

import pytest
from golden_cases import KEPT, sources

NAMES = sorted(path.name for path in KEPT.glob("[a-z]*.py"))


def test_every_kernel_is_kept() -> None:
    assert [f"{name}.py" for name in sorted(sources())] == NAMES


@pytest.mark.parametrize("name", NAMES)
def test_the_generated_file_is_the_kept_one(name: str) -> None:
    kept = (KEPT / name).read_text()
    made = sources()[name.removesuffix(".py")].text
    changes = "".join(
        difflib.unified_diff(
            kept.splitlines(True), made.splitlines(True), f"kept/{name}", f"generated/{name}"
        )
    )
    assert not changes, f"accept with: python -m tests.golden\n{changes}"


def test_they_read_well() -> None:
    """No name that isn't there, no import that isn't used, no line too long, nothing that trails."""
    command = [sys.executable, "-m", "ruff", "check", "--isolated", "--output-format", "concise"]
    command += ["--select", "E,W,F,I", "--ignore", "F841", "--line-length", "124"]
    files = [str(KEPT / name) for name in NAMES]
    checked = subprocess.run([*command, *files], capture_output=True, text=True, check=False)
    assert checked.returncode == 0, checked.stdout + checked.stderr

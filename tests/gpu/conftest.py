"""Tests on a GPU want Triton compiled; those of `tests/kernels` have it interpreted, and a process has it one way."""

from __future__ import annotations

from pathlib import Path

import pytest


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    here = Path(__file__).parent
    mine = [item for item in items if here in item.path.parents]
    others = [item for item in items if here.parent / "kernels" in item.path.parents]
    if mine and others:
        why = "Triton is interpreted for the tests of kernels in this run: pytest tests/gpu runs these"
        for item in mine:
            item.add_marker(pytest.mark.skip(reason=why))

"""Tests on a GPU want Triton compiled; in a run with other tests it is interpreted, and a process has it one way."""

from __future__ import annotations

from pathlib import Path

import pytest

from morphc.kernels.triton_api import interprets


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if not interprets():
        return
    why = "Triton is interpreted in this run: pytest tests/gpu, by itself, runs these"
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.skip(reason=why))

"""Each test starts from the same RNG state, and leaves it and the pass registry as they were."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from morphc.passes import manager


@pytest.fixture(autouse=True)
def seeded() -> Iterator[None]:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        yield


@pytest.fixture(autouse=True)
def own_registry(monkeypatch: pytest.MonkeyPatch) -> None:
    """Passes registered by a test are forgotten after it."""
    monkeypatch.setattr(manager, "_REGISTRY", dict(manager._REGISTRY))


@pytest.fixture(autouse=True)
def own_dumps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Dumps of failed passes go to the test's own folder."""
    monkeypatch.setenv("MORPHC_CACHE_DIR", str(tmp_path / "cache"))

"""The hosts of the tests of the passes serve here too; each test starts from the same RNG state."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

HOSTS = Path(__file__).resolve().parents[1] / "passes"
if str(HOSTS) not in sys.path:
    sys.path.append(str(HOSTS))


@pytest.fixture(autouse=True)
def seeded() -> Iterator[None]:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        yield


@pytest.fixture(autouse=True)
def own_dumps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Dumps of failed passes go to the test's own folder."""
    monkeypatch.setenv("MORPHC_CACHE_DIR", str(tmp_path / "cache"))

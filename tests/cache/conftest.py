"""Every test has a cache of its own, and a process that has warned of nothing yet."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from cache_helpers import compiled_cache, forget, job


@pytest.fixture(autouse=True)
def fresh_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The folder that the cache is in; `v1` is in it."""
    monkeypatch.setenv("MORPHC_CACHE_DIR", str(tmp_path / "cache"))
    forget()
    yield tmp_path / "cache"
    forget()


@pytest.fixture(scope="session")
def compiled_once(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache that holds the kernel of `job()`, compiled."""
    root = tmp_path_factory.mktemp("compiled") / "cache"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MORPHC_CACHE_DIR", str(root))
        compiled_cache([job()])
    forget()
    return root


@pytest.fixture
def filled(fresh_cache: Path, compiled_once: Path) -> Path:
    """This test's own copy of it: the path of `v1`."""
    shutil.copytree(compiled_once, fresh_cache)
    return fresh_cache / "v1"

"""Kernels run in Triton's interpreter here, on tensors in host memory; see `where` for a GPU."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, settings
from where import DEVICE

settings.register_profile(
    "kernels", max_examples=25, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck)
)
settings.load_profile("kernels")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if DEVICE.type == "cpu":
        return
    left_out = pytest.mark.skip(reason="made for Triton's interpreter: takes no device")
    for item in items:
        here = Path(__file__).parent in item.path.parents
        if here and "device" not in getattr(item, "fixturenames", ()) and not hasattr(item.module, "DEVICE"):
            item.add_marker(left_out)


@pytest.fixture(scope="session")
def cache_of_the_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(autouse=True)
def interpreter_and_cache(monkeypatch: pytest.MonkeyPatch, cache_of_the_run: Path) -> None:
    """Kernels are interpreted, and generated files go to a folder of the run."""
    if DEVICE.type == "cpu":
        monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setenv("MORPHC_CACHE_DIR", str(cache_of_the_run))


@pytest.fixture(autouse=True)
def one_thread_and_a_fixed_seed() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)


@pytest.fixture
def device() -> torch.device:
    """Where kernels run in this session."""
    return DEVICE
